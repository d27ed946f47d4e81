"""sock.handler = streamer: it sends until much waits, and on_writable says when to go on, whoever served before."""

import socket

import pytest
from contract_helpers import every_trigger, handler, open_sockets
from downstream_handlers import Commands
from helpers import recv_exact, recv_until_eof, wait_until

from tstpool import TstHandler

HIGH_WATER = 65536
PIECE = bytes(range(250)) * 120
SIZE = 167 * len(PIECE)  # 5 MB: more than a socket buffer holds


class Streamer(TstHandler):
    """Sends SIZE bytes, and stops whenever more than HIGH_WATER wait."""

    def __init__(self):
        self.sent = self.calls = 0

    def go_on(self, sock):
        while self.sent < SIZE:
            self.sent += len(PIECE)
            if sock.send(PIECE) > HIGH_WATER:
                break

    def on_writable(self, sock):
        self.calls += 1
        self.go_on(sock)


def take_over(sock):
    streamer = Streamer()
    sock.handler = streamer
    streamer.go_on(sock)


def function(sock):
    if sock.read():
        take_over(sock)


class PassesOn(Commands):
    """`received` is a compiled hook, and what it passes on ("r") gets here."""

    def on_message(self, sock, data):
        take_over(sock)


def first_handler(kind):
    if kind == "object":
        return handler(on_message=lambda sock, data: take_over(sock))
    return PassesOn() if kind == "compiled" else function


def all_of_it(client, half_closed=False):
    """What the client gets is the whole stream, and nothing but that."""
    got = recv_until_eof(client) if half_closed else recv_exact(client, SIZE)
    assert len(got) == SIZE
    return got == PIECE * (SIZE // len(PIECE))


@every_trigger
@pytest.mark.parametrize("kind", ["object", "function", "compiled"])
@pytest.mark.parametrize("half_closed", [False, True], ids=["open", "half-closed"])
def test_that_a_handler_assigns(make_pool, make_client, kind, trigger, half_closed):
    """Of a peer that has finished sending, too: it is not let go before all has been sent."""
    client = make_client(make_pool(first_handler(kind), workers=3, trigger=trigger), timeout=3)
    client.sendall(b"r")
    if half_closed:
        client.shutdown(socket.SHUT_WR)
    assert all_of_it(client, half_closed)


@every_trigger
@pytest.mark.parametrize("half_closed", [False, True], ids=["open", "half-closed"])
def test_that_on_connect_assigns(make_pool, make_client, trigger, half_closed):
    """It speaks first; the pool's handler has never been called."""
    pool = make_pool(handler(on_connect=take_over), workers=2, trigger=trigger)
    client = make_client(pool, timeout=3)
    if half_closed:
        client.shutdown(socket.SHUT_WR)
    assert all_of_it(client, half_closed)


@every_trigger
def test_that_the_event_of_a_function_assigns(make_pool, make_client, trigger):
    """The same with setEventNewConnected, and a function as the pool's handler."""
    pool = make_pool(function, start=False, listen=None, workers=2, trigger=trigger)
    pool.setEventNewConnected(take_over)
    pool.listen("127.0.0.1", 0)
    pool.start()
    assert all_of_it(make_client(pool, timeout=3))


@every_trigger
@pytest.mark.parametrize("kind", ["object", "function", "compiled"])
def test_that_another_thread_assigns(make_pool, make_client, kind, trigger):
    """The connection is quiet: no message brings the change about."""
    pool = make_pool(first_handler(kind), workers=2, trigger=trigger)
    client = make_client(pool, timeout=3)
    (sock,) = open_sockets(pool, 1)
    take_over(sock)
    assert all_of_it(client)


@every_trigger
def test_that_is_assigned_while_much_waits_already(make_pool, make_client, trigger):
    """What the handler before it has left is output like its own: it is told when little of it waits."""
    size, streamer = 6_000_000, Streamer()

    def on_message(sock, data):
        sock.send(bytes(size))
        sock.handler = streamer

    pool = make_pool(handler(on_message=on_message), workers=2, trigger=trigger)
    client = make_client(pool, timeout=3)
    client.sendall(b"x")
    wait_until(lambda: pool.stats().bytes_queued > HIGH_WATER)
    assert recv_exact(client, size) == bytes(size)
    assert all_of_it(client)
    assert streamer.calls


@every_trigger
@pytest.mark.parametrize("kind", ["object", "function"])
def test_that_replaces_one_assigned_before(make_pool, make_client, kind, trigger):
    """The pool's handler has an on_writable, the socket's own has none, and is replaced in its turn."""
    pools = handler(on_writable=lambda sock: None, on_connect=lambda sock: setattr(sock, "handler", own))
    own = first_handler(kind)
    client = make_client(make_pool(pools, workers=2, trigger=trigger), timeout=3)
    client.sendall(b"x")
    assert all_of_it(client)
