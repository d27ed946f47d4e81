"""A message of 128 KiB or more that a compiled handler gets is received straight into a block of memory of its own, as
soon as its header is there; blocks are used again. Nobody can tell, whatever happens in the middle of it."""

import contextlib
import ctypes
import json
import os
import socket
import threading

import pytest
from compiled_helpers import FRAMING, pack, receive, stream, wait_counts
from contract_helpers import ServerProcess, every_trigger, handler, in_threads, read_line, send_slowly, shim
from downstream_handlers import Commands, Counting, FramedEcho
from helpers import SANITIZER, connect, recv_exact, recv_until_eof, reset, run_python, scaled, wait_until

from tstpool import Fixed, LengthPrefixed, TstHandler, TstNogilHandler

SIZE = 1 << 20
LEAST = 131_072  # whole, header included: from there on it gets a block
SIZES = [LEAST - 5, LEAST - 4, LEAST, 200_000, SIZE - 1, SIZE, 300_000, 10, 262_144, SIZE]


class Mixed(Commands):
    """Messages that begin with r are answered in Python, those that begin with e in C."""

    def on_message(self, sock, data):
        return data


def bodies(sizes, first=b"e"):
    return [first + os.urandom(size - 1) for size in sizes]


@every_trigger
@pytest.mark.parametrize("strip", [True, False])
def test_it_arrives_whole_however_it_is_cut(make_pool, make_client, trigger, strip):
    """Without `strip` the header is a part of the message, and comes back as such."""
    echo = FramedEcho() if strip else EchoOfFrames()
    pool = make_pool(echo, framing=LengthPrefixed(4, strip=strip), trigger=trigger, workers=2)
    client = make_client(pool)
    for body in bodies([SIZE, SIZE, 700_000]):
        data = pack(body)
        send_slowly(pool, client, data)
        assert recv_exact(client, len(data)) == data


class EchoOfFrames(TstNogilHandler):
    """Passes each message on."""

    def on_message(self, sock, data):
        sock.send(data)


def test_messages_of_fixed_size(make_pool, make_client):
    client = make_client(make_pool(FramedEcho(), framing=Fixed(SIZE)))
    body = os.urandom(SIZE)
    for _ in range(3):
        client.sendall(body)
        assert recv_exact(client, SIZE) == body


@every_trigger
@pytest.mark.parametrize("first", [b"e", b"r"])
def test_long_and_short_ones_keep_their_order(make_pool, make_client, trigger, first):
    """Many connections at once, so that blocks go from one to another."""
    pool = make_pool(Mixed(), framing=FRAMING, workers=4, shards=2, trigger=trigger)
    clients = [make_client(pool) for _ in range(4)]
    sizes = SIZES * scaled(4, 1)
    each = [bodies(sizes[n:] + sizes[:n], first) for n in range(len(clients))]
    assert all(in_threads(*(lambda c=c, b=b: stream(c, b) for c, b in zip(clients, each, strict=True)), timeout=60))


@pytest.mark.parametrize("end", ["close", "reset", "stop"])
def test_an_end_in_the_middle_of_it_is_clean(make_pool, end):
    """The build of `make asan` finds what would be left behind."""
    counting = Counting()
    pool = make_pool(counting, framing=FRAMING)
    data = pack(bytes(SIZE))
    n_clients = 1 if end == "stop" else 5
    for n in range(n_clients):
        client = connect(pool)
        client.sendall(data[:200_000])
        wait_until(lambda n=n: pool.stats().bytes_in == 200_000 * (n + 1))
        if end == "stop":
            pool.stop(0)
        if end == "reset":
            reset(client)
        else:
            client.close()
        wait_counts(counting, disconnected=n + 1)
    assert counting.counts["received"] == 0


@pytest.mark.parametrize("kind", ["python", "compiled"])
@pytest.mark.parametrize("first", ["python", "compiled"])
def test_a_handler_that_is_assigned_in_the_middle_of_it_hears_of_its_end(make_pool, make_client, first, kind):
    heard = []

    class New(TstNogilHandler if kind == "compiled" else TstHandler):
        def on_disconnect(self, sock, reason):
            heard.append("new")

    class Old(TstNogilHandler if first == "compiled" else TstHandler):
        def on_disconnect(self, sock, reason):
            heard.append("old")

    pool = make_pool(Old(), framing=FRAMING)
    client = make_client(pool)
    client.sendall(pack(bytes(SIZE))[:300_000])
    wait_until(lambda: pool.stats().bytes_in == 300_000)
    (sock,) = pool.sockets()
    sock.handler = New()
    client.close()
    wait_until(lambda: heard)
    assert heard == ["new"]


