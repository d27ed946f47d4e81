"""B37, B38: message_timeout is for each message, also where the server sends more than high_water now and then."""

import contextlib
import socket
import threading
import time

import pytest
from contract_helpers import every_trigger, handler, open_sockets
from helpers import PATIENCE, patient, recv_exact, wait_until

from tstpool import Delimited, Fixed, LengthPrefixed

LIMIT = patient(0.3 if PATIENCE == 1 else 0.5)  # on a busy machine nobody is to be held up for so long
PUSH = bytes(100_000)  # more than high_water
MUCH = bytes(16 << 20)  # more than the socket buffers of a loopback connection hold

auto_pause_or_not = pytest.mark.parametrize("auto_pause", [True, False], ids=["auto_pause", "no auto_pause"])


class Ends:
    """When each connection ended, and why."""

    def __init__(self):
        self.ends = []
        self.messages = []
        self.handler = handler(on_message=self.on_message, on_disconnect=self.on_disconnect)

    def on_message(self, sock, data):
        self.messages.append(bytes(data))

    def on_disconnect(self, sock, reason):
        self.ends.append((time.monotonic(), reason))

    def check(self, begin, least=LIMIT, slack=0.0):
        """One, never early, and late by no more than a busy machine makes it."""
        wait_until(lambda: self.ends, 5, "its time is over, but it is not closed")
        ((ended, reason),) = self.ends
        took = ended - begin
        print(f"at least {least:.3f} s, took {took:.3f} s")
        assert isinstance(reason, TimeoutError)
        assert least <= took < least * 1.1 + slack + LIMIT


@contextlib.contextmanager
def pushing(pool, pause):
    """Broadcasts to all that are there, again and again."""
    stop = threading.Event()

    def push():
        while not stop.is_set():
            pool.broadcast(PUSH)
            stop.wait(pause)

    thread = threading.Thread(target=push)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def reading(client):
    """All that comes, until the connection ends."""

    def read():
        with contextlib.suppress(OSError):
            while client.recv(1 << 18):
                pass

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        thread.join()


@pytest.mark.parametrize(
    ("framing", "first"),
    [(Delimited(b"\n"), b"x"), (LengthPrefixed(4), b"\0"), (LengthPrefixed(4), b"\0\0\0\2x"), (Fixed(2), b"x")],
    ids=["delimited", "a byte of its length", "length", "fixed"],
)
@auto_pause_or_not
def test_a_message_that_stays_unfinished(make_pool, make_client, framing, first, auto_pause):
    """B38: the peer reads all that it is sent, and that is no excuse."""
    ends = Ends()
    pool = make_pool(ends.handler, framing=framing, workers=2, message_timeout=LIMIT, auto_pause=auto_pause)
    client = make_client(pool)
    open_sockets(pool, 1)
    with reading(client), pushing(pool, LIMIT / 4):
        begin = time.monotonic()
        client.sendall(first)
        ends.check(begin)
    assert pool.stats().message_closed == 1
    assert pool.stats().bytes_out >= 2 * len(PUSH)
    assert ends.messages == []


@auto_pause_or_not
@every_trigger
def test_with_every_trigger(make_pool, make_client, trigger, auto_pause):
    """B37, B38: and a byte now and then does not help, either."""
    ends = Ends()
    pool = make_pool(
        ends.handler, framing=Delimited(b"\n"), trigger=trigger, message_timeout=LIMIT, auto_pause=auto_pause, workers=2
    )
    client = make_client(pool)
    open_sockets(pool, 1)
    with reading(client), pushing(pool, LIMIT / 4):
        begin = time.monotonic()
        with contextlib.suppress(OSError):
            for _ in range(12):
                client.sendall(b"x")
                time.sleep(LIMIT / 10)  # what makes the peer slow
        ends.check(begin)
    assert pool.stats().message_closed == 1


def test_the_time_in_which_it_could_not_be_read_is_added(make_pool, make_client):
    """B34, B38: while its own output is over high_water its messages wait, so nobody can blame it; this was so before,
    too, when it got all of its time anew."""
    ends = Ends()
    pool = make_pool(ends.handler, framing=Delimited(b"\n"), message_timeout=LIMIT, max_queued=None, workers=2)
    client = make_client(pool)
    open_sockets(pool, 1)
    begin = time.monotonic()
    client.sendall(b"x")
    wait_until(lambda: pool.stats().bytes_in == 1)
    pool.broadcast(MUCH)
    with contextlib.suppress(AssertionError):
        wait_until(lambda: ends.ends, 2 * LIMIT / patient(1))
    assert not ends.ends
    assert recv_exact(client, len(MUCH)) == MUCH
    ends.check(begin, LIMIT + 2 * LIMIT, slack=time.monotonic() - begin - 2 * LIMIT)
    assert pool.stats().message_closed == 1


def test_a_message_that_comes_in_time_is_handed_out(make_pool, make_client):
    """B34: this was so before, too."""
    ends, limit = Ends(), 2 * LIMIT
    pool = make_pool(ends.handler, framing=Delimited(b"\n"), message_timeout=limit, workers=2)
    client = make_client(pool)
    open_sockets(pool, 1)
    with reading(client), pushing(pool, LIMIT / 10):
        for i in range(8):  # all of them together take longer than one may
            for piece in (b"mess", b"age\n"):
                client.sendall(piece)
                time.sleep(limit / 12)  # what makes the peer slow
            wait_until(lambda i=i: len(ends.messages) == i + 1)
        assert not ends.ends
        client.shutdown(socket.SHUT_RDWR)
