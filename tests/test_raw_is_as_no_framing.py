"""Raw() says that there is no framing, in words: a function reads as it likes, and what it leaves is not lost."""

import socket

import pytest
from contract_helpers import every_trigger, handler
from helpers import patient, recv_exact, recv_until_eof, wait_until

from tstpool import EPOLLIN, Delimited, Raw

each_place = pytest.mark.parametrize("place", ["pool", "listener", "on_connect", "own handler", "connect"])


def serve(make_pool, make_client, function, place, **options):
    """A client of a pool where sockets have Raw(), given in that place, and `function` serves them."""

    def on_connect(sock):
        if place == "on_connect":
            sock.framing = Raw()
        elif place == "own handler":
            sock.handler = function

    framing = Raw() if place in ("pool", "own handler") else None if place == "connect" else Delimited()
    served = handler(on_connect=on_connect) if place == "own handler" else function
    pool = make_pool(served, framing=framing, workers=2, start=False, listen=None, **options)
    if place == "on_connect":
        pool.setEventNewConnected(on_connect)
    address = pool.listen("127.0.0.1", 0, **({"framing": Raw()} if place == "listener" else {}))
    pool.start()
    if place != "connect":
        return make_client(address, timeout=3)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pool.connect(*listener.getsockname(), framing=Raw())
        client, _ = listener.accept()
    client.settimeout(patient(3))
    return client


@each_place
@every_trigger
def test_a_function_that_reads_four_bytes_a_time(make_pool, make_client, place, trigger):
    """It is called again for the rest, and checked_len says how much that is; the socket's framing is Raw() still."""
    calls = []

    def function(sock):
        if sock.events & EPOLLIN:
            waiting = sock.recv_data.checked_len
            piece = sock.read(4)
            calls.append((waiting, piece, sock.framing))
            sock.send(b"[" + piece + b"]")

    with serve(make_pool, make_client, function, place, trigger=trigger) as client:
        client.sendall(b"abcdefghij")
        assert recv_exact(client, 16) == b"[abcd][efgh][ij]"
        assert calls == [(10, b"abcd", Raw()), (6, b"efgh", Raw()), (2, b"ij", Raw())]
        client.sendall(b"klmnop")
        client.shutdown(socket.SHUT_WR)
        assert recv_until_eof(client) == b"[klmn][op]"


@every_trigger
def test_a_function_that_waits_until_enough_is_there(make_pool, make_client, trigger):
    """What it leaves unread comes again, with what has come meanwhile."""
    got = []

    def function(sock):
        if sock.events & EPOLLIN and sock.recv_data.checked_len >= 10:
            got.append(sock.read())

    pool = make_pool(function, framing=Raw(), trigger=trigger, workers=2)
    client = make_client(pool)
    client.sendall(b"01234")
    wait_until(lambda: pool.stats().spins > 10, timeout=3)
    client.sendall(b"56789")
    wait_until(lambda: got, timeout=3)
    assert got == [b"0123456789"]


@every_trigger
def test_a_function_that_asks_for_a_transfer_behind_what_it_has_read(make_pool, make_client, trigger):
    """Header, then body: read() takes the header, req_len asks for the rest of it."""
    bodies = []

    def function(sock):
        data = sock.recv_data
        if not sock.events & EPOLLIN:
            return
        if data.req_len:
            bodies.append(bytes(data.s[: data.req_len]))
            data.req_len = 0
        else:
            data.req_len = sock.read(1)[0]

    with serve(make_pool, make_client, function, "pool", trigger=trigger) as client:
        client.sendall(b"\5hello\3you\1!")
        wait_until(lambda: len(bodies) == 3, timeout=3)
        assert bodies == [b"hello", b"you", b"!"]
