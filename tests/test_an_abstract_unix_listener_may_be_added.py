"""B62: a unix socket whose name is no file's."""

import secrets
import socket

from contract_helpers import echo, handler, round_trip

from tstpool import TstSockType


def test_its_clients_are_served_and_it_stops_like_any_other(make_pool, make_client):
    """B62, S19: with a name that begins with a zero byte, which only Linux has."""
    name = f"\0tstpool-{secrets.token_hex(8)}"
    pool = make_pool(handler(on_message=echo), listen=None)
    listener = socket.socket(socket.AF_UNIX)
    with listener:
        listener.bind(name)
        listener.listen()
        pool.addsocket(listener, TstSockType.LISTEN)
    assert pool.addresses == [(f"unix:{name}", 0)]
    client = make_client(pool)
    assert round_trip(client, b"hello") == b"hello"
    assert pool.stop() is True
    assert client.recv(1) == b""
    with socket.socket(socket.AF_UNIX) as again:
        again.bind(name)  # nobody has it any more
