"""Bad input: text for seconds, null characters in paths, objects that were never initialized."""

import os
import socket

import pytest
from contract_helpers import echo, handler, ignore, open_sockets, round_trip
from helpers import run_python

from tstpool import Delimited, Fixed, LengthPrefixed, Raw, TstPool
from tstpool._core import Framing

SECONDS = [
    "idle_time", "slow_handler", "busy_poll", "accept_pause", "linger_timeout",
    "first_byte_timeout", "message_timeout", "idle_timeout", "write_timeout",
]  # fmt: skip


@pytest.mark.parametrize("name", SECONDS)
def test_text_is_no_number_of_seconds(name):
    """Even if there is a number in it."""
    for text in ("5", b"5", bytearray(b"5")):
        with pytest.raises(TypeError, match=name):
            TstPool(handler(on_message=echo), **{name: text})


def test_text_is_no_number_of_seconds_for_a_pool_that_runs_either(make_pool, make_client):
    """It is as if nobody had asked."""
    pool = make_pool(handler(on_message=echo))
    client = make_client(pool)
    (sock,) = open_sockets(pool, 1)
    for call in (
        lambda: sock.flush("1"),
        lambda: pool.listen("127.0.0.1", 0, idle_timeout="5"),
        lambda: pool.stop("1"),
        lambda: pool.destroy("1"),
    ):
        with pytest.raises(TypeError):
            call()
    assert (pool.running, pool.stats().listeners) == (True, 1)
    assert round_trip(client, b"hello") == b"hello"


def test_a_path_with_a_null_character_is_refused(make_pool, tmp_path):
    """The kernel would take what is before it for the whole: no file is made, nor is another server found."""
    pool = make_pool(handler(on_message=ignore), listen=None)
    with pytest.raises(ValueError, match="null"):
        pool.listen(f"unix:{tmp_path}/socket\0more")
    assert os.listdir(tmp_path) == []
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{tmp_path}/socket")
        server.listen()
        with pytest.raises(ValueError, match="null"):
            pool.connect(f"unix:{tmp_path}/socket\0more")
    assert pool.addresses == []


UNINITIALIZED = """
import socket, tstpool

class Pool(tstpool.TstPool):
    def __init__(self):
        self.mine = 1

pool = Pool()
ours, theirs = socket.socketpair()
for call in (
    pool.start, pool.stop, pool.sockets, pool.stats, pool.waiting, pool.destroy, pool.__enter__,
    lambda: pool.listen("127.0.0.1", 0), lambda: pool.connect("127.0.0.1", 9), lambda: pool.addsocket(ours),
    lambda: pool.broadcast(b"hello"), lambda: pool[5], lambda: 5 in pool, lambda: list(pool),
    lambda: pool.need_send(5), lambda: pool.closesocket(5),
    lambda: pool.create(1, "127.0.0.1", 0, lambda sock: None),
):
    try:
        call()
    except tstpool.TstError as error:
        assert "__init__" in str(error)
    else:
        raise AssertionError("no error")
assert "__init__" in repr(pool), pool
assert ours.fileno() >= 0
"""


def test_a_pool_that_was_not_initialized_says_so():
    """Its class has an __init__ that does not call TstPool's."""
    run_python("-c", UNINITIALIZED)


class Own(Framing):
    """It says not where messages end."""


def assign(sock, framing):
    sock.framing = framing


@pytest.mark.parametrize("kind", [Own, Raw, Fixed, Delimited, LengthPrefixed])
def test_a_framing_that_was_not_initialized_is_refused(make_pool, make_client, kind):
    """Wherever a framing is given."""
    framing = kind.__new__(kind)
    pool = make_pool(handler(on_message=echo))
    client = make_client(pool)
    (sock,) = open_sockets(pool, 1)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for call in (
            lambda: TstPool(handler(on_message=echo), framing=framing),
            lambda: pool.listen("127.0.0.1", 0, framing=framing),
            lambda: pool.addsocket(ours, framing=framing),
            lambda: assign(sock, framing),
        ):
            with pytest.raises(TypeError):
                call()
        assert ours.fileno() >= 0
    assert round_trip(client, b"hello") == b"hello"
