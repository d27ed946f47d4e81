"""on_disconnect in Python returns RECONNECTED: the compiled handler below it was told of an end, and begins again."""

import os
import socket

import pytest
from compiled_helpers import FRAMING, pack, receive, say, wait_counts
from contract_helpers import every_trigger, open_sockets
from downstream_handlers import Counting, state_of
from helpers import patient, reset, wait_until

from tstpool import TstStat


class Reconnecting(Counting):
    """Puts a fresh connection under the descriptor, as long as there are any."""

    def __init__(self, fresh):
        self.fresh = fresh
        self.reasons = []

    def on_disconnect(self, sock, reason):
        self.reasons.append(reason)
        if self.fresh:
            with self.fresh.pop(0) as ours:
                os.dup2(ours.fileno(), sock.sd)
            return TstStat.RECONNECTED


@pytest.fixture
def make_fresh():
    """make_fresh(n) -> (our ends, the peers) of n connections."""
    made = []

    def make(n):
        pairs = [socket.socketpair() for _ in range(n)]
        made.extend(sock for pair in pairs for sock in pair)
        for _, peer in pairs:
            peer.settimeout(patient(5))
        return [ours for ours, _ in pairs], [peer for _, peer in pairs]

    yield make
    for sock in made:
        sock.close()


@pytest.mark.parametrize("end", ["close", "reset"])
@every_trigger
def test_with_a_fresh_state(make_pool, make_client, make_fresh, trigger, end):
    """Twice: each connection has a state of its own, which is zeroed, and released once."""
    fresh, peers = make_fresh(2)
    counting = Reconnecting(fresh)
    pool = make_pool(counting, framing=FRAMING, trigger=trigger, workers=2)
    client = make_client(pool)
    assert say(client, b"first") == [b"first"]
    if end == "reset":
        reset(client)
    client.close()
    for n, peer in enumerate(peers, 1):
        peer.sendall(pack(b"again", b"and again"))
        assert receive(peer, 2) == [b"again", b"and again"]
        wait_counts(counting, 3, connected=1, adopted=n, received=1 + 2 * n, disconnected=n, released=n)
        (sock,) = open_sockets(pool, 1)
        assert state_of(sock) != 0
        peer.close()
    wait_until(lambda: len(pool) == 0)
    counts = wait_counts(counting, 3, connected=1, adopted=2, received=5, disconnected=3, released=3)
    assert counts["copies_made"] == counts["copies_freed"] == 5
    assert len(counting.reasons) == 3


@every_trigger
def test_that_says_nothing_before_it_ends(make_pool, make_client, make_fresh, trigger):
    """Or the pool stops: the books balance all the same."""
    fresh, (first, second) = make_fresh(2)
    counting = Reconnecting(fresh)
    pool = make_pool(counting, framing=FRAMING, trigger=trigger, workers=2)
    client = make_client(pool)
    say(client, b"first")
    client.close()
    wait_until(lambda: len(counting.reasons) == 1)
    first.close()
    wait_counts(counting, released=2)  # before that, stop() would close what on_disconnect has just put there
    pool.stop()
    assert second.recv(1) == b""
    counts = wait_counts(counting, 0, connected=1, received=1)
    assert counts["disconnected"] == counts["released"]
    assert counts["copies_made"] == counts["copies_freed"] == 1
    assert len(counting.reasons) == 3
