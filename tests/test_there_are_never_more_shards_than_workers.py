"""B16, S2: create() may bring fewer workers than shards were opened for; an idle pool makes no wake-ups then either."""

import time

import pytest
from contract_helpers import as_function, echo, round_trip
from helpers import open_fds, wait_until
from test_a_blocked_handler_blocks_nobody_else import voluntary_switches


def epoll_sets():
    return sum("eventpoll" in link for link in open_fds().values())


def is_quiet(name):
    """Nobody of them wakes up in a tenth of a second: a window to measure in, not a wait."""
    before = voluntary_switches(name)
    time.sleep(0.1)
    return voluntary_switches(name) == before > 0


def check(pool, make_client, shards):
    clients = [make_client(pool) for _ in range(2 * shards + 1)]
    for client in clients:
        assert round_trip(client, b"hello") == b"hello"
    wait_until(lambda: is_quiet("fewer"), message="an idle pool makes wake-ups")
    for client in clients:
        assert round_trip(client, b"hello") == b"hello"


def test_after_a_run_with_more(make_pool, make_client):
    """B16: and there are more again when there are workers for them."""
    others = epoll_sets()
    pool = make_pool(as_function(echo), workers=4, shards=4, name="fewer")
    check(pool, make_client, 4)
    assert epoll_sets() - others == 4
    for workers in (1, 3, 2, 8):
        assert pool.stop() is True
        pool.create(workers, "127.0.0.1", 0, as_function(echo))
        pool.listen("127.0.0.1", 0)
        assert epoll_sets() - others == min(workers, 4)
        check(pool, make_client, 4)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_after_a_listen_with_more(make_pool, make_client, workers):
    """B16: the listener is served by one of those that are left, and so is who connects."""
    others = epoll_sets()
    pool = make_pool(as_function(echo), workers=4, shards=4, name="fewer", start=False)
    assert epoll_sets() - others == 4
    pool.create(workers, None, 0, as_function(echo))
    assert epoll_sets() - others == workers
    check(pool, make_client, 4)


def test_a_connection_stays_where_it_was(make_pool, make_client):
    """S2: those that connect() has spread over the shards before create() are served, also by fewer workers."""
    server = make_pool(as_function(echo), workers=1)
    got = []
    pool = make_pool(as_function(echo), workers=4, shards=4, name="fewer", start=False)
    for _ in range(4):
        pool.connect(*server.addresses[0]).send(b"x")
    pool.create(1, None, 0, lambda sock: got.append(sock.read()))
    wait_until(lambda: got == [b"x"] * 4)
    client = make_client(pool)
    client.sendall(b"hello")
    wait_until(lambda: b"hello" in got)
