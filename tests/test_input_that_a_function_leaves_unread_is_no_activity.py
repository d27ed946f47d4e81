"""B38, S14: a function is called again and again for what it has not read; that does not keep a silent peer alive."""

import select
import time

import pytest
from contract_helpers import every_trigger, round_trip
from helpers import PATIENCE, patient, recv_exact, recv_until_eof, wait_until

from tstpool import TstStat

LIMIT = patient(0.4)

results = pytest.mark.parametrize("result", [None, TstStat.SUSPEND], ids=["None", "SUSPEND"])


class Four:
    """A function that wants four bytes together, and leaves fewer where they are."""

    def __init__(self, result=None, pauses=False):
        self.result, self.pauses = result, pauses
        self.calls = 0

    def __call__(self, sock):
        self.calls += 1
        if sock.recv_data.checked_len < 4:
            if self.pauses:
                sock.pause()
            return self.result
        sock.send(sock.read())


def closed_after(client, begin):
    """The peer has seen its end, which is a clean one. Returns after how many seconds, since `begin`."""
    assert recv_until_eof(client) == b""
    return time.monotonic() - begin


@results
@every_trigger
def test_a_peer_that_sends_a_part_and_is_silent_is_closed(make_pool, make_client, trigger, result):
    """B38: idle_timeout after what came last."""
    function = Four(result)
    pool = make_pool(function, trigger=trigger, workers=2, idle_timeout=LIMIT)
    client = make_client(pool)
    assert round_trip(client, b"1234") == b"1234"
    begin = time.monotonic()
    client.sendall(b"x")
    took = closed_after(client, begin)
    print(f"limit {LIMIT} s, took {took:.3f} s, {function.calls} calls")
    assert LIMIT <= took < LIMIT * 1.1 + patient(0.3 if PATIENCE == 1 else 0.75)
    wait_until(lambda: len(pool) == 0)
    assert pool.stats().idle_closed == 1


def test_many_of_them(make_pool, make_client):
    """B38: beside one that is answered all the time."""
    pool = make_pool(Four(), workers=2, idle_timeout=LIMIT)
    clients = [make_client(pool) for _ in range(20)]
    for client in clients:
        client.sendall(b"x")
    other = make_client(pool)

    def all_but_one_are_gone():
        assert round_trip(other, b"1234") == b"1234"
        return len(pool) == 1

    wait_until(all_but_one_are_gone)
    assert pool.stats().idle_closed == len(clients)
    for client in clients:
        assert recv_until_eof(client) == b""


@every_trigger
def test_the_rest_comes_in_time(make_pool, make_client, trigger):
    """S14: what was left is there then; this was so before, too."""
    pool = make_pool(Four(), trigger=trigger, workers=2, idle_timeout=2 * LIMIT)
    client = make_client(pool)
    for _ in range(3):
        client.sendall(b"12")
        time.sleep(LIMIT / 2)  # what makes the peer slow, and this thread may be held up besides
        client.sendall(b"34")
        assert recv_exact(client, 4) == b"1234"
    assert pool.stats().idle_closed == 0


@every_trigger
def test_one_that_pauses_is_not_closed(make_pool, make_client, trigger):
    """B38: then it is the handler that the peer waits for; this was so before, too."""
    function = Four(pauses=True)
    pool = make_pool(function, trigger=trigger, workers=2, idle_timeout=LIMIT)
    client = make_client(pool)
    client.sendall(b"x")
    wait_until(lambda: function.calls)
    readable, _, _ = select.select([client], [], [], 3 * LIMIT)  # a window, in which it would be closed
    assert not readable
    assert pool.stats().idle_closed == 0
    function.pauses = False
    client.sendall(b"yyy")
    (sock,) = pool.sockets()
    sock.resume()
    assert recv_exact(client, 4) == b"xyyy"
