"""A message of 128 KiB or more whose size is known gets its bytes object as soon as its header is there, and the rest
of it is received straight into that. Nobody can tell, whatever happens in the middle of it."""

import os
import sys
import sysconfig
import tracemalloc

import pytest
from contract_helpers import handler, send_slowly
from helpers import SANITIZER, connect, recv_exact, reset, wait_until

from tstpool import Fixed, LengthPrefixed, TstHandler

SIZE = 1 << 20
FRAMING = LengthPrefixed(4, max_message=SIZE)
BODY = bytes(range(256)) * (SIZE // 256)
STREAM = SIZE.to_bytes(4, "big") + BODY
KEPT_MOST = 8 << 20  # bytes of such objects that a pool keeps for those to come


@pytest.fixture
def traced():
    """A function: bytes of Python objects that were made since the test began, and are still there."""
    if SANITIZER:
        pytest.skip("tracemalloc does not give its own memory back, which LeakSanitizer reports")
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    yield lambda: tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()


@pytest.mark.parametrize("trigger", ["level", "oneshot", "edge"])
@pytest.mark.parametrize("framing", [FRAMING, LengthPrefixed(4, max_message=SIZE, strip=False), Fixed(SIZE)], ids=repr)
def test_it_arrives_whole_however_it_is_cut(make_pool, make_client, framing, trigger):
    got = []
    pool = make_pool(
        handler(on_message=lambda sock, data: got.append(data)), framing=framing, trigger=trigger, workers=2
    )
    client = make_client(pool)
    stream = BODY if isinstance(framing, Fixed) else STREAM
    for _ in range(2):
        send_slowly(pool, client, stream)
    expected = STREAM if repr(framing).count("strip=False") else BODY
    wait_until(lambda: len(got) == 2)
    assert got == [expected] * 2


def test_messages_before_and_behind_it_keep_their_place(make_pool, make_client):
    pool = make_pool(handler(on_message=lambda sock, data: data), framing=FRAMING)
    client = make_client(pool)
    small = (3).to_bytes(4, "big") + b"abc"
    send_slowly(pool, client, small * 3 + STREAM + small)
    assert recv_exact(client, len(small) * 4 + len(STREAM)) == small * 3 + STREAM + small


@pytest.mark.parametrize("end", ["close", "reset", "stop"])
def test_an_end_in_the_middle_of_it_leaves_nothing_behind(make_pool, traced, end):
    ended = []
    pool = make_pool(
        handler(on_message=lambda sock, data: None, on_disconnect=lambda sock, reason: ended.append(reason)),
        framing=FRAMING,
    )
    for n in range(20 if end != "stop" else 1):
        client = connect(pool)
        client.sendall(STREAM[:200_000])
        wait_until(lambda n=n: pool.stats().bytes_in == 200_000 * (n + 1))
        if end == "stop":
            pool.stop()
            client.close()
        elif end == "reset":
            reset(client)
        else:
            client.close()
        wait_until(lambda n=n: len(ended) == n + 1)
    pool.stop()
    wait_until(lambda: traced() < SIZE // 2)


@pytest.mark.parametrize("framing", [FRAMING, Fixed(SIZE)], ids=repr)
def test_a_peer_that_has_sent_nothing_of_it_makes_us_hold_nothing(make_pool, make_client, traced, framing):
    """A bare header, or silence: a thousand such peers must not cost a gigabyte."""
    pool = make_pool(handler(on_message=lambda sock, data: None), framing=framing)
    clients = [make_client(pool) for _ in range(20)]
    for client in clients:
        stream = BODY if isinstance(framing, Fixed) else STREAM
        client.sendall(stream)
    wait_until(lambda: pool.stats().messages == 20)
    for client in clients:
        client.sendall(b"" if isinstance(framing, Fixed) else STREAM[:4])
    wait_until(lambda: pool.stats().bytes_in >= 20 * SIZE + (0 if isinstance(framing, Fixed) else 160))
    wait_until(lambda: traced() < KEPT_MOST + SIZE)


def test_pausing_in_the_middle_of_it(make_pool, make_client):
    got = []
    pool = make_pool(handler(on_message=lambda sock, data: got.append(data)), framing=FRAMING)
    client = make_client(pool)
    send_slowly(pool, client, STREAM, upto=300_000)
    (sock,) = pool.sockets()
    sock.pause()
    client.sendall(STREAM[300_000:310_000])
    sock.resume()
    client.sendall(STREAM[310_000:])
    wait_until(lambda: got)
    assert got == [BODY]


def test_a_handler_that_runs_in_the_middle_of_it_reads_nothing_of_it(make_pool, make_client):
    got = []

    class Curious(TstHandler):
        def on_writable(self, sock):
            got.append((sock.read(), sock.read_into(bytearray(10))))

        def on_message(self, sock, data):
            got.append(data)

    pool = make_pool(Curious(), framing=FRAMING)
    client = make_client(pool)
    send_slowly(pool, client, STREAM, upto=300_000)
    (sock,) = pool.sockets()
    pool.need_send(sock)
    wait_until(lambda: got)
    client.sendall(STREAM[300_000:])
    wait_until(lambda: len(got) == 2)
    assert got == [(b"", 0), BODY]


@pytest.mark.parametrize("then", ["handler", "framing"])
def test_what_changes_in_the_middle_of_it_counts_from_the_next_message_on(make_pool, make_client, then):
    got = []

    class First(TstHandler):
        def on_writable(self, sock):
            if then == "framing":
                sock.framing = Fixed(3)
            got.append("changed")

        def on_message(self, sock, data):
            got.append(("first", data))

    second = handler(on_message=lambda sock, data: got.append(("second", data)))
    pool = make_pool(First(), framing=FRAMING)
    client = make_client(pool)
    send_slowly(pool, client, STREAM, upto=300_000)
    (sock,) = pool.sockets()
    if then == "handler":
        sock.handler = second
    pool.need_send(sock)
    wait_until(lambda: got or then == "handler")
    client.sendall(STREAM[300_000:] + (b"abc" if then == "framing" else b"\0\0\0\3abc"))
    wait_until(lambda: len(got) >= 2)
    wait_until(lambda: got[-1][1] == b"abc")
    assert [entry for entry in got if entry != "changed"] == [
        ("first", BODY),
        ("first" if then == "framing" else "second", b"abc"),
    ]


def test_a_function_reads_it_like_any_other(make_pool, make_client):
    client = make_client(make_pool(lambda sock: sock.send_message(sock.read()) and None, framing=FRAMING))
    body = os.urandom(SIZE)
    client.sendall(SIZE.to_bytes(4, "big") + body)
    assert recv_exact(client, SIZE + 4)[4:] == body


def test_an_echo_of_it_copies_it_nowhere(make_pool, make_client, traced):
    """The very object that was received is what is sent: it is queued, not copied. When it is sent it is let go, or
    the next message is received into it."""
    counts = []

    def on_message(sock, data):
        before = sys.getrefcount(data)
        sock.send_message(data)
        counts.append(sys.getrefcount(data) - before)

    pool = make_pool(handler(on_message=on_message), framing=FRAMING, workers=1)
    client = make_client(pool)
    for _ in range(3):
        client.sendall(STREAM)
        assert recv_exact(client, len(STREAM)) == STREAM
        wait_until(lambda: traced() < SIZE * 3 // 2)
    assert counts == [1, 1, 1]  # the queue holds it
    pool.stop()
    wait_until(lambda: traced() < SIZE // 2)


def test_what_a_handler_keeps_of_it_stays_as_it_is(make_pool, make_client):
    """The next one is received into the object of the last one, but only if nobody has that any more."""
    kept, hashes = [], []

    def on_message(sock, data):
        hashes.append((hash(data), hash(bytes(bytearray(data)))))
        n = len(hashes)
        if n % 4 == 0:
            kept.append((n, data))
        elif n % 4 == 1:
            kept.append((n, memoryview(data)[10:]))
        elif n % 4 == 2:
            return data
        return n.to_bytes(4, "big")

    pool = make_pool(handler(on_message=on_message), framing=FRAMING, workers=2)
    clients = [make_client(pool) for _ in range(3)]
    sent = [b""]
    for n in range(1, 25):
        sent.append(bytes([n]) * SIZE)
        client = clients[n % 3]
        client.sendall(STREAM[:4] + sent[n])
        reply = sent[n] if n % 4 == 2 else n.to_bytes(4, "big")
        assert recv_exact(client, len(reply) + 4)[4:] == reply
    assert [n for n, _ in kept] == [n for n in range(1, 25) if n % 4 < 2]
    assert all(data == (sent[n] if n % 4 == 0 else sent[n][10:]) for n, data in kept)
    assert all(of_message == of_copy for of_message, of_copy in hashes)


def test_a_pool_keeps_a_few_of_its_objects_until_it_stops(make_pool, make_client, traced):
    """Sizes that do not come again make room for those that do; what is larger than all that may be kept is not."""
    framing = LengthPrefixed(4, max_message=KEPT_MOST * 2)
    pool = make_pool(handler(on_message=lambda sock, data: len(data).to_bytes(4, "big")), framing=framing)
    client = make_client(pool)
    for size in [*(SIZE - n for n in range(20)), KEPT_MOST + 1, SIZE - 5]:
        client.sendall(size.to_bytes(4, "big") + bytes(size))
        assert recv_exact(client, 8)[4:] == size.to_bytes(4, "big")
    least = -SIZE if sysconfig.get_config_var("Py_GIL_DISABLED") else KEPT_MOST - 2 * SIZE
    wait_until(lambda: least < traced() < KEPT_MOST + SIZE // 2)
    pool.stop()
    wait_until(lambda: traced() < SIZE // 2)
