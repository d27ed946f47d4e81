"""B49: a stop() that comes while a socket is added is about that moment, also when adding it fails then."""

import socket

import pytest
from contract_helpers import echo, handler, round_trip
from helpers import patient


def test_the_next_start_is_not_stopped_for_it(make_pool):
    """B49: the pool did not run, and is started afterwards."""
    pool = make_pool(handler(on_message=echo), listen=None, start=False)

    class Failing(socket.socket):
        def detach(self):
            assert pool.stop(0) is False
            raise OSError("not this one")

    ours, theirs = socket.socketpair()
    with ours, Failing(fileno=theirs.detach()) as sock, pytest.raises(OSError, match="not this one"):
        pool.addsocket(sock)
    assert len(pool) == 0
    pool.start()
    assert pool.running
    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(patient(10))
        pool.addsocket(theirs)
        assert round_trip(ours, b"hello") == b"hello"
