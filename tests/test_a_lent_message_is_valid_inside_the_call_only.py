"""copy=False: on_message gets a view of the message where it was received. Whatever the handler keeps of it either
raises when it is used, or still holds the message's own bytes: never freed memory, never another message's."""

import array
import gc
import pickle
import threading
import time
from collections import deque

import pytest
from contract_helpers import handler
from helpers import recv_exact, scaled, wait_until

from tstpool import Delimited, Fixed, LengthPrefixed, TstHandler, TstStat

FRAMINGS = [None, LengthPrefixed(4, max_message=1 << 21), Delimited(b"\r\n", max_message=1 << 21)]


def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


def frame(framing, body):
    if framing is None:
        return body
    if isinstance(framing, Delimited):
        return body + b"\r\n"
    return len(body).to_bytes(4, "big") + body


def round_trip(client, framing, body):
    stream = frame(framing, body)
    sender = threading.Thread(target=client.sendall, args=(stream,))
    sender.start()
    try:
        assert recv_exact(client, len(stream)) == stream
    finally:
        sender.join()


@pytest.mark.parametrize("framing", FRAMINGS, ids=repr)
def test_it_is_a_read_only_view_of_the_message(make_pool, make_client, framing):
    seen = []

    def on_message(sock, data):
        seen.append((type(data), data.readonly, data.format, data.ndim))
        return bytes(data)

    client = make_client(make_pool(handler(on_message=on_message), framing=framing, copy=False))
    for body in (b"x", b"hello", bytes(range(256)).replace(b"\r\n", b"--")):
        round_trip(client, framing, body)
    assert set(seen) == {(memoryview, True, "B", 1)}


@pytest.mark.parametrize("framing", FRAMINGS, ids=repr)
@pytest.mark.parametrize("size", [5, 70_000, 1 << 20])
def test_it_is_released_after_the_call(make_pool, make_client, framing, size):
    kept = []

    def on_message(sock, data):
        kept.append(data)
        sock.send_message(bytes(data))

    client = make_client(make_pool(handler(on_message=on_message), framing=framing, copy=False))
    round_trip(client, framing, b"x" * size)
    round_trip(client, framing, b"y")
    round_trip(client, framing, b"z")
    with pytest.raises(ValueError, match="released"):
        bytes(kept[0])


@pytest.mark.parametrize("framing", FRAMINGS[1:], ids=repr)
@pytest.mark.parametrize("size", [10, 1_000, 70_000, 300_000, 1 << 20])
def test_a_slice_that_is_kept_stays_as_it_was(make_pool, make_client, framing, size):
    """Its memory is not received into again, whether it was the scratch buffer, the connection's or the message's."""
    kept = []

    def on_message(sock, data):
        kept.append((data[1:-1], bytes(data[1:-1])))
        return bytes(data)

    pool = make_pool(handler(on_message=on_message), framing=framing, copy=False)
    clients = [make_client(pool) for _ in range(2)]
    rounds = scaled(20, minimum=5)
    for n in range(rounds):
        for client in clients:
            round_trip(client, framing, bytes([65 + n]) * size)
    assert len(kept) == 2 * rounds
    for view, copy in kept:
        assert bytes(view) == copy
    pool.stop()
    gc.collect()
    for view, copy in kept:
        assert bytes(view) == copy


def test_an_array_over_it_keeps_the_view_from_being_released(make_pool, make_client):
    """view.release() is refused then; the buffer stays valid instead."""
    kept = []

    def on_message(sock, data):
        kept.append(memoryview(data).cast("H"))
        return bytes(data)

    client = make_client(make_pool(handler(on_message=on_message), framing=Fixed(8), copy=False))
    for n in range(10):
        client.sendall(bytes([n, 0]) * 4)
        recv_exact(client, 8)
    assert [list(view) for view in kept] == [array.array("H", [n] * 4).tolist() for n in range(10)]


