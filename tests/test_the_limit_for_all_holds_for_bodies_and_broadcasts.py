"""B35: max_total_queued is for what comes behind a header in the same call, and for broadcasts, too."""

import pytest
from contract_helpers import handler, ignore, open_sockets
from helpers import recv_exact, wait_until

from tstpool import SendQueueFull

TOTAL = 32 << 20
BODY = bytes(32 << 20)  # of which the kernel takes some


@pytest.mark.parametrize("framed", [False, True])
def test_a_body_sent_behind_its_header_counts_as_both_in_one(make_pool, make_client, framed):
    """B35: one peer gets its reply queued, the others' handlers hear that there is no room."""
    for pieces in ((b"h" + BODY,), (b"h", BODY)):
        refused = []

        def on_message(sock, data, pieces=pieces):
            for piece in pieces:
                (sock.send_message if framed else sock.send)(piece)

        def on_error(sock, error, refused=refused):
            refused.append(type(error))

        pool = make_pool(handler(on_message=on_message, on_error=on_error), max_total_queued=TOTAL, workers=1)
        for _ in range(6):
            make_client(pool).sendall(b"x")
        wait_until(lambda pool=pool: pool.stats().messages == 6)
        assert 0 < pool.stats().bytes_queued <= TOTAL + 1
        wait_until(lambda refused=refused: refused == [SendQueueFull] * 5)
        assert pool.stats().overflow_refused == 5


def test_broadcasts_that_nobody_reads_are_not_too_many(make_pool, make_client):
    """B35: the bytes of each are there by themselves; and whoever has nothing waiting gets the next one."""
    pool = make_pool(handler(on_message=ignore), max_total_queued=4 << 20)
    size = 16 << 20
    peers, reached = [], []
    for i in range(6):
        peers.append(make_client(pool))
        open_sockets(pool, i + 1)
        reached.append(pool.broadcast(bytes([i]) * size))
    assert reached == [1, 0, 0, 0, 0, 0]
    assert 0 < pool.stats().bytes_queued <= size
    assert recv_exact(peers[0], size) == bytes(size)
    wait_until(lambda: pool.stats().bytes_queued == 0)
    news = b"n" * size
    wait_until(lambda: pool.broadcast(news) == 6)
    for peer in peers:
        assert recv_exact(peer, size) == news
