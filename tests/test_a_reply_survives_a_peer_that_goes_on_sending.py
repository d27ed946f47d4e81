"""B24: a peer that is far from having read its reply may well send more before it sees the end; nothing must be lost
when that comes in whole messages, or in pieces that are no messages, so that nobody could know."""

import contextlib
import socket
import time

import pytest
from contract_helpers import every_trigger, replying_once
from helpers import patient, wait_until

from tstpool import Delimited, LengthPrefixed, Raw

REPLY = bytes(range(250)) * 2400  # 600,000 bytes: the kernel takes all at once, of which the peer's takes little


def frame(size):
    return (size - 4).to_bytes(4, "big") + b"x" * (size - 4)


def line(size):
    return b"x" * (size - 1) + b"\n"


@contextlib.contextmanager
def slow_reader(pool):
    """A client whose kernel takes little, from the beginning."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        client.settimeout(patient(10))
        client.connect(pool.addresses[0])
        yield client


def read_while_sending(client, piece, times=20):
    """Sends a piece now and then while it reads a little; then it reads on to the end. Returns what it has got."""
    got = b""
    for _ in range(times):
        client.sendall(piece)
        got += client.recv(2048)
        time.sleep(0.01)  # what makes the peer slow
    while data := client.recv(1 << 16):
        got += data
    return got


def check(make_pool, framing, piece, trigger="level", how="disconnect"):
    reasons = []
    hooks = replying_once(REPLY, how, reasons)
    pool = make_pool(hooks, framing=framing, trigger=trigger, workers=2)
    for n in range(2):
        with slow_reader(pool) as client:
            client.sendall(piece)
            wait_until(lambda n=n: len(reasons) == n + 1)  # the server has closed, as far as it is concerned
            assert read_while_sending(client, piece) == REPLY
        wait_until(lambda: len(pool) == 0)
    assert reasons == [None, None]
    assert pool.stats().linger_closed == 0


@pytest.mark.parametrize("size", [1024, 8192])
@pytest.mark.parametrize("framing", [Delimited(), LengthPrefixed(4)], ids=["Delimited", "LengthPrefixed"])
def test_whole_messages(make_pool, framing, size):
    """B24: all of the reply arrives, and a clean end."""
    check(make_pool, framing, line(size) if isinstance(framing, Delimited) else frame(size))


@pytest.mark.parametrize("size", [1024, 8192])
@pytest.mark.parametrize("framing", [Raw(), Raw(max_message=1 << 20)], ids=["Raw", "Raw with a limit"])
def test_pieces_of_which_each_is_a_message(make_pool, framing, size):
    """B24: Raw() is as no framing."""
    check(make_pool, framing, b"x" * size)


def test_small_pieces_without_framing(make_pool):
    """B24: none of them says that there is more to come."""
    check(make_pool, None, b"x" * 1024)


def test_large_pieces_without_framing(make_pool):
    """B24: a large one says so; this was so before, too."""
    check(make_pool, None, b"x" * 8192)


@pytest.mark.parametrize("how", ["disconnect", "close"])
@every_trigger
def test_with_every_trigger(make_pool, trigger, how):
    """B24: in whole messages."""
    check(make_pool, LengthPrefixed(4), frame(8192), trigger, how)
