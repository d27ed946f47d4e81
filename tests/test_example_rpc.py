"""examples/rpc.py in both styles, driven by Twisted's Int32StringReceiver, by asyncio and by sockets."""

import asyncio
import contextlib
import json
import re
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import time

import pytest
from example_helpers import FOREIGN, Example
from helpers import ROOT, SANITIZER, connect, patient, recv_exact, recv_until_eof, scaled, wait_until

from tstpool import LengthPrefixed

MESSAGE_MOST = 1 << 20
STYLES = ["framing", "req_len"]


@pytest.fixture(params=STYLES)
def rpc(request):
    with Example("rpc.py", "--style", request.param) as rpc:
        said = f"rpc ({request.param}) on 127.0.0.1:{rpc.addr[1]};".encode()
        wait_until(lambda: said in rpc.output, message=lambda: rpc.output)
        yield rpc


def request(number, method, *params):
    return json.dumps({"jsonrpc": "2.0", "id": number, "method": method, "params": params})


def result(number, value):
    return {"jsonrpc": "2.0", "id": number, "result": value}


# ------------------------------------------------------------------------------------------ Twisted's client


def twisted(rpc, messages, n_replies=None, step=0):
    """The replies that a client in Twisted gets to these messages (text), written `step` bytes at a time."""
    replies = len(messages) if n_replies is None else n_replies
    plan = {"port": rpc.addr[1], "messages": messages, "step": step, "replies": replies}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "twisted_rpc_client.py")],
        input=json.dumps(plan) + "\n",
        capture_output=True,
        text=True,
        env=FOREIGN,
        timeout=patient(60),
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(reply) for reply in json.loads(done.stdout)]


@pytest.mark.parametrize("step", [0, 1, 7])
def test_twisted_calls_each_method(rpc, step):
    """However the stream is cut into writes; replies come in order."""
    calls = [
        (("add",), 0),
        (("add", 1, 2, 39), 42),
        (("add", 0.5, -1), -0.5),
        (("upper", "grüße \u20ac"), "GRÜSSE \u20ac"),
        (("sleep", 0.01), 0.01),
    ]
    messages = [request(i, *call) for i, (call, _) in enumerate(calls)]
    assert twisted(rpc, messages, step=step) == [result(i, value) for i, (_, value) in enumerate(calls)]


def test_twisted_sends_many_calls_at_once(rpc):
    n = scaled(5000, minimum=200)
    replies = twisted(rpc, [request(i, "add", i, i) for i in range(n)])
    assert replies == [result(i, 2 * i) for i in range(n)]


def test_twisted_sends_messages_of_all_sizes(rpc):
    sizes = [0, 1, 4000, 4096, 4100, 65536, 300_000, MESSAGE_MOST - 200]
    replies = twisted(rpc, [request(size, "upper", "x" * size) for size in sizes + sizes[::-1]])
    assert replies == [result(size, "X" * size) for size in sizes + sizes[::-1]]


def error_of(reply):
    return reply["id"], reply["error"]["code"]