def test_what_was_kept_gives_its_memory_back(make_pool, make_client):
    """Hundreds of kept messages in a row, let go again: the process does not hold a receive buffer for each."""
    last = []

    def on_message(sock, data):
        last[:] = [data[:4]]
        return bytes(data)

    client = make_client(make_pool(handler(on_message=on_message), framing=LengthPrefixed(4), copy=False, workers=1))

    for _ in range(50):
        round_trip(client, FRAMINGS[1], b"x" * 5_000)
    before = resident()
    for _ in range(scaled(500, minimum=100)):
        round_trip(client, FRAMINGS[1], b"x" * 5_000)
    assert resident() - before < 20_000_000


def test_many_messages_of_one_read_are_lent_one_after_another(make_pool, make_client):
    bodies = [b"%d" % n for n in range(2_000)]
    client = make_client(make_pool(handler(on_message=lambda sock, data: bytes(data)), framing=FRAMINGS[1], copy=False))
    stream = b"".join(frame(FRAMINGS[1], body) for body in bodies)
    client.sendall(stream)
    assert recv_exact(client, len(stream)) == stream


def test_reading_in_the_call_gets_nothing(make_pool, make_client):
    """The message is lent already, and what follows belongs to the next one."""
    seen = []

    def on_message(sock, data):
        seen.append((bytes(data), sock.read(), sock.read_into(bytearray(10))))
        return b"ok"

    for framing in (None, Fixed(3)):
        client = make_client(make_pool(handler(on_message=on_message), framing=framing, copy=False))
        client.sendall(b"abc")
        recv_exact(client, 2) if framing is None else wait_until(lambda: len(seen) == 2)
    assert seen == [(b"abc", b"", 0)] * 2


def test_a_transfer_is_lent_too(make_pool, make_client):
    """req_len in recv_data: a view of that region, released after the call; the buffer may be resized then."""
    kept = []

    class Transfers(TstHandler):
        def on_connect(self, sock):
            sock.recv_data.req_len = 5

        def on_message(self, sock, data):
            kept.append((data, bytes(data)))
            sock.send(bytes(data))
            if len(kept) == 2:
                sock.recv_data.req_len = 0

    pool = make_pool(Transfers(), copy=False)
    client = make_client(pool)
    client.sendall(b"hello")
    assert recv_exact(client, 5) == b"hello"
    client.sendall(b"world")
    assert recv_exact(client, 5) == b"world"
    client.sendall(b"!")
    assert recv_exact(client, 1) == b"!"
    assert [copy for _, copy in kept] == [b"hello", b"world", b"!"]
    with pytest.raises(ValueError, match="released"):
        bytes(kept[0][0])
    (sock,) = pool.sockets()
    sock.recv_data.resize(100)


@pytest.mark.parametrize("pools", ["object", "function"])
@pytest.mark.parametrize("size", [5, 1 << 20])
def test_a_message_may_be_passed_on(make_pool, make_client, pools, size):
    """TstStat.RUN from a socket's own handler: the pool's sees the same message."""

    class Own(TstHandler):
        def on_message(self, sock, data):
            assert len(data) == size
            return TstStat.RUN

    own = Own()

    def read_and_send(sock):
        sock.send_message(sock.read())

    class Object(TstHandler):
        def on_message(self, sock, data):
            return bytes(data)

    pool = make_pool(Object() if pools == "object" else read_and_send, framing=FRAMINGS[1], copy=False)
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    sock.handler = own
    round_trip(client, FRAMINGS[1], b"x" * size)
    round_trip(client, FRAMINGS[1], b"y" * size)


def test_an_exception_in_the_call_takes_the_view_back(make_pool, make_client):
    kept, errors = [], []

    class Raises(TstHandler):
        def on_message(self, sock, data):
            kept.append(data)
            raise RuntimeError("no")

        def on_error(self, sock, exc):
            errors.append(str(exc))
            return TstStat.SUSPEND

    client = make_client(make_pool(Raises(), framing=Fixed(4), copy=False))
    client.sendall(b"abcdefgh")
    wait_until(lambda: len(errors) == 2)
    client.sendall(b"1234")
    wait_until(lambda: len(errors) == 3)
    with pytest.raises(ValueError, match="released"):
        bytes(kept[0])


