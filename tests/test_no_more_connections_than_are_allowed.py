"""B33, the docstring of TstPool: max_connections; the one too many waits in the kernel's backlog, or is closed."""

import contextlib
import logging
import select
import socket
import threading
import time

import pytest
from compiled_helpers import socket_of
from contract_helpers import Gate, ServerProcess, echo, faults, handler, in_threads, is_open, open_sockets, round_trip
from downstream_handlers import Echo
from helpers import SANITIZER, connect, patient, recv_exact, scaled, wait_until

import tstpool

ECHO = handler(on_message=echo)
both_policies = pytest.mark.parametrize("when_full", ["wait", "close"])


def asks(client):
    """Sends "hello"; is_served() says whether it was answered."""
    client.sendall(b"hello")
    return client


def is_served(client, within=10.0):
    ready, _, _ = select.select([client], [], [], patient(within))
    return bool(ready) and recv_exact(client, 5) == b"hello"


def waits(client, seconds=0.35):
    """A window of more than three pauses of the acceptor, in which a limit that is none would let it in."""
    return not select.select([client], [], [], seconds)[0]


def served_clients(pool, make_client, number):
    clients = [make_client(pool) for _ in range(number)]
    for client in clients:
        assert round_trip(client, b"hello") == b"hello"
    return clients


# ------------------------------------------------------------------------------------------------------ wait


def test_the_one_too_many_waits_and_is_served_when_one_leaves(make_pool, make_client):
    """B33: in the order in which they came; it costs nobody's connection."""
    pool = make_pool(ECHO, max_connections=3)
    clients = served_clients(pool, make_client, 3)
    late = [asks(make_client(pool)) for _ in range(3)]
    assert all(waits(client, 0.15) for client in late)
    assert len(pool) == 3
    for i, client in enumerate(late):
        assert round_trip(clients[i], b"still here") == b"still here"
        clients[i].close()
        begin = time.monotonic()
        assert is_served(client)
        assert time.monotonic() - begin < patient(0.5)
        assert len(pool) == 3
        assert waits(late[-1], 0.05) or client is late[-1]
    stats = pool.stats()
    assert (stats.accepted, stats.rejected_connections, stats.accept_errors) == (6, 0, 0)
    assert 1 <= stats.accept_pauses < 30


@pytest.mark.parametrize("leaver", range(4))
def test_whichever_shard_the_one_that_leaves_belongs_to(make_pool, make_client, leaver):
    """B33: connections are spread over the shards, and only one of these has the listener."""
    pool = make_pool(Echo(), max_connections=4, workers=2, shards=2)
    clients = served_clients(pool, make_client, 4)
    late = asks(make_client(pool))
    assert waits(late)
    clients[leaver].close()
    assert is_served(late, 1.0)
    assert len(pool) == 4


@pytest.mark.parametrize("leaver", ["stuck", "another"])
def test_when_handlers_are_stuck(make_pool, make_client, leaver):
    """B33: somebody else leaves meanwhile, or the stuck one does, when its handler has returned."""
    with Gate() as gate:

        def on_message(sock, data):
            if data == b"block":
                gate.wait()
            sock.send(data)

        pool = make_pool(handler(on_message=on_message), max_connections=2, workers=3, slow_handler=30)
        stuck, other = served_clients(pool, make_client, 2)
        stuck.sendall(b"block")
        wait_until(lambda: gate.inside)
        late = asks(make_client(pool))
        assert waits(late)
        if leaver == "another":
            other.close()
        else:
            stuck.close()
            assert waits(late)  # its handler still has it
            gate.open()
        assert is_served(late, 1.0)


def test_the_server_closes_one(make_pool, make_client):
    """B33: a place is free again whoever has closed."""
    pool = make_pool(ECHO, max_connections=2)
    clients = served_clients(pool, make_client, 2)
    late = asks(make_client(pool))
    assert waits(late)
    socket_of(pool, clients[1]).close()
    assert is_served(late, 1.0)


def test_several_listeners_share_the_limit(make_pool, make_client):
    """B33: those of all of them together; a listener is none of them."""
    pool = make_pool(ECHO, max_connections=2)
    second = pool.listen("127.0.0.1", 0)
    one = served_clients(pool, make_client, 1)[0]
    two = make_client(second)
    round_trip(two, b"hello")
    late = [asks(make_client(pool)), asks(make_client(second))]
    assert all(map(waits, late))
    one.close()
    two.close()
    assert all(is_served(client, 1.0) for client in late)


