"""A connection whose large messages are all of one size, each sent when the last was answered: the next one is received
straight into the object that the handler gets. Whatever comes instead of it arrives as ever."""

import itertools
import re
import socket
import struct
import threading

import downstream_handlers
import pytest
from contract_helpers import every_trigger, handler, needs_strace, open_sockets, system_calls
from helpers import FREE_THREADED, RunningPool, connect, patient, recv_exact, recv_until_eof, scaled, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

from tstpool import Delimited, LengthPrefixed, MessageTooLarge

SIZE = 16384  # a rather usual size of such messages
SHORT = 8192  # the smallest
USUAL = 30  # so many are enough for objects to be there for the next ones
DIGITS = 0x3333  # a size whose field of two bytes begins with a digit


def body(size, number=0):
    """Bytes that differ with each number, and at each place."""
    return (b"%08d" % number * (size // 8 + 1))[:size]


def frame(data):
    return len(data).to_bytes(4, "big") + data


def echo_one(client, data):
    client.sendall(frame(data))
    assert recv_exact(client, len(data) + 4) == frame(data)


def accustom(client, size=SIZE, count=USUAL):
    for number in range(count):
        echo_one(client, body(size, number))


ANOMALIES = {
    "nothing else": [],
    "header, body": [frame(body(SIZE))[:4], body(SIZE)],
    "part of a header": [frame(body(SIZE))[:3], frame(body(SIZE))[3:]],
    "part of a body": [frame(body(SIZE))[:100], frame(body(SIZE))[100:]],
    "all but a byte": [frame(body(SIZE))[:-1], frame(body(SIZE))[-1:]],
    "two": [frame(body(SIZE, 1)) + frame(body(SIZE, 2))],
    "one and a byte": [frame(body(SIZE, 1)) + b"\0", frame(body(SIZE, 2))[1:]],
    "one and a half": [frame(body(SIZE, 1)) + frame(body(SIZE, 2))[: SIZE // 2], frame(body(SIZE, 2))[SIZE // 2 :]],
    "empty": [frame(b"")],
    "one byte": [frame(b"x")],
    "a byte less": [frame(body(SIZE - 1))],
    "a byte more": [frame(body(SIZE + 1))],
    "a byte less and another of four less": [frame(body(SIZE - 1)) + frame(body(SIZE - 4))],
    "as many bytes, but two messages": [frame(body(SIZE // 2)) + frame(body(SIZE - 4 - SIZE // 2))],
    "many small ones": [frame(b"small") * 3000],
    "longer than what is received at once": [frame(body(300_000))],
}


@every_trigger
@pytest.mark.parametrize("pieces", ANOMALIES.values(), ids=ANOMALIES)
def test_anything_may_come_instead(make_pool, make_client, trigger, pieces):
    pool = make_pool(handler(on_message=lambda sock, data: data), framing=LengthPrefixed(4), trigger=trigger)
    client = make_client(pool)
    for _ in range(2):
        accustom(client)
        sent = pool.stats().bytes_in
        for piece in pieces:
            client.sendall(piece)
            sent += len(piece)
            wait_until(lambda sent=sent: pool.stats().bytes_in == sent)  # each is received by itself
        whole = b"".join(pieces)
        assert recv_exact(client, len(whole)) == whole


@settings(max_examples=scaled(150, minimum=10), deadline=None)
@given(
    sizes=st.lists(st.sampled_from([SIZE, SIZE, SIZE - 4, SIZE // 2, 8192, 8191, 65536, 65537, 0]), max_size=6),
    cuts=st.lists(st.integers(0, 6 * 65536), max_size=6),
)
def test_any_sizes_in_any_pieces(one_pool, sizes, cuts):
    pool, client = one_pool
    accustom(client)
    stream = b"".join(frame(body(size, number)) for number, size in enumerate(sizes))
    places = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    sent = pool.stats().bytes_in
    reader = threading.Thread(target=lambda: results.append(recv_exact(client, len(stream))))
    results = []
    reader.start()
    for begin, end in itertools.pairwise(places):
        client.sendall(stream[begin:end])
        sent += end - begin
        wait_until(lambda sent=sent: pool.stats().bytes_in >= sent)
    reader.join(patient(10))
    assert results == [stream]


@pytest.fixture(scope="module")
def one_pool():
    running = RunningPool(handler(on_message=lambda sock, data: data), framing=LengthPrefixed(4))
    with connect(running.pool) as client:
        open_sockets(running.pool, 1)  # before the test's own look at open descriptors
        yield running.pool, client
    running.stop()


def test_what_the_handler_keeps_stays_as_it_is(make_pool, make_client):
    kept = []

    def keep(sock, data):
        kept.append(data)
        hash(data)
        return data

    pool = make_pool(handler(on_message=keep), framing=LengthPrefixed(4), workers=1)
    clients = [make_client(pool) for _ in range(5)]
    for number in range(40):
        for client in clients:
            client.sendall(frame(body(SIZE, number)))
        for client in clients:
            assert recv_exact(client, SIZE + 4) == frame(body(SIZE, number))
    assert kept == [body(SIZE, number) for number in range(40) for _ in clients]
    assert [hash(data) for data in kept] == [hash(body(SIZE, number)) for number in range(40) for _ in clients]


def test_an_object_that_somebody_else_has_is_sent_as_it_is(make_pool, make_client):
    """A header may be put in front of the bytes of a reply, where their hash is, if nobody else can see that."""
    kept = []

    def twice(sock, data):
        kept.append(data)
        hash(data)
        sock.send_message(data)
        return data

    pool = make_pool(handler(on_message=twice), framing=LengthPrefixed(4), workers=1)
    client = make_client(pool)
    for number in range(USUAL):
        client.sendall(frame(body(SIZE, number)))
        assert recv_exact(client, 2 * (SIZE + 4)) == 2 * frame(body(SIZE, number))
        if number % 2:
            kept.clear()  # the reply may be the last to hold it
    assert [hash(data) for data in kept] == [hash(data[:1] + data[1:]) for data in kept]


@pytest.mark.parametrize(
    "reply",
    [
        lambda data: data[::-1],
        lambda data: b"x" * 100_000 + data,
        lambda data: b"x" + data[:8191],
    ],
    ids=["other bytes", "more", "least"],
)
def test_a_reply_may_be_another_object(make_pool, make_client, reply):
    pool = make_pool(handler(on_message=lambda sock, data: reply(data)), framing=LengthPrefixed(4), workers=1)
    client = make_client(pool)
    for number in range(USUAL):
        expected = reply(body(SIZE, number))
        client.sendall(frame(body(SIZE, number)))
        assert recv_exact(client, len(expected) + 4) == frame(expected)


def test_what_else_waits_stays_in_front(make_pool, make_client):
    def answer(sock, data):
        sock.send(b"12345678")
        return data

    pool = make_pool(handler(on_message=answer), framing=LengthPrefixed(4), workers=1)
    client = make_client(pool)
    for number in range(USUAL):
        client.sendall(frame(body(SIZE, number)))
        assert recv_exact(client, SIZE + 12) == b"12345678" + frame(body(SIZE, number))


def test_a_reply_that_the_peer_takes_late_is_whole(make_pool, make_client):
    """The kernel takes a part of what is one piece with its header."""
    pool = make_pool(handler(on_message=lambda sock, data: data), framing=LengthPrefixed(4), workers=1)
    client = make_client(pool)
    size = 60_000
    accustom(client, size)
    sender = threading.Thread(target=lambda: [client.sendall(frame(body(size, n))) for n in range(300)])
    sender.start()
    wait_until(lambda: pool.stats().bytes_queued > 0)
    for number in range(300):
        assert recv_exact(client, size + 4) == frame(body(size, number))
    sender.join(patient(10))


def test_the_object_ends_with_its_bytes(make_pool, make_client):
    """float() reads up to the zero behind them, over which the first byte of what came next has been received."""
    pool = make_pool(handler(on_message=lambda sock, data: b"%f" % float(data)), framing=LengthPrefixed(2), workers=1)
    client = make_client(pool)
    one = DIGITS.to_bytes(2, "big") + b"1" * DIGITS

    def talk(count):
        client.sendall(one * count)
        assert recv_exact(client, 5 * count) == b"\0\3inf" * count

    for _ in range(3):
        for _ in range(USUAL):
            talk(1)
        talk(2)


def test_a_reset_behind_the_next_byte_is_the_reason(make_pool, make_client):
    """What is behind a message is received at once, and may be the peer's reset."""
    got, reasons = [], []
    busy, free = threading.Event(), threading.Event()

    def on_message(sock, data):
        if data == b"block":
            busy.set()
            assert free.wait(patient(10))
            return None
        got.append(data)
        return data

    pool = make_pool(
        handler(on_message=on_message, on_disconnect=lambda sock, error: reasons.append(error)),
        framing=LengthPrefixed(4),
        workers=1,
    )
    client, other = make_client(pool), make_client(pool)
    accustom(client)
    other.sendall(frame(b"block"))
    assert busy.wait(patient(10))
    client.sendall(frame(body(SIZE)) + b"\0")
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    free.set()
    wait_until(lambda: reasons)
    assert got[USUAL:] == [body(SIZE)]
    assert isinstance(reasons[0], ConnectionResetError)


def test_connections_may_differ_in_their_sizes(make_pool, make_client):
    pool = make_pool(handler(on_message=lambda sock, data: data), framing=LengthPrefixed(4), workers=1)
    clients = {make_client(pool): size for size in (SIZE, SIZE, 8192, 9000, 20_000, 60_000, 65536, 100)}
    for number in range(60):
        for client, size in clients.items():
            client.sendall(frame(body(size, number)))
        for client, size in clients.items():
            assert recv_exact(client, size + 4) == frame(body(size, number))


def test_the_size_may_change_for_good(make_pool, make_client):
    pool = make_pool(handler(on_message=lambda sock, data: data), framing=LengthPrefixed(4), workers=1)
    client = make_client(pool)
    for size in (SIZE, 20_000, 60_000, SIZE):
        accustom(client, size)


def test_one_that_is_too_long_is_refused(make_pool, make_client):
    errors = []
    pool = make_pool(
        handler(on_message=lambda sock, data: data, on_error=lambda sock, error: errors.append(type(error))),
        framing=LengthPrefixed(4, max_message=SIZE),
    )
    client = make_client(pool)
    accustom(client)
    client.sendall((SIZE + 1).to_bytes(4, "big") + body(SIZE))
    assert recv_until_eof(client) == b""
    assert errors == [MessageTooLarge]


@pytest.mark.parametrize(
    ("framing", "stream", "messages"),
    [
        (LengthPrefixed(2), SIZE.to_bytes(2, "big") + body(SIZE), [body(SIZE)]),
        (LengthPrefixed(4, strip=False), frame(body(SIZE)), [frame(body(SIZE))]),
        (LengthPrefixed(4, "little"), SIZE.to_bytes(4, "little") + body(SIZE), [body(SIZE)]),
        (Delimited(), body(SIZE + 3) + b"\n", [body(SIZE + 3)]),
        (None, frame(body(SIZE)), None),
    ],
    ids=repr,
)
def test_the_framing_may_have_changed(make_pool, make_client, framing, stream, messages):
    got = []

    def on_message(sock, data):
        got.append(data)
        sock.send(b"k")
        if len(got) == USUAL:
            sock.framing = framing

    pool = make_pool(handler(on_message=on_message), framing=LengthPrefixed(4), workers=1)
    client = make_client(pool)
    for number in range(USUAL):
        client.sendall(frame(body(SIZE, number)))
        assert recv_exact(client, 1) == b"k"
    client.sendall(stream)
    wait_until(lambda: sum(map(len, got[USUAL:])) == len(stream if messages is None else messages[0]))
    assert got[USUAL:] == messages or (messages is None and b"".join(got[USUAL:]) == stream)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_handler_may_have_changed(make_pool, make_client, compiled):
    pool = make_pool(handler(on_message=lambda sock, data: data), framing=LengthPrefixed(4), workers=1)
    client = make_client(pool)
    accustom(client)
    (sock,) = open_sockets(pool, 1)
    sock.handler = downstream_handlers.FramedEcho() if compiled else handler(on_message=lambda sock, data: data[::-1])
    client.sendall(frame(body(SIZE)))
    assert recv_exact(client, SIZE + 4) == frame(body(SIZE) if compiled else body(SIZE)[::-1])


def test_a_transfer_may_have_been_asked_for(make_pool, make_client):
    calls = [0]

    def on_message(sock, data):
        calls[0] += 1
        if calls[0] == USUAL:
            sock.recv_data.req_len = 10
        return data

    pool = make_pool(handler(on_message=on_message), framing=LengthPrefixed(4), workers=1)
    client = make_client(pool)
    accustom(client)
    client.sendall(frame(body(SIZE)))
    assert recv_exact(client, 14) == frame(frame(body(SIZE))[:10])


@pytest.mark.parametrize("end", ["resume", "close", "stop"])
def test_a_message_may_have_to_wait(make_pool, make_client, end):
    pool = make_pool(handler(on_message=lambda sock, data: data), framing=LengthPrefixed(4), workers=1)
    client = make_client(pool)
    accustom(client)
    (sock,) = open_sockets(pool, 1)
    sock.pause()
    client.sendall(frame(body(SIZE)) * 2)
    if end == "resume":
        sock.resume()
        assert recv_exact(client, 2 * (SIZE + 4)) == frame(body(SIZE)) * 2
        accustom(client)
    elif end == "close":
        sock.close()
        recv_until_eof(client)
    # "stop": the pool ends while it waits.


COUNTED = """
import socket, sys, tstpool

SIZE = int(sys.argv[1])

class Echo(tstpool.TstHandler):
    def on_message(self, sock, data):
        return data

with tstpool.TstPool(Echo(), framing=tstpool.LengthPrefixed(4), workers=1) as pool:
    address = pool.listen("127.0.0.1", 0)
    with socket.create_connection(address, 10) as client:
        for _ in range(100):
            client.sendall(SIZE.to_bytes(4, "big") + bytes(SIZE))
            left = SIZE + 4
            while left:
                left -= len(client.recv(left))
"""


@needs_strace
@pytest.mark.parametrize(("size", "least"), [(SIZE, 60), (SHORT, 60), (1000, 0), (200_000, 0)])
def test_it_is_done_where_it_pays(tmp_path, size, least):
    """A receive of just one byte more than the message has is the sign; and its reply is one piece for the kernel."""
    lines = system_calls(tmp_path / "log", "recvfrom,sendmsg", COUNTED, size)
    found = len(re.findall(rf"recvfrom\(.*, {size + 5}, MSG_DONTWAIT, .*= {size + 4}$", lines, re.M))
    assert least <= found <= 100 * (least > 0)
    if least and not FREE_THREADED:
        assert lines.count("sendmsg(") <= 100 - found
