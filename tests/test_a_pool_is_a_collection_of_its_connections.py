"""DESIGN 4: `in` and `for` ask for what sockets() lists."""

import socket

from contract_helpers import handler, ignore, open_sockets
from helpers import wait_until

from tstpool import TstSockType


def test_a_loop_goes_over_the_open_sockets(make_pool, make_client):
    """S3: a snapshot: they may be closed in it."""
    pool = make_pool(handler(on_message=ignore))
    assert list(pool) == []
    clients = [make_client(pool) for _ in range(3)]
    sockets = open_sockets(pool, len(clients))
    assert list(pool) == sockets
    for sock in pool:
        sock.close()
    wait_until(lambda: list(pool) == [])


def test_a_socket_its_id_and_its_descriptor_are_in_the_pool_while_it_is_open(make_pool, make_client):
    """S3: nothing of it afterwards."""
    pool = make_pool(handler(on_message=ignore))
    client = make_client(pool)
    (sock,) = open_sockets(pool, 1)
    names = [sock, sock.id, sock.sd]
    assert [name in pool for name in names] == [True] * 3
    client.close()
    wait_until(lambda: sock not in pool)
    assert [name in pool for name in names] == [False] * 3


def test_a_socket_of_another_pool_is_not_in_it(make_pool, make_client):
    """S3, S20: neither is its id, nor its descriptor, nor is a listener in any."""
    pool, other = (make_pool(handler(on_message=ignore)) for _ in range(2))
    make_client(pool)
    (sock,) = open_sockets(pool, 1)
    assert [name in other for name in (sock, sock.id, sock.sd, -1, 2**70)] == [False] * 5
    listener = socket.create_server(("127.0.0.1", 0))
    number = listener.fileno()
    pool.addsocket(listener, TstSockType.LISTEN)
    assert number not in pool
    assert list(pool) == [sock]