@pytest.mark.parametrize("upto", [None, 300_000], ids=["behind it", "within it"])
def test_a_peer_that_shuts_down_its_sending_side(make_pool, make_client, upto):
    client = make_client(make_pool(FramedEcho(), framing=FRAMING))
    data = pack(os.urandom(SIZE))

    def send():
        client.sendall(data[:upto])
        client.shutdown(socket.SHUT_WR)

    assert in_threads(send, lambda: recv_until_eof(client))[1] == (b"" if upto else data)


@every_trigger
def test_others_are_served_while_its_handler_blocks(make_pool, make_client, trigger):
    """In C, then passed on to Python; what is behind it keeps its place."""
    commands = Mixed()
    pool = make_pool(commands, framing=FRAMING, workers=3, trigger=trigger)
    client, other = make_client(pool), make_client(pool)
    behind = [*bodies([600_000], b"B"), b"e2", *bodies([400_000], b"r"), b"e4"]
    sender = threading.Thread(target=client.sendall, args=(pack(*behind),))
    sender.start()
    wait_until(lambda: commands.waiting)
    assert stream(other, bodies([300_000], b"e") + bodies([500_000], b"r") + [b"e"])
    commands.open_gate()
    assert receive(client, len(behind)) == behind
    sender.join()


@every_trigger
def test_one_that_reconnects_its_socket(make_pool, make_client, trigger):
    commands = Mixed()
    client = make_client(make_pool(commands, framing=FRAMING, trigger=trigger))
    ours, theirs = socket.socketpair()
    with ours:
        commands.new_descriptor = theirs.fileno()
        client.sendall(pack(*bodies([500_000], b"x"), b"this one goes"))
        wait_counts(commands, received=1)
        theirs.close()
        ours.settimeout(10)
        assert stream(ours, bodies([300_000, 10, SIZE]))


def test_a_peer_that_sends_it_for_longer_than_it_may(make_pool, make_client):
    """Its deadline is that of the whole message, however steadily it goes on."""
    pool = make_pool(FramedEcho(), framing=FRAMING, message_timeout=0.5)
    client = make_client(pool)
    client.sendall(pack(bytes(SIZE))[:200_000])

    def is_cut_off():
        with contextlib.suppress(OSError):
            client.send(b"x")
        return pool.stats().message_closed == 1

    wait_until(is_cut_off)


@pytest.mark.parametrize("kind", ["python", "compiled"])
def test_a_handler_that_is_assigned_in_the_middle_of_it_gets_the_next_one(make_pool, make_client, kind):
    got = []
    pool = make_pool(Mixed(), framing=FRAMING)
    client = make_client(pool)
    (long,) = bodies([SIZE])
    send_slowly(pool, client, pack(long), upto=300_000)
    (sock,) = pool.sockets()
    sock.handler = handler(on_message=lambda sock, data: got.append(data)) if kind == "python" else Keeps(got)
    client.sendall(pack(long)[300_000:] + pack(b"abc", long))
    assert receive(client) == [long]
    wait_until(lambda: len(got) == 2)
    assert got == [b"abc", long]


class Keeps(TstNogilHandler):
    def __init__(self, got):
        self.got = got

    def on_message(self, sock, data):
        self.got.append(data)


def test_one_that_was_assigned_before_its_rest_came_gets_it(make_pool, make_client):
    """It was begun as nobody's: the new handler, Python's first and compiled then, has it received for itself."""
    got = []
    pool = make_pool(handler(on_message=lambda sock, data: got.append(data)), framing=FRAMING)
    client = make_client(pool)
    (long,) = bodies([SIZE])
    client.sendall(pack(b"first"))
    wait_until(lambda: got == [b"first"])
    (sock,) = pool.sockets()
    sock.handler = FramedEcho()
    client.sendall(pack(long))
    assert receive(client) == [long]
    sock.handler = None
    client.sendall(pack(long))
    wait_until(lambda: len(got) == 2)
    assert got[1] == long


RECORD = r"""
/* Where recv has put how much, for LD_PRELOAD. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <sys/socket.h>

uint64_t tst_calls, tst_places[10000], tst_sizes[10000];

ssize_t recv(int fd, void *buffer, size_t size, int flags) {
    static ssize_t (*real)(int, void *, size_t, int);
    if (!real) real = (ssize_t (*)(int, void *, size_t, int))dlsym(RTLD_NEXT, "recv");
    ssize_t result = real(fd, buffer, size, flags);
    if (result > 0 && tst_calls < 10000) {
        tst_places[tst_calls] = (uintptr_t)buffer;
        tst_sizes[tst_calls++] = result;
    }
    return result;
}
"""