WRONG = [
    # (message, (id, code of the error))
    ("", (None, -32700)),
    ("{", (None, -32700)),
    ("\udcff\udcfe", (None, -32700)),
    ("[" * 100_000, (None, -32700)),
    ("1" * 10_000, (None, -32700)),
    ("[]", (None, -32600)),
    ("17", (None, -32600)),
    ("{}", (None, -32600)),
    ('{"id": 1, "method": 5}', (None, -32600)),
    ('{"id": [1], "method": "add"}', (None, -32600)),
    ('{"id": "' + "x" * 101 + '", "method": "add"}', (None, -32600)),
    ('{"id": true, "method": "add"}', (None, -32600)),
    ('{"id": 1.5, "method": "add"}', (None, -32600)),
    ('{"id": 2, "method": "exit"}', (2, -32601)),
    ('{"id": 2, "method": "__class__"}', (2, -32601)),
    ('{"id": 3, "method": "add", "params": ["x"]}', (3, -32602)),
    ('{"id": 3, "method": "add", "params": {"a": 1}}', (3, -32602)),
    ('{"id": 3, "method": "add", "params": [true]}', (3, -32602)),
    ('{"id": 3, "method": "add", "params": 7}', (3, -32602)),
    ('{"id": 3, "method": "add", "params": null}', (3, -32602)),
    ('{"id": 3, "method": "upper", "params": "a"}', (3, -32602)),
    ('{"id": 3, "method": "upper", "params": []}', (3, -32602)),
    ('{"id": 3, "method": "upper", "params": [1]}', (3, -32602)),
    ('{"id": 3, "method": "upper", "params": {"text": null}}', (3, -32602)),
    ('{"id": 3, "method": "upper", "params": {"self": "x"}}', (3, -32602)),
    ('{"id": 3, "method": "sleep", "params": ["1"]}', (3, -32602)),
    ('{"id": 3, "method": "sleep", "params": [false]}', (3, -32602)),
    ('{"id": 3, "method": "sleep", "params": [-1]}', (3, -32602)),
    ('{"id": 3, "method": "sleep", "params": [NaN]}', (3, -32602)),
    ('{"id": 3, "method": "sleep", "params": [1e999]}', (3, -32602)),
    ('{"id": "four", "method": "add", "params": [1e308, 1e308]}', ("four", -32603)),
    ('{"id": "\udcc3\udca9", "method": "upper", "params": ["' + "\u00e9" * 300_000 + '"]}', ("\u00e9", -32603)),
]


def test_what_is_wrong_gets_an_error_for_a_reply(rpc):
    """And the connection goes on: a right one after each."""
    messages = [message for wrong, _ in WRONG for message in (wrong, request("next", "add", 1, 1))]
    replies = twisted(rpc, messages)
    assert [error_of(reply) for reply in replies[::2]] == [error for _, error in WRONG]
    assert replies[1::2] == [result("next", 2)] * len(WRONG)


def test_params_are_an_array_or_an_object(rpc):
    """Anything else is refused in our own words, not those of Python's library."""
    wrong = ["7", "null", "true", '"a"', '""']
    replies = twisted(rpc, [f'{{"id": 1, "method": "upper", "params": {params}}}' for params in wrong])
    error = {"code": -32602, "message": "the params are neither an array nor an object"}
    assert [reply.get("error") for reply in replies] == [error] * len(wrong)


def test_an_id_is_an_integer_or_a_short_string(rpc):
    wrong = ["1.5", "1.0", "true", "[]", '"' + "x" * 101 + '"']
    replies = twisted(rpc, [f'{{"id": {number}, "method": "add"}}' for number in wrong])
    error = {"code": -32600, "message": "the id is neither an integer nor a short string"}
    assert [reply.get("error") for reply in replies] == [error] * len(wrong)


def broken(kind, text):
    raise {"type": TypeError, "value": ValueError, "key": KeyError}[kind](f"of no use: {text}")


@pytest.mark.parametrize("kind", ["type", "value", "key"])
@pytest.mark.parametrize("style", STYLES)
def test_a_method_that_fails_is_not_blamed_on_the_client(make_pool, caplog, style, kind):
    """It is told nothing of what happened; the log is, with the place, and can't be forged."""
    example = runpy.run_path(str(ROOT / "examples" / "rpc.py"))
    example["METHODS"]["broken"] = broken
    if style == "framing":
        pool = make_pool(example["Service"](), framing=LengthPrefixed(4), slow_handler=30)  # which would be logged
    else:
        pool = make_pool(example["service"], slow_handler=30)
    with connect(pool) as client:
        reply = exchange(client, "broken", kind, "a secret\nforged")
        assert reply["error"] == {"code": -32603, "message": "the method failed"}
        assert talk(client, "add", 1) == 1
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert "in broken" in caplog.text
    assert r"a secret\nforged" in caplog.text
    assert "\nforged" not in caplog.text


def test_a_request_without_an_id_gets_no_reply(rpc):
    messages = [
        '{"method": "add"}',
        '{"method": "nonsense"}',
        '{"method": "add", "params": ["x"]}',
        request(1, "add", 1),
        '{"method": "sleep", "params": [0]}',
        request(None, "add", 2),  # null is an id
    ]
    assert twisted(rpc, messages, n_replies=2) == [result(1, 1), result(None, 2)]


