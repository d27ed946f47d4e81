"""What a peer that does not read may make the pool hold: high and low water, limits for one and for all."""

import contextlib
import errno
import select
import socket
import threading
import time

import downstream_handlers
import pytest
from contract_helpers import echo, exchange, handler, ignore, in_threads, is_open, open_sockets, round_trip
from helpers import SANITIZER, connect, patient, recv_exact, recv_until_eof, scaled, wait_until

from tstpool import ConnectionClosed, LengthPrefixed, Raw, SendQueueFull, TstPool

PIECE = bytes(range(256)) * 256
MOST = 1 << 20
every_trigger = pytest.mark.parametrize("trigger", ["level", "oneshot", "edge"])


def fill(sock, piece=PIECE, most=2000):
    """Sends until no more is taken, and the kernel takes no more either. Returns the bytes that were taken."""
    taken = 0
    for _ in range(3):
        with contextlib.suppress(SendQueueFull):
            for _ in range(most):
                assert sock.send(piece) <= MOST + len(piece)
                taken += len(piece)
            raise AssertionError("there was no limit")
        with contextlib.suppress(TimeoutError):
            sock.flush(0.02)
    with contextlib.suppress(SendQueueFull):
        while True:
            sock.send(piece)
            taken += len(piece)
    return taken