SERVER = """
import ctypes
sys.path[:0] = ["tests", "tests/downstream"]
from downstream_handlers import FramedEcho

own = ctypes.CDLL(None)
calls = ctypes.c_uint64.in_dll(own, "tst_calls")
places, sizes = ((ctypes.c_uint64 * 10000).in_dll(own, name) for name in ("tst_places", "tst_sizes"))
pool = TstPool(FramedEcho(), framing=LengthPrefixed(4), workers=1)
print(pool.listen("127.0.0.1", 0)[1], flush=True)
pool.start()
while pool.stats().bytes_in < 4:
    time.sleep(0.001)
print("begun", flush=True)
sys.stdin.read()
pool.stop(0)
print([[places[n], sizes[n]] for n in range(calls.value)])
"""


def test_it_is_received_into_one_piece_and_next_to_nothing_of_it_is_copied():
    """Of the first one what had come with its header is copied into its block, of those that follow 8 KiB. They lie
    where the first one lay."""
    messages = 5
    with ServerProcess(SERVER, preload=shim("record-recv", RECORD)) as server, connect(server.addr) as client:
        data = pack(os.urandom(SIZE))
        for _ in range(messages):
            client.sendall(data)
            assert recv_exact(client, len(data)) == data
        assert read_line(server.process.stdout.fileno()) == "begun\n"
        calls = json.loads(server.finish())
    assert sum(size for _, size in calls) == messages * len(data)
    blocks, n = set(), 0
    for message in range(messages):
        first, rest = calls[n][1], []
        n += 1
        while first + sum(size for _, size in rest) < len(data):
            rest.append(calls[n])
            n += 1
        assert message == 0 or first <= 8192
        place = rest[0][0]
        blocks.add(place - (first - 4))
        for at, size in rest:
            assert at == place, "there is a gap"
            place += size
    assert len(blocks) == 1


@pytest.mark.parametrize("kind", ["python", "compiled"])
def test_a_header_that_comes_alone_brings_no_copy_with_it(kind):
    """Of the first message, too, no more than 8 KiB are copied: into a block or, in Python, into the object."""
    code = SERVER.replace("FramedEcho()", {"python": "Echo()", "compiled": "FramedEcho()"}[kind])
    with ServerProcess(code, preload=shim("record-recv", RECORD)) as server, connect(server.addr) as client:
        data = pack(os.urandom(SIZE))
        client.sendall(data[:4])
        assert read_line(server.process.stdout.fileno()) == "begun\n"
        client.sendall(data[4:])
        recv_exact(client, SIZE)
        calls = json.loads(server.finish())
    assert sum(size for _, size in calls) == len(data)
    assert calls[0][1] == 4
    assert calls[1][1] <= 8192
    place = calls[2][0]
    for at, size in calls[2:]:
        assert at == place, "there is a gap"
        place += size


MEMORY = """
import socket, sys
sys.path[:0] = ["tests", "tests/downstream"]
from compiled_helpers import pack, receive
from downstream_handlers import FramedEcho
from helpers import mapped_memory, wait_until
from tstpool import LengthPrefixed, TstPool

def held():
    return (mapped_memory() - before) / (1 << 20)

before = 0
pool = TstPool(FramedEcho(), framing=LengthPrefixed(4), workers=2, shards=2)
pool.listen("127.0.0.1", 0)
pool.start()
data = pack(bytes(1 << 20))
before = mapped_memory()
clients = [socket.create_connection(pool.addresses[0]) for _ in range(40)]
for client in clients:
    client.sendall(data[:500_000])
wait_until(lambda: pool.stats().bytes_in == 40 * 500_000)
wait_until(lambda: held() > 39)  # one for each
for client in clients:
    client.sendall(data[500_000:])
    assert receive(client) == [data[4:]]
    client.close()
wait_until(lambda: len(pool.sockets()) == 0)
wait_until(lambda: 7 < held() < 10)
assert pool.stop(0)
assert held() < 1, held()
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
@pytest.mark.skipif(bool(SANITIZER), reason="a sanitizer's malloc has its own accounts")
def test_a_pool_keeps_a_few_blocks_until_it_stops():
    """B40: 8 MiB of them, in all its shards together."""
    run_python("-c", MEMORY, env={"MALLOC_MMAP_THRESHOLD_": "131072"}, timeout=60)