def test_waiting_costs_no_time(make_client):
    """B33: somebody waits for half a second, and the engine sleeps."""
    code = """
pool = TstPool(Echo(), workers=2, max_connections=1)
port = pool.listen("127.0.0.1", 0)[1]
pool.start()
print(port)
sys.stdin.read()
pool.stop()
"""
    with ServerProcess(code) as server:
        one = make_client(server.addr)
        round_trip(one, b"hello")
        late = asks(make_client(server.addr))
        cpu = server.cpu_seconds()
        assert waits(late, 0.6)
        assert server.cpu_seconds() - cpu < (0.3 if SANITIZER else 0.1)
        one.close()
        assert is_served(late, 1.0)
        server.finish()


# ----------------------------------------------------------------------------------------------------- close


def test_the_one_too_many_is_closed(make_pool, make_client):
    """B33: and counted; the others do not notice, and a place that is free again is given."""
    pool = make_pool(ECHO, max_connections=2, when_full="close")
    clients = served_clients(pool, make_client, 2)
    for i in range(20):
        with connect(pool) as late, contextlib.suppress(ConnectionResetError):
            assert late.recv(1) == b""
        assert pool.stats().rejected_connections == i + 1
    stats = pool.stats()
    assert (stats.accepted, stats.connections, stats.accept_pauses) == (2, 2, 0)
    clients[0].close()
    wait_until(lambda: len(pool) == 1)
    assert round_trip(make_client(pool), b"hello") == b"hello"
    assert round_trip(clients[1], b"hello") == b"hello"


FULL_AND_OUT_OF_DESCRIPTORS = """
pool = TstPool(Echo(), workers=1, max_connections=1, when_full="close")
port = pool.listen("127.0.0.1", 0)[1]
ours, theirs = socket.socketpair()
pool.addsocket(theirs)
pool.start()
print(port)
sys.stdin.read()
deadline = time.monotonic() + 10
while not pool.stats().accept_errors and time.monotonic() < deadline:  # the worker may have been held up all the time
    time.sleep(0.001)
print(pool.stats().accept_errors)
pool.stop()
"""


def test_a_full_pool_that_can_not_even_accept_to_close_does_not_spin(make_client):
    """B31, B33: too many connections, and no descriptor for one more."""
    env = {"FAIL_CALL": "accept4", "FAIL_ERRNO": "24", "FAIL_COUNT": "2000000000"}
    with ServerProcess(FULL_AND_OUT_OF_DESCRIPTORS, env=env, preload=faults()) as server:
        make_client(server.addr)
        cpu = server.cpu_seconds()
        time.sleep(0.5)  # a window to measure in
        assert server.cpu_seconds() - cpu < (0.3 if SANITIZER else 0.1)
        assert 0 < int(server.finish()) < patient(500)


# ----------------------------------------------------------------------------------------------------- churn


