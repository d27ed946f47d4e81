"""B13, B18: a handler that sends more whenever it may, to a peer that reads all of it, hears what the peer says."""

import contextlib
import socket
import threading

import pytest
from contract_helpers import every_trigger, handler, message
from helpers import wait_until

from tstpool import EPOLLIN, EPOLLOUT, Fixed, LengthPrefixed, TstStat

CHUNK = bytes(100_000)  # more than high_water

framings = pytest.mark.parametrize("framing", [None, LengthPrefixed(2)], ids=["unframed", "framed"])


class Reader:
    """A peer that reads all, on a thread of its own, until its connection ends."""

    def __init__(self, client):
        self.client = client
        self.received = 0
        self.ended = None
        self.thread = threading.Thread(target=self.run)

    def run(self):
        try:
            while data := self.client.recv(1 << 18):
                self.received += len(data)
            self.ended = "end"
        except OSError as error:
            self.ended = error

    def wait_for(self, size):
        goal = self.received + size
        wait_until(lambda: self.received > goal or self.ended)
        assert self.ended is None

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exc_info):
        with contextlib.suppress(OSError):
            self.client.shutdown(socket.SHUT_RDWR)
        self.thread.join()


class Streams:
    """Hooks of a server that sends without end until its peer says STOP. need_send: it asks for the next call each time
    and sends little; else it waits to be told that its output has gone, which is much."""

    def __init__(self, need_send, disconnects=True):
        self.need_send, self.disconnects = need_send, disconnects
        self.pool = None
        self.heard, self.reasons = [], []
        self.stopped = False

    def on_connect(self, sock):
        self.more(sock)

    def on_writable(self, sock):
        self.more(sock)

    def on_message(self, sock, data):
        self.heard.append(bytes(data))
        if data == b"STOP":
            self.stopped = True
            return TstStat.DISCONNECT if self.disconnects else None

    def on_disconnect(self, sock, reason):
        self.reasons.append(reason)

    def more(self, sock):
        if self.stopped:
            return
        sock.send(b"tick\n" if self.need_send else CHUNK)
        if self.need_send:
            self.pool.need_send(sock)

    def start(self, make_pool, **options):
        names = ("on_connect", "on_writable", "on_message", "on_disconnect")
        hooks = handler(**{name: getattr(self, name) for name in names})
        self.pool = make_pool(hooks, workers=2, start=False, drain=0, **options)
        self.pool.start()
        return self.pool

    def check_stopped(self, reader):
        """It has heard what was said, and nothing else; both ends have a clean end."""
        wait_until(lambda: self.stopped, 5, lambda: f"heard {self.heard}, while {reader.received} bytes were read")
        wait_until(lambda: self.reasons and reader.ended)
        assert self.heard == [b"more", b"STOP"]
        assert self.reasons == [None]
        assert reader.ended == "end"


def check_that_it_stops(streams, client, framing, half_closes=False):
    """The peer speaks twice, while it gets ever more."""
    prefix = b"" if framing is None else b"\0\4"
    with Reader(client) as reader:
        reader.wait_for(1000)
        client.sendall(prefix + b"more")
        wait_until(lambda: streams.heard, 5, lambda: f"nothing was heard, while {reader.received} bytes were read")
        reader.wait_for(1000)
        client.sendall(prefix + b"STOP")
        if half_closes:
            client.shutdown(socket.SHUT_WR)
        streams.check_stopped(reader)


@framings
@every_trigger
def test_of_one_that_sends_more_when_its_output_has_gone(make_pool, make_client, trigger, framing):
    """B13: each time it is over high_water and below it again, before anything is received."""
    streams = Streams(need_send=False)
    pool = streams.start(make_pool, trigger=trigger, framing=framing)
    check_that_it_stops(streams, make_client(pool), framing)


@framings
@every_trigger
def test_of_one_that_asks_to_be_called_again(make_pool, make_client, trigger, framing):
    """B13: need_send() in on_writable, so that it is called all the time."""
    streams = Streams(need_send=True)
    pool = streams.start(make_pool, trigger=trigger, framing=framing)
    check_that_it_stops(streams, make_client(pool), framing)


@pytest.mark.parametrize("need_send", [False, True], ids=["refills", "need_send"])
@every_trigger
def test_of_a_peer_that_then_closes_its_side(make_pool, make_client, trigger, need_send):
    """B18: the end comes behind what it said, and what the handler had sent by then arrives."""
    streams = Streams(need_send, disconnects=False)
    pool = streams.start(make_pool, trigger=trigger)
    check_that_it_stops(streams, make_client(pool), None, half_closes=True)


@pytest.mark.parametrize("auto_pause", [False, True], ids=["no auto_pause", "auto_pause"])
@every_trigger
def test_of_a_function_that_asks_to_be_called_again(make_pool, make_client, trigger, auto_pause):
    """B13: one function for both directions."""
    heard = []

    def function(sock):
        if sock.events & EPOLLIN:
            heard.append(message(sock))
            if heard[-1] == b"STOP":
                return TstStat.DISCONNECT
        if sock.events & EPOLLOUT:
            sock.send(b"tick\n")
        pool.need_send(sock)

    pool = make_pool(function, trigger=trigger, workers=2, drain=0, auto_pause=auto_pause, start=False)
    pool.start()
    client = make_client(pool)
    client.sendall(b"go")
    with Reader(client) as reader:
        reader.wait_for(1000)
        client.sendall(b"STOP")
        wait_until(lambda: len(heard) == 2, 5, lambda: f"heard {heard}, while {reader.received} bytes were read")
        wait_until(lambda: reader.ended)
        assert reader.ended == "end"
    assert heard == [b"go", b"STOP"]


@pytest.mark.parametrize("size", [255, 256, 512])
def test_what_came_with_the_message_that_starts_the_stream_is_heard(make_pool, make_client, size):
    """It is there already, and the kernel has nothing more to report."""
    heard = []

    def on_message(sock, data):
        heard.append(data[:1])
        sock.send(CHUNK)

    def on_writable(sock):
        if len(heard) == 1:
            sock.send(CHUNK)

    pool = make_pool(handler(on_message=on_message, on_writable=on_writable), framing=Fixed(size), workers=1)
    client = make_client(pool)
    with Reader(client) as reader:
        client.sendall(b"a" * size + b"b" * size)
        wait_until(lambda: heard == [b"a", b"b"])
        assert reader.ended is None