def test_what_is_behind_the_view_lends_nothing_after_the_call(make_pool, make_client):
    """view.obj is an object of the engine's: it makes no second view of memory that is used again."""
    kept = []

    def on_message(sock, data):
        kept.append(data.obj)
        return bytes(memoryview(data.obj))

    client = make_client(make_pool(handler(on_message=on_message), framing=Fixed(4), copy=False))
    client.sendall(b"abcd")
    assert recv_exact(client, 4) == b"abcd"
    with pytest.raises(BufferError, match="gone"):
        memoryview(kept[0])
    with pytest.raises(TypeError):
        type(kept[0])()


def test_another_thread_takes_a_view_while_the_handler_returns(make_pool, make_client):
    """It gets one, which then stays as it was, or a BufferError; never memory that is received into again."""
    lent = deque(maxlen=1)
    torn = []
    over = threading.Event()

    def on_message(sock, data):
        lent.append((data.obj, data[0], data[1:]))
        return bytes(data)

    def take():
        while not over.is_set():
            try:
                obj, first, part = lent.pop()
                view = memoryview(obj)
            except (IndexError, BufferError):
                time.sleep(1e-5)  # who only tries again keeps the GIL from the rest for milliseconds at a time
                continue
            time.sleep(1e-5)  # the next message arrives
            if bytes(view) != bytes([first]) * len(view) or bytes(part) != bytes(view[1:]):
                torn.append((first, bytes(view), bytes(part)))
            del view, part

    pool = make_pool(handler(on_message=on_message), framing=Fixed(64), copy=False)
    clients = [make_client(pool) for _ in range(2)]
    takers = [threading.Thread(target=take) for _ in range(2)]
    for thread in takers:
        thread.start()
    try:
        for n in range(scaled(5_000, minimum=300)):
            for client in clients:
                client.sendall(bytes([n % 251]) * 64)
            for client in clients:
                recv_exact(client, 64)
    finally:
        over.set()
        for thread in takers:
            thread.join()
    assert not torn


def test_a_view_that_another_object_holds_stays_valid(make_pool, make_client):
    """It can't be released then, so the memory is the holder's."""
    kept = []

    def on_message(sock, data):
        kept.append(pickle.PickleBuffer(data))
        return bytes(data)

    client = make_client(make_pool(handler(on_message=on_message), framing=Fixed(4), copy=False))
    for n in range(10):
        client.sendall(bytes([n]) * 4)
        recv_exact(client, 4)
    assert [bytes(memoryview(buffer)) for buffer in kept] == [bytes([n]) * 4 for n in range(10)]


def test_a_message_for_nobody_is_dropped(make_pool, make_client):
    """A handler without on_message."""
    ended = []
    pool = make_pool(handler(on_disconnect=lambda sock, reason: ended.append(reason)), framing=Fixed(4), copy=False)
    client = make_client(pool)
    client.sendall(b"abcdefgh")
    client.close()
    wait_until(lambda: ended)
    assert ended == [None]


def test_slices_of_many_small_messages_keep_little(make_pool, make_client):
    """One of each is kept: that takes what they hold, not what lay behind them, nor the time to copy that."""
    kept = []

    def on_message(sock, data):
        kept.append(data[:1])

    n = 30_000
    pool = make_pool(handler(on_message=on_message), framing=Fixed(8), copy=False, workers=1, receive_size=1 << 20)
    client = make_client(pool)
    before = resident()
    client.sendall(b"".join(b"%08d" % i for i in range(n)))
    wait_until(lambda: len(kept) == n, 20)
    assert resident() - before < 64 << 20
    assert b"".join(bytes(each) for each in kept) == b"".join((b"%08d" % i)[:1] for i in range(n))