@pytest.mark.parametrize("size", [MESSAGE_MOST + 1, 1 << 31, (1 << 32) - 1])
def test_too_long_a_message_closes_its_connection_alone(rpc, size):
    with connect(rpc.addr) as good, connect(rpc.addr) as bad:
        first = request(1, "add", 1).encode()
        bad.sendall(struct.pack(">I", len(first)) + first + struct.pack(">I", size) + b"and some of it")
        with contextlib.suppress(ConnectionResetError):  # the rest of it may be unread
            reply = recv_until_eof(bad)
            assert json.loads(reply[4:]) == result(1, 1)
        assert talk(good, "add", 2) == 2
        assert b"closed" not in rpc.output  # strangers must not fill the log


@pytest.mark.skipif(bool(SANITIZER), reason="a sanitizer keeps what was freed")
def test_to_announce_a_long_message_costs_little_memory(rpc):
    """Five bytes from each of many clients."""
    n_clients = 100
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(rpc.addr)) for _ in range(n_clients)]
        for client in clients:
            assert talk(client, "add", 1) == 1
        before = rpc.resident_bytes()
        for client in clients:
            client.sendall(struct.pack(">I", MESSAGE_MOST) + b"x")
        other = stack.enter_context(connect(rpc.addr))
        for i in range(100):  # what all have sent has been taken meanwhile
            assert talk(other, "add", i) == i
        assert rpc.resident_bytes() - before < n_clients * MESSAGE_MOST // 8


def test_a_buffer_grows_with_what_has_come_and_becomes_small_again(make_pool):
    """Before the method runs, which may take long, and after the reply."""
    example = runpy.run_path(str(ROOT / "examples" / "rpc.py"))
    pool = make_pool(example["service"], max_recv_size=4096, max_send_size=4096)

    def sizes(text):
        (sock,) = pool
        return [sock.recv_data.s_len, sock.send_data.s_len, len(text)]

    example["METHODS"]["sizes"] = sizes
    message = request(0, "sizes", "x" * 1_000_000).encode()
    stream = struct.pack(">I", len(message)) + message
    with connect(pool) as client:
        (sock,) = wait_until(lambda: list(pool))
        data = sock.recv_data
        sent = 0
        for n in [5, 4096, 4097, 5000, 100_000, 600_000]:
            client.sendall(stream[sent:n])
            sent = n
            wait_until(lambda n=n: data.req_pos + data.com_len == n)
            assert data.s_len <= max(4096, 2 * n)
        client.sendall(stream[sent:])
        (size,) = struct.unpack(">I", recv_exact(client, 4))
        assert json.loads(recv_exact(client, size)) == result(0, [4096, 4096, 1_000_000])
        for n in [0, 1, 4040, 4096, 5000, 8192, 9000, 1_000_000, 1]:  # a reply has been long, too
            assert talk(client, "upper", "x" * n) == "X" * n
            assert talk(client, "sizes", "x") == [4096, 4096, 1]


def exchange(sock, method, *params):
    """The reply to one call over a socket."""
    message = request(0, method, *params).encode()
    sock.sendall(struct.pack(">I", len(message)) + message)
    (size,) = struct.unpack(">I", recv_exact(sock, 4))
    return json.loads(recv_exact(sock, size))


def talk(sock, method, *params):
    """The result of one call over a socket."""
    return exchange(sock, method, *params)["result"]


# ------------------------------------------------------------------------------------------ asyncio's streams


class Connection:
    """A client with asyncio's streams."""

    async def __aenter__(self):
        self.reader, self.writer = await asyncio.open_connection(*self.addr)
        return self

    def __init__(self, addr):
        self.addr = addr

    async def __aexit__(self, *exc_info):
        self.writer.close()
        await self.writer.wait_closed()

    async def call(self, method, *params):
        message = request("a", method, *params).encode()
        self.writer.write(len(message).to_bytes(4, "big") + message)
        size = int.from_bytes(await self.reader.readexactly(4), "big")
        reply = json.loads(await self.reader.readexactly(size))
        assert reply["id"] == "a"
        return reply["result"]