@every_trigger
def test_a_send_beyond_the_limit_raises_and_all_that_was_taken_arrives(make_pool, make_client, trigger):
    """B34: no more than max_queued and one message wait; afterwards it goes on as before."""
    pool = make_pool(handler(on_message=echo), trigger=trigger)
    client = make_client(pool)
    (sock,) = open_sockets(pool, 1)
    taken = fill(sock)
    assert 0 < pool.stats().bytes_queued <= MOST + len(PIECE)
    assert recv_exact(client, taken) == PIECE * (taken // len(PIECE))
    wait_until(lambda: pool.stats().bytes_queued == 0)
    assert round_trip(client, b"again") == b"again"


def test_one_message_may_be_larger_than_the_limit(make_pool, make_client):
    pool = make_pool(handler(on_message=ignore))
    client = make_client(pool)
    (sock,) = open_sockets(pool, 1)
    sock.send(b"x" * (16 * MOST))
    with pytest.raises(SendQueueFull):
        sock.send(b"y")
    assert recv_exact(client, 16 * MOST) == b"x" * (16 * MOST)


def test_none_is_no_limit(make_pool, make_client):
    pool = make_pool(handler(on_message=ignore), max_queued=None, max_total_queued=None)
    client = make_client(pool)
    (sock,) = open_sockets(pool, 1)
    for _ in range(500):
        sock.send(PIECE)
    assert recv_exact(client, 500 * len(PIECE)) == PIECE * 500


@every_trigger
@pytest.mark.parametrize("framing", [None, LengthPrefixed(4)])
def test_who_does_not_read_replies_is_not_read_either(make_pool, make_client, trigger, framing):
    """B34: a peer that sends and sends is held back by TCP, and gets every reply once it reads."""
    pool = make_pool(handler(on_message=lambda sock, data: data), framing=framing, trigger=trigger)
    client = make_client(pool)
    frame = (len(PIECE).to_bytes(4, "big") if framing else b"") + PIECE
    client.setblocking(False)
    sent = 0
    while select.select([], [client], [], 0.3)[1]:
        sent += client.send(frame[sent % len(frame) :])
        assert sent < 100 * MOST
    assert pool.stats().bytes_queued < 10 * len(frame)
    client.settimeout(patient(20))
    whole = sent - sent % len(frame) if framing else sent
    assert recv_exact(client, whole) == (frame * (sent // len(frame) + 1))[:whole]
    wait_until(lambda: pool.stats().bytes_queued == 0)


def test_without_auto_pause_the_handler_goes_on(make_pool, make_client):
    calls = []

    def answer(sock, data):
        calls.append(data)
        sock.send(b"z" * 400_000)

    pool = make_pool(handler(on_message=answer), auto_pause=False, max_queued=None, framing=LengthPrefixed(1))
    client = make_client(pool)
    client.sendall(b"\1a" * 100)
    wait_until(lambda: len(calls) == 100)
    recv_exact(client, 100 * 400_000)


@every_trigger
@pytest.mark.parametrize("auto_pause", [True, False])
def test_on_writable_is_called_when_little_waits(make_pool, make_client, trigger, auto_pause):
    """A handler that stops at high water goes on by itself: 64 MiB to a reader, no more than some of it waiting."""
    size, sent, most = scaled(64, minimum=16) * MOST, [0], [0]

    def send_more(sock):
        queued = 0
        while queued <= 65536 and sent[0] < size:
            queued = sock.send(PIECE)
            sent[0] += len(PIECE)
        most[0] = max(most[0], queued)

    hooks = handler(on_message=lambda sock, data: send_more(sock), on_writable=send_more)
    pool = make_pool(hooks, trigger=trigger, auto_pause=auto_pause)
    client = make_client(pool)
    client.sendall(b"go")
    assert len(recv_exact(client, size)) == size
    assert most[0] <= 65536 + len(PIECE)


def test_on_writable_is_not_called_for_what_never_reached_high_water(make_pool, make_client):
    calls = []
    pool = make_pool(handler(on_message=echo, on_writable=calls.append))
    client = make_client(pool)
    for n in (1, 60_000, 10):
        data = b"m" * n
        client.sendall(data)
        assert recv_exact(client, n) == data
    assert not calls


def test_block_waits_for_the_peer(make_pool, make_client):
    """on_overflow="block": a thread is as fast as the peer that reads, and finds out when it goes."""
    pool = make_pool(handler(on_message=ignore), on_overflow="block")
    client = make_client(pool)
    (sock,) = open_sockets(pool, 1)
    done = threading.Event()

    def send_all():
        for _ in range(300):
            sock.send(PIECE)
        done.set()

    def read_all():
        time.sleep(0.1)  # long enough for a sender that does not wait to be through
        assert not done.is_set()
        assert pool.stats().bytes_queued <= MOST + len(PIECE)
        assert recv_exact(client, 300 * len(PIECE)) == PIECE * 300

    in_threads(send_all, read_all)

    def find_out():
        with pytest.raises(ConnectionClosed):
            while True:
                sock.send(PIECE)

    def leave():
        # Only for a moment all of MOST: what the kernel still takes afterwards is not enough to go on.
        wait_until(lambda: pool.stats().bytes_queued >= MOST // 2)
        client.close()

    in_threads(find_out, leave)


def test_block_never_blocks_the_sockets_own_handler(make_pool, make_client):
    errors = []
    pool = make_pool(
        handler(
            on_message=lambda sock, data: fill(sock) and sock.send(PIECE),
            on_error=lambda sock, error: errors.append(type(error)),
        ),
        on_overflow="block",
        workers=1,
    )
    make_client(pool).sendall(b"go")
    wait_until(lambda: errors == [SendQueueFull])


def test_close_ends_the_connection(make_pool, make_client):
    """on_overflow="close": counted, one disconnect with its reason, a reset for the peer."""
    reasons = []
    pool = make_pool(
        handler(on_message=ignore, on_disconnect=lambda sock, reason: reasons.append(reason)), on_overflow="close"
    )
    client = make_client(pool)
    other = make_client(pool)
    sock = next(sock for sock in open_sockets(pool, 2) if sock.peer == client.getsockname())
    with pytest.raises(ConnectionClosed):
        while True:
            sock.send(PIECE)
    wait_until(lambda: reasons)
    assert [reason.errno for reason in reasons] == [errno.ENOBUFS]
    wait_until(lambda: len(pool) == 1)
    stats = pool.stats()
    assert (stats.overflow_closed, stats.bytes_queued) == (1, 0)
    with pytest.raises(ConnectionResetError):
        recv_until_eof(client)
    assert is_open(other)
    assert len(pool) == 1


def test_a_broadcast_leaves_out_who_has_too_much(make_pool, make_client):
    pool = make_pool(handler(on_message=ignore))
    deaf, good = make_client(pool), make_client(pool)
    sock = next(sock for sock in open_sockets(pool, 2) if sock.peer == deaf.getsockname())
    wait_until(lambda: fill(sock) == 0 and pool.broadcast(b"news") == 1)  # the kernel takes more after a while
    assert recv_exact(good, 4) == b"news"


def test_compiled_handlers_are_told_that_no_more_is_taken(make_pool, make_client):
    pool = make_pool(downstream_handlers.Echo())
    client = make_client(pool)
    (sock,) = open_sockets(pool, 1)
    taken = [0]

    def refused():
        taken[0] += fill(sock)
        result = downstream_handlers.send(sock, b"x")
        taken[0] += result >= 0
        return result == -errno.ENOBUFS

    wait_until(refused)  # the kernel takes more after a while
    assert len(recv_exact(client, taken[0])) == taken[0]
    wait_until(lambda: downstream_handlers.send(sock, b"x") >= 0)
    assert exchange(client, b"x")[:1] == b"x"


@pytest.mark.parametrize(("number", "total"), [(40, 4 << 20), pytest.param(5000, 64 << 20, marks=pytest.mark.slow)])
def test_all_connections_together_have_a_limit(make_pool, number, total):
    """B35: whoever has output waiting gets no more once max_total_queued is reached; the others are served."""
    pool = make_pool(handler(on_message=echo), max_total_queued=total)
    peers = [connect(pool) for _ in range(number)]
    try:
        sockets = open_sockets(pool, number)

        def full():
            for sock in sockets:
                fill(sock)
            queued = pool.stats().bytes_queued
            assert queued <= total + number * (65536 + len(PIECE))
            return queued >= total - len(PIECE)

        wait_until(full)  # the kernel takes more after a while
        with connect(pool) as good:
            assert round_trip(good, b"served") == b"served"
    finally:
        for peer in peers:
            peer.close()
    wait_until(lambda: pool.stats().bytes_queued == 0 and len(pool) == 0)


def gathered(pool, stack, number):
    """So many clients, and the pool's sockets for them, which have nothing to send yet."""
    peers = [stack.enter_context(connect(pool)) for _ in range(number)]
    return peers, open_sockets(pool, number)


@pytest.mark.parametrize("way", ["send", "reply"])
def test_first_messages_count_too(make_pool, way):
    """B35: peers that ask for a lot, once, and do not read: what is taken stays below max_total_queued, and whoever
    is beyond it hears so; small replies are still given."""
    total = 64 << 20
    much = bytes(32 << 20)  # of which the kernel takes some
    refused = []

    def on_message(sock, data):
        answer = much if data == b"much" else data
        if way == "reply":
            return answer
        sock.send(answer)

    def on_error(sock, error):
        refused.append(type(error))

    pool = make_pool(handler(on_message=on_message, on_error=on_error), max_total_queued=total, workers=2, shards=2)
    with contextlib.ExitStack() as stack:
        peers, _ = gathered(pool, stack, 40)
        for peer in peers:
            peer.sendall(b"much")
        wait_until(lambda: pool.stats().messages == 40)
        assert 0 < pool.stats().bytes_queued <= total + len(much)  # two workers may ask at the same moment
        assert len(refused) >= 30 and set(refused) == {SendQueueFull}
        with connect(pool) as good:
            assert round_trip(good, b"served") == b"served"
    wait_until(lambda: pool.stats().bytes_queued == 0 and len(pool) == 0)


def test_a_message_above_the_total_is_sent_alone(make_pool):
    """B35: as long as nothing else waits, for it could never be sent otherwise."""
    pool = make_pool(handler(on_message=ignore), max_total_queued=1 << 20)
    data = bytes(16 << 20)
    with contextlib.ExitStack() as stack:
        (first, second), (one, other) = gathered(pool, stack, 2)
        if one.peer != first.getsockname():
            one, other = other, one
        one.send(data)
        wait_until(lambda: pool.stats().bytes_queued)
        with pytest.raises(SendQueueFull):
            other.send(data)
        assert recv_exact(first, len(data)) == data
        wait_until(lambda: pool.stats().bytes_queued == 0)
        other.send(data)
        assert recv_exact(second, len(data)) == data


def test_a_broadcast_is_for_all_whatever_its_size(make_pool):
    """B35: its bytes are there once, however many queues hold them; whoever has something waiting is left out."""
    pool = make_pool(handler(on_message=ignore), max_total_queued=4 << 20)
    data = bytes(8 << 20)
    with contextlib.ExitStack() as stack:
        peers, _ = gathered(pool, stack, 10)
        assert pool.broadcast(data) == 10
        wait_until(lambda: pool.stats().bytes_queued > 4 << 20)
        assert pool.broadcast(data) == 0
        for peer in peers:
            assert recv_exact(peer, len(data)) == data


def test_block_sleeps_while_others_have_too_much(make_pool):
    """B34, B35: on_overflow="block": it is not this connection's peer that it waits for. It costs no processor time."""
    pool = make_pool(handler(on_message=ignore), max_total_queued=1 << 20, on_overflow="block", max_queued=None)
    data = bytes(16 << 20)
    done = threading.Event()
    with contextlib.ExitStack() as stack:
        (first, second), (one, other) = gathered(pool, stack, 2)
        if one.peer != first.getsockname():
            one, other = other, one
        one.send(data)
        wait_until(lambda: pool.stats().bytes_queued)

        def send():
            other.send(data)
            done.set()

        def read():
            wait_until(lambda: pool.stats().overflow_refused)  # the other thread waits
            before = time.process_time()
            assert not done.wait(1)  # a window to measure in, not a wait
            assert time.process_time() - before < (0.6 if SANITIZER else 0.3)
            assert recv_exact(first, len(data)) == data
            assert recv_exact(second, len(data)) == data

        in_threads(send, read)
    assert done.is_set()
    assert pool.stats().overflow_refused == 1  # a message that waits, however often it is tried


def test_what_makes_no_sense_is_refused():
    for options in (
        {"high_water": 10, "low_water": 11},
        {"high_water": 10, "low_water": 5, "max_queued": 9},
        {"high_water": -1},
        {"on_overflow": "panic"},
        {"max_total_queued": -1},
        {"max_total_queued": 0},  # None is: no limit
        {"high_water": 0, "low_water": 0, "max_queued": 0},
    ):
        with pytest.raises(ValueError):
            TstPool(**options)


@every_trigger
@pytest.mark.parametrize("size", [100, 200_000])
def test_requests_before_a_half_close_are_all_answered(make_pool, make_client, trigger, size):
    """They wait for their replies' turn when the peer's end is seen; it reads late, and gets every reply."""
    pool = make_pool(
        handler(on_message=lambda sock, data: data[:1] * 200_000), framing=LengthPrefixed(4), trigger=trigger
    )
    client = make_client(pool)
    requests = [bytes([65 + n % 26]) * size for n in range(100)]
    sender = threading.Thread(
        target=lambda: (
            [client.sendall(len(request).to_bytes(4, "big") + request) for request in requests]
            and client.shutdown(socket.SHUT_WR)
        )
    )
    sender.start()
    wait_until(lambda: pool.stats().bytes_queued > 16384)  # what waited above high water may have fallen, to low water
    for request in requests:
        assert recv_exact(client, 200_004) == (200_000).to_bytes(4, "big") + request[:1] * 200_000
    assert recv_until_eof(client) == b""
    sender.join(10)


def test_who_has_read_nearly_all_of_a_reply_counts_with_all_that_it_holds(make_pool, make_client):
    """B35: the rest of a large reply keeps the whole of it in memory, so the whole of it is in max_total_queued."""
    size, got = 32 << 20, 0
    pool = make_pool(handler(on_message=lambda sock, data: bytes(size)), framing=Raw(), max_total_queued=3 * size)
    client = make_client(pool)
    client.sendall(b"x")
    held = wait_until(lambda: pool.stats().bytes_queued)
    assert size <= held < size + 100
    (sock,) = open_sockets(pool, 1)
    while got < size - (1 << 20):
        got += len(recv_exact(client, 500_000))
        assert pool.stats().bytes_queued in (held, 0)  # 0: the kernel has all of it now
    recv_exact(client, size - got)
    wait_until(lambda: pool.stats().bytes_queued == 0)
    assert sock.send(b"x") == 1


def test_what_is_refused_is_counted(make_pool, make_client):
    """B34: stats().overflow_refused: a send that raises, a compiled one, and a broadcast that leaves the connection
    out; but nothing that is taken."""
    pool = make_pool(handler(on_message=ignore), max_queued=100_000, high_water=50_000)
    client = make_client(pool)
    (sock,) = open_sockets(pool, 1)
    taken = 0
    with pytest.raises(SendQueueFull):
        while sock.send(PIECE):
            taken += len(PIECE)
    assert pool.stats().overflow_refused == 1
    while (result := downstream_handlers.send(sock, PIECE)) > 0:  # the kernel may have taken more meanwhile
        taken += len(PIECE)
    assert result == -errno.ENOBUFS
    assert pool.stats().overflow_refused == 2
    while pool.broadcast(PIECE):
        taken += len(PIECE)
    assert pool.stats().overflow_refused == 3
    assert recv_exact(client, taken) == PIECE * (taken // len(PIECE))
    assert sock.send(b"x")
    assert pool.stats().overflow_refused == 3
    pool.stop()
    pool.start()
    assert pool.stats().overflow_refused == 0
