"""B28, B38: the kernel's send buffer has room for more only when a third of it is empty, which may take a slow peer
longer than write_timeout or linger_timeout; as long as it takes something it is not cut off."""

import os
import socket
import threading
import time

import pytest
from contract_helpers import TRIGGERS, every_trigger, handler, ignore, in_threads, open_sockets, replying_once
from helpers import PATIENCE, patient, recv_exact, recv_until_eof, wait_until

from tstpool import ConnectionClosed, TstSockType, TstStat

# Where others run, a reader may be held up for a second.
LIMIT = 0.25 if PATIENCE == 1 else patient(0.5)
SEND_BUFFER = 1 << 18  # of which the peer takes far less than a third while it is slow
MUCH = bytes(range(256)) * (1 << 12)  # 1 MiB: more than that and what the peer's kernel takes
PIECE, PIECES = 1024, 75  # in three times LIMIT, so that none comes late


def slow_pool(make_pool, *args, **options):
    """A pool whose connections' send buffers do not grow."""
    pool = make_pool(*args, **{"listen": None, "workers": 2, "max_queued": None, "drain": 0, **options})
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER // 2)  # the kernel doubles it
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        pool.addsocket(listener, TstSockType.LISTEN)
    return pool


@pytest.fixture
def make_reader():
    """make_reader(pool) -> a client whose kernel takes little."""
    readers = []

    def make(pool):
        reader = socket.socket()
        readers.append(reader)
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.settimeout(patient(10))
        reader.connect(pool.addresses[0])
        return reader

    yield make
    for reader in readers:
        reader.close()


def read_slowly(readers, turns=None):
    """Each takes a piece now and then, for much longer than LIMIT. Returns what each has got; `turns`: a list for when
    each of their turns began."""
    got = [b""] * len(readers)
    for _ in range(PIECES):
        if turns is not None:
            turns.append(time.monotonic())
        for i, reader in enumerate(readers):
            got[i] += recv_exact(reader, PIECE)
        time.sleep(3 * LIMIT / PIECES)  # what makes the peer slow
    return got


