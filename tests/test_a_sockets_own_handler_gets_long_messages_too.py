"""S38: sock.handler holds for the next message of whatever length, also one that goes into its own object."""

import struct

import pytest
from contract_helpers import handler
from helpers import recv_exact

from tstpool import LengthPrefixed


def frame(data):
    return struct.pack("!I", len(data)) + data


def answer(client):
    (length,) = struct.unpack("!I", recv_exact(client, 4))
    return recv_exact(client, length)


@pytest.mark.parametrize("size", [100, 100_000, 128 << 10, 200_000, 900_000])
@pytest.mark.parametrize("hook", ["on_connect", "on_message"])
def test_a_handler_that_was_assigned_gets_a_message_of_any_length(make_pool, make_client, hook, size):
    """S38: it is assigned in on_connect or in the message before; what follows comes in two parts."""
    own = handler(on_message=lambda sock, data: b"own %d" % len(data))

    def assign(sock, data=None):
        sock.handler = own
        return None if data is None else b"assigned"

    def pools(sock, data):
        return assign(sock, data) if data == b"assign" else b"pool's"

    hooks = {"on_connect": assign} if hook == "on_connect" else {}
    pool = make_pool(handler(on_message=pools, **hooks), framing=LengthPrefixed(4), workers=1)
    other = make_client(pool)
    client = make_client(pool)
    if hook == "on_message":
        client.sendall(frame(b"assign"))
        assert answer(client) == b"assigned"
    message = frame(bytes(size))
    client.sendall(message[:50])
    for _ in range(20):  # the only worker has seen the first part when these are answered
        other.sendall(frame(b"tick"))
        answer(other)
    client.sendall(message[50:])
    assert answer(client) == b"own %d" % size
    client.sendall(frame(b"short"))
    assert answer(client) == b"own 5"