@both_policies
@pytest.mark.parametrize(("shards", "number"), [(1, 2000), (2, 2000), pytest.param(1, 100_000, marks=pytest.mark.slow)])
def test_after_much_churn_as_many_are_served_again(make_pool, make_client, when_full, shards, number):
    """B33: so many connections of 8 threads for 5 places: never more, and in the end 5, not 4 and not 6."""
    limit, threads, each = 5, 8, scaled(number // 8, 20)
    pool = make_pool(Echo(), max_connections=limit, when_full=when_full, workers=2, shards=shards)
    most, served, over = [0], [0] * threads, threading.Event()

    def watch():
        while not over.is_set():
            most[0] = max(most[0], len(pool))
            time.sleep(0.0005)

    def churn(i):
        for _ in range(each):
            with connect(pool, 30) as client, contextlib.suppress(ConnectionError, EOFError):
                served[i] += round_trip(client, b"hello") == b"hello"

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        in_threads(*(lambda i=i: churn(i) for i in range(threads)), timeout=60 + number / 500)
    finally:
        over.set()
        watcher.join()
    wait_until(lambda: len(pool) == 0)
    stats = pool.stats()
    print(f"{sum(served)} served, {stats.rejected_connections} closed, {stats.accept_pauses} pauses, {most[0]} at most")
    assert 0 < most[0] <= limit
    assert stats.accepted == stats.closed
    assert stats.accepted + stats.rejected_connections == threads * each
    assert sum(served) == (threads * each if when_full == "wait" else stats.accepted)
    clients = served_clients(pool, make_client, limit)
    late = asks(make_client(pool))
    if when_full == "wait":
        assert waits(late)
    else:
        with contextlib.suppress(ConnectionResetError):
            assert late.recv(1) == b""
    assert all(map(is_open, clients))
    assert len(pool) == limit


def test_a_full_pool_to_which_nothing_happens_is_idle(make_pool, make_client):
    """S37: it looks for room ten times a second, for the one who waits; that is nothing to do."""
    numbers = []
    hooks = handler(on_message=echo, on_idle=numbers.append)
    pool = make_pool(hooks, max_connections=1, workers=1, idle_time=0.25)
    served_clients(pool, make_client, 1)
    late = asks(make_client(pool))
    wait_until(lambda: pool.stats().accept_pauses)
    before = len(numbers), pool.stats().workers[0].idle_count
    wait_until(lambda: len(numbers) >= before[0] + 3)
    wait_until(lambda: pool.stats().workers[0].idle_count >= before[1] + 3)  # it may count before it calls, or after
    assert waits(late, 0.01)


def test_two_listeners_of_two_shards_let_no_more_in(make_pool, make_client):
    """B33: both accept at the same time."""
    limit, each = 3, scaled(150, 20)
    pool = make_pool(Echo(), max_connections=limit, workers=2, shards=2)
    addresses = [pool.addresses[0], pool.listen("127.0.0.1", 0)]
    most, over = [0], threading.Event()

    def watch():
        while not over.is_set():
            most[0] = max(most[0], len(pool))
            time.sleep(0)  # lets the clients have the interpreter, which they might get every 5 ms else

    def churn(address):
        for _ in range(each):
            with connect(address, 30) as client:
                assert round_trip(client, b"hello") == b"hello"

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        in_threads(*(lambda address=address: churn(address) for address in addresses * 3), timeout=60)
    finally:
        over.set()
        watcher.join()
    assert 0 < most[0] <= limit


# ------------------------------------------------------------------------------------- default, added, logged


DEFAULT = """
resource.setrlimit(resource.RLIMIT_NOFILE, (60, 4096))
pool = TstPool(Echo(), workers=1)
port = pool.listen("127.0.0.1", 0)[1]
pool.start()
print(port)
sys.stdin.readline()
stats = pool.stats()
print(stats.connections, stats.accept_errors, stats.rejected_connections)
pool.stop()
"""


def test_by_default_some_descriptors_are_left_for_everything_else(make_client):
    """B31, B33: a limit of 60 descriptors is one of 28 connections; accept itself never fails."""
    with ServerProcess(DEFAULT) as server:
        clients = [asks(make_client(server.addr)) for _ in range(40)]
        assert all(is_served(client) for client in clients[:28])
        assert all(waits(client, 0.02) for client in clients[28:])
        assert server.finish().split() == ["28", "0", "0"]


def test_added_sockets_are_not_limited_but_count(make_pool, make_client):
    """B33: the program's own connections are made; a client finds the place taken, until they are gone."""
    pool = make_pool(ECHO, max_connections=2)
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            ours, theirs = socket.socketpair()
            ours.settimeout(patient(10))
            stack.enter_context(ours)
            pool.addsocket(theirs)
            assert round_trip(ours, b"hello") == b"hello"
        assert len(pool) == 4
        late = asks(make_client(pool))
        assert waits(late)
    assert is_served(late, 1.0)
    assert len(open_sockets(pool, 1)) == 1


def test_a_refusal_by_on_connect_is_counted_and_takes_no_place(make_pool, make_client):
    """B33: rejected_connections, and the place is free again."""
    pool = make_pool(handler(on_connect=lambda sock: tstpool.TstStat.DISCONNECT), max_connections=1)
    for i in range(5):
        assert make_client(pool).recv(1) == b""
        assert pool.stats().rejected_connections == i + 1


def test_the_log_says_so_at_most_once_a_second(make_pool, make_client, caplog):
    """B31, B33: however often the limit is reached."""
    pool = make_pool(ECHO, max_connections=1, workers=1, slow_handler=60)  # which would be logged, too
    begin, rounds = time.monotonic(), 0
    with caplog.at_level(logging.WARNING, "tstpool"):
        one = served_clients(pool, make_client, 1)[0]
        while time.monotonic() - begin < 1.3 or rounds < 5:  # each may take long
            late = asks(make_client(pool))
            time.sleep(0.01)
            one.close()
            assert is_served(late)
            one = late
            rounds += 1
        took = time.monotonic() - begin
    lines = [record.getMessage() for record in caplog.records]
    assert pool.stats().accept_pauses > 3
    assert 1 <= len(lines) <= 1 + took
    assert all("max_connections" in line for line in lines)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "many", 1 << 32, 1 << 64])
def test_wrong_limits_are_refused(wrong):
    """B33."""
    with pytest.raises((ValueError, TypeError, OverflowError)):
        tstpool.TstPool(max_connections=wrong)


@pytest.mark.parametrize("wrong", ["", "drop", None, 1])
def test_wrong_policies_are_refused(wrong):
    """B33."""
    with pytest.raises(ValueError, match="when_full"):
        tstpool.TstPool(when_full=wrong)