def shrink_send_buffer(pool):
    """As the kernel itself does when it is short of memory: nothing is taken until most of what it has got is gone.
    Else a thread that tries again and again may send a little, where a worker would wait for the third."""
    (sock,) = open_sockets(pool, 1)
    wait_until(lambda: pool.stats().bytes_out > SEND_BUFFER // 2)
    with socket.socket(fileno=os.dup(sock.sd)) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER // 16)


def check_cut_off(took, least=LIMIT, most=LIMIT):
    """Never early, and late by no more than a busy machine makes it."""
    print(f"limit {LIMIT} s, took {took:.3f} s")
    assert took >= least
    assert took < most * 1.1 + patient(0.3)


# ------------------------------------------------------------------------------------------------ who reads


@pytest.mark.parametrize("how", ["close", "disconnect"])
def test_a_reply_before_a_close_is_read_to_its_end(make_pool, make_reader, how):
    """B28, B38: linger_timeout is without progress, with each trigger."""
    reasons = []
    hooks = replying_once(MUCH, how, reasons)
    pools = [slow_pool(make_pool, hooks, trigger=trigger, linger_timeout=LIMIT) for trigger in TRIGGERS]
    readers = [make_reader(pool) for pool in pools]
    for reader in readers:
        reader.sendall(b"go")
    begun = read_slowly(readers)
    for start, reader, pool in zip(begun, readers, pools, strict=True):
        assert start + recv_until_eof(reader) == MUCH
        reader.close()
        wait_until(lambda pool=pool: len(pool) == 0)
        assert pool.stats().linger_closed == 0
    wait_until(lambda: len(reasons) == len(pools))
    assert reasons == [None] * len(pools)


def test_a_reply_is_read_to_its_end(make_pool, make_reader):
    """B28, B38: write_timeout is for who takes none, with each trigger."""
    hooks = handler(on_message=lambda sock, data: MUCH)
    pools = [slow_pool(make_pool, hooks, trigger=trigger, write_timeout=LIMIT) for trigger in TRIGGERS]
    readers = [make_reader(pool) for pool in pools]
    for reader in readers:
        reader.sendall(b"go")
    begun = read_slowly(readers)
    for start, reader, pool in zip(begun, readers, pools, strict=True):
        assert start + recv_exact(reader, len(MUCH) - len(start)) == MUCH
        assert len(pool) == 1
        assert pool.stats().write_closed == 0


@pytest.mark.parametrize("where", ["thread", "handler"])
def test_a_flush_comes_to_its_end(make_pool, make_reader, where):
    """B28, B38: it looks at the deadline by itself."""
    flushed = threading.Event()

    def send_and_flush(sock, data=None):
        sock.send(MUCH)
        sock.flush(patient(30))
        flushed.set()

    hooks = handler(on_message=send_and_flush if where == "handler" else ignore)
    pool = slow_pool(make_pool, hooks, write_timeout=LIMIT, slow_handler=60)
    reader = make_reader(pool)
    (sock,) = open_sockets(pool, 1)

    def read():
        shrink_send_buffer(pool)
        start = read_slowly([reader])[0]
        assert not flushed.is_set()
        return start + recv_exact(reader, len(MUCH) - len(start))

    if where == "handler":
        reader.sendall(b"go")
        assert read() == MUCH
    else:
        assert in_threads(lambda: send_and_flush(sock), read)[1] == MUCH
    assert flushed.wait(patient(10))
    assert pool.stats().write_closed == 0


def test_a_send_that_waits_for_room_comes_to_its_end(make_pool, make_reader):
    """B28, B34, B38: on_overflow="block" looks at the deadline, too."""
    pool = slow_pool(
        make_pool, handler(on_message=ignore), write_timeout=LIMIT, max_queued=1 << 17, on_overflow="block"
    )
    reader = make_reader(pool)
    (sock,) = open_sockets(pool, 1)
    sent = []

    def send():
        for data in (MUCH, b"end"):  # the first is taken, as nothing waits
            sock.send(data)
            sent.append(data)

    def read():
        shrink_send_buffer(pool)
        start = read_slowly([reader])[0]
        assert len(sent) == 1
        return start + recv_exact(reader, len(MUCH) + 3 - len(start))

    assert in_threads(send, read)[1] == MUCH + b"end"
    assert pool.stats().write_closed == 0


# --------------------------------------------------------------------------------------------- who does not


@pytest.mark.parametrize("closing", [False, True], ids=["open", "closing"])
@every_trigger
def test_a_peer_that_reads_nothing_is_cut_off(make_pool, make_reader, trigger, closing):
    """B38: when the limit has passed; this was so before, too."""
    ends = []

    def on_message(sock, data):
        sock.send(MUCH)
        if closing:
            return TstStat.DISCONNECT

    def on_disconnect(sock, reason):
        ends.append((time.monotonic(), reason))

    hooks = handler(on_message=on_message, on_disconnect=on_disconnect)
    limits = {"linger_timeout" if closing else "write_timeout": LIMIT}
    pool = slow_pool(make_pool, hooks, trigger=trigger, **limits)
    begin = time.monotonic()
    make_reader(pool).sendall(b"go")
    wait_until(lambda: len(pool) == 0 and ends)
    ((ended, reason),) = ends
    check_cut_off(ended - begin)
    assert closing or isinstance(reason, TimeoutError)
    stats = pool.stats()
    assert (stats.write_closed, stats.linger_closed) == ((0, 1) if closing else (1, 0))


def test_a_peer_that_stops_reading_is_cut_off(make_pool, make_reader):
    """B38: though it had been slow before. What it has taken is looked at twice in each limit, so that it may be cut
    off half a limit early or late."""
    ends = []
    hooks = handler(
        on_message=lambda sock, data: MUCH, on_disconnect=lambda sock, reason: ends.append((time.monotonic(), reason))
    )
    pool = slow_pool(make_pool, hooks, write_timeout=LIMIT)
    reader = make_reader(pool)
    reader.sendall(b"go")
    turns = []
    read_slowly([reader], turns)
    wait_until(lambda: ends)
    ((ended, reason),) = ends
    check_cut_off(ended - turns[-1], LIMIT / 2, LIMIT * 1.5)
    assert isinstance(reason, TimeoutError)
    assert pool.stats().write_closed == 1


def test_a_flush_for_a_peer_that_reads_nothing_is_given_up(make_pool, make_reader):
    """B38: when the limit has passed; this was so before, too."""
    pool = slow_pool(make_pool, handler(on_message=ignore), write_timeout=LIMIT)
    make_reader(pool)
    (sock,) = open_sockets(pool, 1)
    begin = time.monotonic()
    sock.send(MUCH)
    with pytest.raises(ConnectionClosed):
        sock.flush(patient(10))
    check_cut_off(time.monotonic() - begin)
    assert pool.stats().write_closed == 1