def test_asyncio_calls_over_many_connections(rpc):
    async def one(i):
        async with Connection(rpc.addr) as connection:
            for n in range(scaled(50, minimum=5)):
                assert await connection.call("add", i, n) == i + n
                text = "x" * (i * 997 % 10_000)
                assert await connection.call("upper", text) == text.upper()

    async def all_of_them():
        await asyncio.gather(*(one(i) for i in range(20)))

    asyncio.run(asyncio.wait_for(all_of_them(), patient(60)))


def test_calls_that_block_hold_nobody_else_up(rpc):
    """Twelve sleep for half a second each, at the same time, and a thirteenth is answered meanwhile. (On a machine that
    may hold this thread up: longer.)"""
    seconds = min(patient(0.5), 2.0)

    async def check():
        async with contextlib.AsyncExitStack() as stack:
            sleepers = [await stack.enter_async_context(Connection(rpc.addr)) for _ in range(12)]
            other = await stack.enter_async_context(Connection(rpc.addr))
            for connection in [*sleepers, other]:
                assert await connection.call("add", 1) == 1
            began = time.monotonic()
            sleeping = asyncio.gather(*(connection.call("sleep", seconds) for connection in sleepers))
            answered = 0
            while not sleeping.done():
                assert await other.call("add", answered) == answered
                answered += 1
            assert await sleeping == [seconds] * 12
            assert time.monotonic() - began < 12 * seconds * 0.75
            assert answered > 10

    asyncio.run(asyncio.wait_for(check(), patient(30)))


# ---------------------------------------------------------------------------------------------- bad clients


def test_a_client_that_does_not_read_is_not_read_from(rpc):
    """Neither its requests nor its replies fill the server's memory, and none is lost when it reads after all."""
    total = 64 << 20
    text = "x" * 60_000
    message = request(1, "upper", text).encode()
    message = struct.pack(">I", len(message)) + message
    with connect(rpc.addr) as client, connect(rpc.addr) as other:
        assert talk(client, "add", 1) == 1
        before = rpc.resident_bytes()
        client.setblocking(False)
        sent = 0
        while sent < total and select.select([], [client], [], 0.5)[1]:
            sent += client.send(message[sent % len(message) :])
        assert sent < total // 2
        if not SANITIZER:  # it keeps what was freed
            assert rpc.resident_bytes() - before < total // 4
        assert talk(other, "add", 2) == 2
        client.settimeout(patient(10))
        for _ in range(sent // len(message)):
            (size,) = struct.unpack(">I", recv_exact(client, 4))
            assert json.loads(recv_exact(client, size)) == result(1, text.upper())
        client.sendall(message[sent % len(message) :] if sent % len(message) else b"")


def test_clients_that_leave_in_the_middle_harm_nobody(rpc):
    message = request(1, "sleep", 0.05).encode()
    message = struct.pack(">I", len(message)) + message
    for n in [1, 3, 4, 5, len(message) - 1, len(message)]:
        with connect(rpc.addr) as client:
            client.sendall(message[:n])
    with connect(rpc.addr) as client:
        assert talk(client, "add", 1) == 1
    assert b"raised" not in rpc.output


@pytest.mark.parametrize("end_by", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("style", STYLES)
def test_it_ends_on_a_signal(style, end_by):
    with contextlib.ExitStack() as stack:
        with Example("rpc.py", "--style", style, end_by=end_by) as rpc:
            client = stack.enter_context(connect(rpc.addr))
            assert talk(client, "add", 1) == 1
        wait_until(lambda: client.recv(1) == b"")


@pytest.mark.parametrize("style", STYLES)
def test_it_says_where_it_listens_only_if_it_does(style):
    example = [sys.executable, str(ROOT / "examples" / "rpc.py"), "--style", style]
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = subprocess.run([*example, "--port", str(port)], capture_output=True, text=True, timeout=patient(60))
    assert done.returncode != 0
    assert done.stdout == ""
    assert f"127.0.0.1:{port}" in done.stderr
    with subprocess.Popen([*example, "--port", "0"], stdout=subprocess.PIPE, text=True) as process:
        try:
            port = int(re.search(r" on 127.0.0.1:(\d+);", process.stdout.readline())[1])
            with connect(("127.0.0.1", port)) as client:
                assert talk(client, "add", 1) == 1
        finally:
            process.terminate()
        assert process.wait(patient(20)) == 0
