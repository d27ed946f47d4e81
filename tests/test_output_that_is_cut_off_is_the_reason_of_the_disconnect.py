"""on_disconnect's reason is None when all was sent; an error says why what a close had left was not."""

import pytest
from compiled_helpers import socket_of
from contract_helpers import every_trigger, handler, round_trip
from helpers import recv_until_eof, reset, wait_until

from tstpool import TstHandler, TstStat

SIZE = 6_000_000  # more than a socket buffer holds
LOST = (ConnectionResetError, BrokenPipeError)

each_way = pytest.mark.parametrize("way", [b"close", b"return", b"another thread"], ids=lambda way: way.decode())


class Closing(TstHandler):
    """Answers with SIZE bytes and closes, in the way that the message says; "echo" and "leave open" it does not."""

    def __init__(self):
        self.reasons = {}

    def on_message(self, sock, data):
        if data == b"echo":
            return data
        sock.user_data = data
        sock.send(bytes(SIZE))
        if data == b"close":
            sock.close()
        return TstStat.DISCONNECT if data == b"return" else None

    def on_disconnect(self, sock, reason):
        self.reasons[sock.user_data] = reason


class Server:
    """A pool of one worker with a Closing."""

    def __init__(self, make_pool, make_client, own=False, **options):
        self.make_client = make_client
        self.closing = Closing()
        chosen = handler(on_connect=lambda sock: setattr(sock, "handler", self.closing)) if own else self.closing
        self.pool = make_pool(chosen, workers=1, shards=1, **options)
        self.other = make_client(self.pool)

    def ask(self, way, client):
        """The client's connection is closing when this returns, and most of the output is still here."""
        sock = socket_of(self.pool, client)
        client.sendall(way)
        # Whoever is held up here for as long as linger_timeout finds it cut off already.
        wait_until(lambda: self.pool.stats().bytes_queued > SIZE // 10 or way in self.closing.reasons)
        if way == b"another thread":
            assert sock.close() is True
        for _ in range(2):  # then the worker has done whatever it was asked for before
            assert round_trip(self.other, b"echo") == b"echo"
        assert sock.closed is (way != b"leave open")
        return sock

    def reason(self, way):
        wait_until(lambda: way in self.closing.reasons)
        return self.closing.reasons[way]


@each_way
@every_trigger
@pytest.mark.parametrize("own", [False, True], ids=["pools", "own"])
def test_a_peer_that_resets(make_pool, make_client, way, trigger, own):
    server = Server(make_pool, make_client, own, trigger=trigger)
    client = make_client(server.pool)
    server.ask(way, client)
    reset(client)
    assert isinstance(server.reason(way), LOST)


@each_way
def test_a_peer_that_goes_away_with_input_unread(make_pool, make_client, way):
    """The kernel resets for it."""
    server = Server(make_pool, make_client)
    client = make_client(server.pool)
    server.ask(way, client)
    assert client.recv(1) == b"\0"
    client.close()
    assert isinstance(server.reason(way), LOST)


@each_way
@every_trigger
def test_a_peer_that_never_reads(make_pool, make_client, way, trigger):
    """It is cut off by linger_timeout."""
    server = Server(make_pool, make_client, trigger=trigger, linger_timeout=0.2)
    server.ask(way, make_client(server.pool))
    assert isinstance(server.reason(way), TimeoutError)
    assert server.pool.stats().linger_closed == 1


def test_an_abort_has_no_reason_and_all_that_was_sent_neither(make_pool, make_client):
    """Of four peers one resets, one reads everything, and our side aborts the others, closing or not."""
    server = Server(make_pool, make_client)
    resets, reads, closing, is_open = (make_client(server.pool) for _ in range(4))
    server.ask(b"another thread", reads)
    assert recv_until_eof(reads) == bytes(SIZE)
    reads.close()
    assert server.reason(b"another thread") is None
    server.ask(b"close", closing).close(abort=True)
    assert server.reason(b"close") is None
    server.ask(b"leave open", is_open).close(abort=True)
    assert server.reason(b"leave open") is None
    server.ask(b"return", resets)
    reset(resets)
    assert isinstance(server.reason(b"return"), LOST)


@pytest.mark.parametrize("way", [b"leave open", b"close", b"return"], ids=lambda way: way.decode())
def test_a_stop_that_cuts_off(make_pool, make_client, way):
    """Whose output is still there when its time is over gets an error, and nobody else."""
    server = Server(make_pool, make_client)
    server.ask(way, make_client(server.pool))
    server.pool.stop(drain=0.2)
    assert isinstance(server.reason(way), ConnectionAbortedError)
    assert server.closing.reasons == {way: server.reason(way), None: None}
