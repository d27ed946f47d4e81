"""B62: a listener that somebody else made, systemd, say: its file is theirs, its descriptor the pool's."""

import os
import socket

import pytest
from contract_helpers import echo, handler, round_trip
from helpers import connect

from tstpool import TstPool, TstSockType


def unix_listener(path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


def test_stop_removes_the_file_of_its_own_listener_alone(tmp_path):
    """B62: the pool has both kinds."""
    pool = TstPool(handler(on_message=echo))
    pool.listen(f"unix:{tmp_path}/own")
    pool.addsocket(unix_listener(tmp_path / "theirs"), TstSockType.LISTEN)
    pool.addsocket(unix_listener(tmp_path / "number").detach(), TstSockType.LISTEN)
    with pool:
        for name in ("own", "theirs", "number"):
            with connect(f"unix:{tmp_path}/{name}") as client:
                assert round_trip(client, b"hello") == b"hello"
    assert sorted(os.listdir(tmp_path)) == ["number", "theirs"]


def test_who_has_handed_it_over_goes_on_with_it(tmp_path):
    """B62: to another pool, for example: clients find it under the same path."""
    with unix_listener(tmp_path / "socket") as theirs:
        for _ in range(2):
            pool = TstPool(handler(on_message=echo))
            pool.addsocket(theirs.dup(), TstSockType.LISTEN)
            with pool, connect(f"unix:{tmp_path}/socket") as client:
                assert round_trip(client, b"hello") == b"hello"


@pytest.mark.parametrize("bare", [False, True], ids=["socket", "descriptor"])
def test_no_child_process_inherits_it(bare):
    """S1, S19: as any other descriptor of a pool; and it is non-blocking."""
    pool = TstPool(handler(on_message=echo))
    listener = socket.create_server(("127.0.0.1", 0))
    number = listener.fileno()
    os.set_inheritable(number, True)
    pool.addsocket(listener.detach() if bare else listener, TstSockType.LISTEN)
    assert listener.fileno() == -1
    assert not os.get_inheritable(number)
    assert not os.get_blocking(number)
    pool.stop()
