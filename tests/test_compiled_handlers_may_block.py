"""A compiled handler that blocks or computes costs its own connection; two of different connections run in parallel."""

import contextlib
import os
import socket
import threading
import time

import pytest
from compiled_helpers import FRAMING, pack, receive, say, socket_of, wait_counts
from contract_helpers import every_trigger, in_threads, round_trip
from downstream_handlers import Commands, FramedEcho, Meeting
from helpers import PATIENCE, connect, patient, recv_exact, recv_until_eof, reset, scaled, wait_until

from tstpool import TstStat


class Mixed(Commands):
    def on_message(self, sock, data):
        return data


@pytest.fixture
def gated():
    """A Mixed whose gate is open again at the end, so that no thread stays at it."""
    commands = Mixed()
    yield commands
    commands.open_gate()


def block(pool, commands, make_client, n, message=b"b"):
    """n clients whose handlers wait at the gate."""
    clients = [make_client(pool) for _ in range(n)]
    for i, client in enumerate(clients):
        client.sendall(pack(message))
        wait_until(lambda i=i: commands.waiting == i + 1)
    return clients


@pytest.mark.parametrize(("shards", "blocked"), [(1, 1), (1, 3), (2, 1), (2, 2), (2, 3)])
@every_trigger
def test_others_are_served_meanwhile(make_pool, make_client, gated, trigger, shards, blocked):
    """Old and new connections, as long as one worker of four is free; the blocked ones get their answers afterwards."""
    pool = make_pool(gated, framing=FRAMING, workers=4, shards=shards, trigger=trigger)
    old = [make_client(pool) for _ in range(6)]
    for client in old:
        say(client, b"e")
    stuck = block(pool, gated, make_client, blocked)
    for client in [*old, *(make_client(pool) for _ in range(4))]:
        for i in range(10):
            assert say(client, b"e%d" % i, b"r%d" % i) == [b"e%d" % i, b"r%d" % i]
    assert gated.waiting == blocked
    gated.open_gate()
    assert [receive(client) for client in stuck] == [[b"b"]] * blocked
    counts = wait_counts(gated, adopted=0)
    assert counts["received"] == 6 + 10 * 10 + blocked  # each was run once, whoever ran it


def test_its_peer_has_all_of_its_time_afterwards(make_pool, make_client, gated):
    """Also where a handler that takes long is none that Python hears of: its end is what idle_timeout counts from."""
    limit = patient(1)
    pool = make_pool(gated, framing=FRAMING, workers=2, idle_timeout=limit, slow_handler=60 * limit)
    (client,) = block(pool, gated, make_client, 1)
    time.sleep(1.5 * limit)  # how long it blocks, not a wait
    gated.open_gate()
    assert receive(client) == [b"b"]
    began = time.monotonic()
    assert client.recv(1) == b""
    assert time.monotonic() - began > 0.7 * limit


@pytest.mark.parametrize("shards", [1, 2])
def test_a_handler_that_computes_holds_up_nobody_either(make_pool, make_client, gated, shards):
    pool = make_pool(gated, framing=FRAMING, workers=4, shards=shards)
    others = [make_client(pool) for _ in range(4)]
    (stuck,) = block(pool, gated, make_client, 1, b"w")
    for client in others:
        for i in range(5):
            assert say(client, b"e%d" % i) == [b"e%d" % i]
    assert gated.waiting == 1
    gated.open_gate()
    assert receive(stuck) == [b"w"]


@pytest.mark.parametrize("shards", [1, 2])
def test_a_second_of_it_is_felt_by_nobody_else(make_pool, make_client, gated, shards):
    """The slowest round trip of the others while one handler blocks for a second."""
    pool = make_pool(gated, framing=FRAMING, workers=4, shards=shards)
    others = [make_client(pool) for _ in range(8)]
    for client in others:
        say(client, b"e")
    (stuck,) = block(pool, gated, make_client, 1)
    begin, times = time.monotonic(), []
    while time.monotonic() - begin < patient(1.0):
        for client in others:
            sent = time.monotonic()
            say(client, b"e")
            times.append(time.monotonic() - sent)
    assert len(times) > 8
    # All of them on a machine of its own. Beside other suites one may take longer, but not as long as it is blocked.
    assert max(times) < (0.3 if PATIENCE == 1 else patient(0.75))
    gated.open_gate()
    assert receive(stuck) == [b"b"]


@every_trigger
@pytest.mark.parametrize("first", [b"b", b"B"], ids=["in C", "passed on to Python"])
def test_its_own_later_messages_come_in_order(make_pool, make_client, gated, trigger, first):
    """Those of the same burst and those that arrived meanwhile; also when it passes on what it blocked with."""
    pool = make_pool(gated, framing=FRAMING, workers=4, shards=2, trigger=trigger)
    other = make_client(pool)
    stuck = make_client(pool)
    before = [b"e0", b"r1"]
    same = [b"r2", b"e3", b"e4", b"r5"]
    stuck.sendall(pack(*before, first, *same))
    wait_until(lambda: gated.waiting)
    say(other, b"e")
    later = [b"er"[i % 2 :][:1] + b"later%d" % i for i in range(50)]
    for body in later:
        stuck.sendall(pack(body))
        say(other, b"e")
    gated.open_gate()
    expected = [*before, first, *same, *later]
    assert receive(stuck, len(expected)) == expected


@pytest.mark.parametrize("shards", [1, 2])
def test_one_of_fifty_that_speak_at_once(make_pool, make_client, gated, shards):
    """The batch that it is part of is run to its end by another worker, each message once."""
    pool = make_pool(gated, framing=FRAMING, workers=3, shards=shards)
    clients = [make_client(pool) for _ in range(50)]
    wait_until(lambda: len(pool) == 50)
    for i, client in enumerate(clients):
        client.sendall(pack(b"b" if i == 20 else b"r%d" % i if i % 3 == 0 else b"e%d" % i))
    for i, client in enumerate(clients):
        if i != 20:
            assert receive(client) == [b"r%d" % i if i % 3 == 0 else b"e%d" % i]
    wait_until(lambda: gated.waiting == 1)  # it need not be the first of its batch
    gated.open_gate()
    assert receive(clients[20]) == [b"b"]
    wait_until(lambda: pool.stats().messages == 50)


def test_what_it_has_sent_goes_out_at_once(make_pool, make_client, gated):
    """And what others send to it."""
    pool = make_pool(gated, framing=FRAMING, workers=4)
    (stuck,) = block(pool, gated, make_client, 1, b"p")
    assert receive(stuck) == [b"waiting"]
    socket_of(pool, stuck).send_message(b"from outside")
    assert receive(stuck) == [b"from outside"]
    gated.open_gate()
    assert receive(stuck) == [b"p"]


@pytest.mark.parametrize(("workers", "shards"), [(1, 1), (3, 1), (2, 2), (3, 2)])
def test_all_workers_block_and_everything_is_served_afterwards(make_pool, make_client, gated, workers, shards):
    pool = make_pool(gated, framing=FRAMING, workers=workers, shards=shards)
    stuck = block(pool, gated, make_client, workers)
    waiting = [make_client(pool) for _ in range(30)]
    for i, client in enumerate(waiting):
        client.sendall(pack(b"e%d" % i, b"r%d" % i))
    gated.open_gate()
    assert [receive(client) for client in stuck] == [[b"b"]] * workers
    assert [receive(client, 2) for client in waiting] == [[b"e%d" % i, b"r%d" % i] for i in range(30)]


def test_blocking_again_and_again(make_pool, make_client):
    """Short blocks on many connections, so that shards change hands all the time; nothing is lost or run twice."""
    commands = Mixed()
    pool = make_pool(commands, framing=FRAMING, workers=4, shards=2, slow_handler=10)
    clients = [make_client(pool) for _ in range(6)]
    n = scaled(8, 3)
    bodies = [body for i in range(n) for body in (b"e%d" % i, b"z%d" % i, b"r%d" % i)]

    def talk(client):
        client.sendall(pack(*bodies))
        return receive(client, len(bodies))

    assert in_threads(*(lambda client=client: talk(client) for client in clients)) == [bodies] * 6
    wait_until(lambda: pool.stats().messages == 6 * len(bodies))


@pytest.mark.parametrize("how", ["close", "reset"])
def test_the_peer_goes_while_its_handler_blocks(make_pool, make_client, gated, how):
    """It is disconnected once, after its handler has returned."""
    pool = make_pool(gated, framing=FRAMING, workers=4)
    (stuck,) = block(pool, gated, make_client, 1)
    other = make_client(pool)
    if how == "close":
        stuck.close()
    else:
        reset(stuck)
    assert say(other, b"e") == [b"e"]
    assert gated.counts["disconnected"] == 0
    gated.open_gate()
    wait_counts(gated, disconnected=1, released=1, received=2)


def test_it_may_be_closed_while_it_blocks(make_pool, make_client, gated):
    """What it sends afterwards is refused, what it sent before is not lost."""
    pool = make_pool(gated, framing=FRAMING, workers=4)
    (stuck,) = block(pool, gated, make_client, 1, b"p")
    stuck.sendall(pack(b"e never"))
    assert socket_of(pool, stuck).close()
    assert receive(stuck) == [b"waiting"]
    gated.open_gate()
    with contextlib.suppress(ConnectionResetError):  # its last message was never read
        assert recv_until_eof(stuck) == b""
    wait_counts(gated, disconnected=1, released=1)


def test_stop_waits_for_it(make_pool, make_client, gated):
    """For as long as it was told to; then the rest ends when the handler does."""
    pool = make_pool(gated, framing=FRAMING, workers=3)
    (stuck,) = block(pool, gated, make_client, 1)
    assert pool.stop(0.2) is False
    gated.open_gate()
    assert pool.stop(patient(10)) is True
    wait_counts(gated, connected=1, disconnected=1, released=1)
    stuck.close()


@pytest.mark.parametrize("shards", [1, 2])
def test_connected_may_block_too(make_pool, make_client, gated, shards):
    pool = make_pool(gated, framing=FRAMING, workers=4, shards=shards)
    other = make_client(pool)
    say(other, b"e")
    gated.blocks_connects = True
    stuck = make_client(pool)
    stuck.sendall(pack(b"e early"))
    wait_until(lambda: gated.waiting == 1)
    for i in range(10):
        assert say(other, b"e%d" % i) == [b"e%d" % i]
    gated.open_gate()
    assert receive(stuck) == [b"e early"]
    wait_counts(gated, connected=2, adopted=0)


# ------------------------------------------------------------------------------------------------- in parallel


def test_hooks_of_two_connections_run_at_the_same_time(make_pool, make_client):
    """Two shards with a worker each, and nobody who could take over: each waits inside for the other."""
    pool = make_pool(Meeting(), workers=2, shards=2)
    clients = [make_client(pool) for _ in range(2)]
    for client in clients:
        client.sendall(b"x")
    assert [recv_exact(client, 1) for client in clients] == [b"2", b"2"]


def test_with_one_worker_they_do_not(make_pool, make_client):
    """What the test above would say if hooks did not run in parallel."""
    meeting = Meeting()
    meeting.seconds = 0.2
    pool = make_pool(meeting, workers=1, shards=1)
    clients = [make_client(pool) for _ in range(2)]
    for client in clients:
        client.sendall(b"x")
    assert sorted(recv_exact(client, 1) for client in clients) == [b"1", b"2"]


def test_the_pool_chooses_a_shard_for_each_core(make_pool, make_client):
    """Compiled handlers need no GIL: by default they run in parallel on every build."""
    meeting = Meeting()
    cores = min(len(os.sched_getaffinity(0)), 9)
    meeting.wanted = cores
    pool = make_pool(meeting, workers=cores)
    clients = [make_client(pool) for _ in range(cores)]
    for client in clients:
        client.sendall(b"x")
    assert [recv_exact(client, 1) for client in clients] == [b"%d" % cores] * cores


# ----------------------------------------------------------------------------------------------- what is measured


def test_on_slow_hears_of_a_slow_hook(make_pool, make_client):
    """Of the slow one only, with its time; the socket's later messages are served."""
    slow = []

    class Watching(Mixed):
        def on_slow(self, sock, seconds):
            slow.append((sock.peer, seconds))

    pool = make_pool(Watching(), framing=FRAMING, workers=2, slow_handler=0.1)
    client, other = make_client(pool), make_client(pool)
    for _ in range(scaled(50)):
        say(other, b"e")
    assert say(client, b"e0", b"z1", b"e2", b"r3") == [b"e0", b"z1", b"e2", b"r3"]

    def its_own():
        return [seconds for peer, seconds in slow if seconds >= 0.15 and peer == client.getsockname()]

    wait_until(its_own)
    assert min(its_own()) < patient(1)
    assert len(its_own()) == 1 or PATIENCE > 1  # beside other suites any hook may take as long


def test_on_most_elapsed_hears_of_the_slowest_job(make_pool, make_client):
    elapsed = []
    pool = make_pool(None, listen=None, start=False, framing=FRAMING, slow_handler=10)
    pool.setEventMostElapsed(lambda sock, seconds: elapsed.append(seconds))
    pool.listen("127.0.0.1", 0)
    pool.create(2, None, 0, Mixed())
    client = make_client(pool)
    say(client, b"e", b"z")
    wait_until(lambda: any(0.15 <= seconds < patient(1) for seconds in elapsed))


def test_stats_count_compiled_hooks(make_pool, make_client):
    """Messages exactly; jobs and their time, those of the connection's beginning and end included."""
    pool = make_pool(Mixed(), framing=FRAMING, workers=2, slow_handler=10)
    bodies = [b"e%d" % i for i in range(200)] + [b"z"] + [b"r%d" % i for i in range(50)]
    begin = time.monotonic()
    client = make_client(pool)
    assert say(client, *bodies) == bodies
    client.close()
    wait_until(lambda: len(pool) == 0)
    lasted = time.monotonic() - begin  # any of the hooks, the first and the last too, may be held up
    stats = pool.stats()
    assert stats.messages == len(bodies)
    assert stats.bytes_in == stats.bytes_out == len(pack(*bodies))
    jobs = sum(worker.exec_count for worker in stats.workers)
    assert jobs == 200 + 1 + 2 * 50 + 3  # a message that is passed on is two calls; connected, eof, disconnected
    assert 0.15 <= sum(worker.sum_time for worker in stats.workers) <= lasted + 0.1
    assert 0.15 <= max(worker.most_elapsed for worker in stats.workers) <= lasted
    assert stats.spins == 0


def test_thread_no_is_the_workers_number(make_pool, make_client):
    seen = []

    class Watching(Mixed):
        def on_message(self, sock, data):
            seen.append((sock.thread_no, threading.current_thread().name))

    pool = make_pool(Watching(), framing=FRAMING, workers=3, shards=2, name="pool")
    client = make_client(pool)
    assert socket_of(pool, client).thread_no in (-1, 0, 1, 2)
    client.sendall(pack(b"e", b"r"))
    receive(client)
    wait_until(lambda: seen)
    ((number, name),) = seen
    assert name == f"pool-{number}"


# ------------------------------------------------------------------------------------------------ how they end


@every_trigger
def test_a_half_close_gets_every_reply(make_pool, make_client, trigger):
    commands = Mixed()
    pool = make_pool(commands, framing=FRAMING, workers=2, trigger=trigger)
    for n in range(1, scaled(20) + 1):
        with connect(pool) as client:
            data = pack(*(b"er"[i % 2 :][:1] + b"%d" % i for i in range(n * 20)))
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            assert recv_until_eof(client) == data
        wait_counts(commands, connected=n, disconnected=n, released=n)


def test_half_a_message_at_the_end_is_dropped(make_pool, make_client):
    commands = Mixed()
    client = make_client(make_pool(commands, framing=FRAMING))
    client.sendall(pack(b"e1", b"e2")[:-1])
    client.shutdown(socket.SHUT_WR)
    assert recv_until_eof(client) == pack(b"e1")
    wait_counts(commands, received=1, disconnected=1, released=1)


@pytest.mark.parametrize("shards", [1, 2])
def test_stop_under_load(make_pool, make_client, shards):
    """Clients that stream get replies in order up to an end; each connection is disconnected and released once."""
    commands = Mixed()
    pool = make_pool(commands, framing=FRAMING, workers=4, shards=shards)
    data = pack(*(b"er"[i % 3 // 2 :][:1] + b"%d" % i for i in range(1000)))
    begun = threading.Barrier(5)

    def talk(client):
        for n in range(10_000):
            try:
                assert round_trip(client, data) == data
            except (EOFError, ConnectionError):
                assert n > 0
                return
            if n == 0:
                begun.wait(patient(20))
        raise AssertionError("stop() came too late for this test")

    def stop():
        begun.wait(patient(20))
        # All of the first second is taken: they never pause. A worker that is held up in a hook then is not waited for.
        return pool.stop(1) or pool.stop(patient(10))

    clients = [make_client(pool) for _ in range(4)]
    *_, stopped = in_threads(*(lambda client=client: talk(client) for client in clients), stop, timeout=60)
    assert stopped is True
    wait_counts(commands, timeout=0, connected=4, disconnected=4, released=4)


def test_a_reply_queued_before_stop_is_sent(make_pool, make_client):
    pool = make_pool(FramedEcho(), framing=FRAMING)
    client = make_client(pool)
    size = 4 << 20
    socket_of(pool, client).send(b"z" * size)
    results = in_threads(lambda: pool.stop(patient(10)), lambda: len(recv_until_eof(client)))
    assert results == [True, size]


def test_chaos(make_pool):
    """Connections of all kinds come and go while handlers block, pass on, ask and close; the books balance."""
    commands = Mixed()
    commands.open_gate()
    pool = make_pool(commands, framing=FRAMING, workers=4, shards=2, slow_handler=10)
    over = threading.Event()

    def visit(seed):
        for i in range(scaled(40, 5)):
            number = seed * 7 + i * 13
            letters = b"errnseenbeerBeeprenzs" if number % 10 == 0 else b"errnseeneeren"
            bodies = [letters[(number + k) % len(letters) :][:1] + b"%d" % k for k in range(number % 30)]
            with connect(pool) as client:
                try:
                    client.sendall(pack(*bodies, (b"q", b"c", b"e", b"r")[number % 4]))
                    if number % 3 == 0:
                        client.shutdown(socket.SHUT_WR)
                        recv_until_eof(client)
                    elif number % 3 == 1:
                        reset(client)
                except ConnectionError:
                    pass

    def disturb():
        for _ in range(1_000_000):
            if over.is_set():
                return
            for sock in pool.sockets():
                pool.need_send(sock)
                sock.pause()
                sock.resume()

    disturber = threading.Thread(target=disturb)
    disturber.start()
    try:
        in_threads(*(lambda seed=seed: visit(seed) for seed in range(4)), timeout=100)
    finally:
        over.set()
        disturber.join()
    wait_until(lambda: len(pool) == 0)
    counts = wait_counts(commands, adopted=0)
    assert counts["connected"] == counts["disconnected"] == counts["released"]
    assert counts["copies_made"] == counts["copies_freed"]
    stats = pool.stats()
    assert stats.accepted == stats.closed


def test_what_python_returns_while_blocked_in_c_is_applied(make_pool, make_client, gated):
    """The entry of a handler that blocked, lost its shard and then passed on is finished like any other."""

    class Ending(Commands):
        def on_message(self, sock, data):
            sock.send_message(b"end")
            return TstStat.DISCONNECT

    ending = Ending()
    pool = make_pool(ending, framing=FRAMING, workers=3)
    other = make_client(pool)
    (stuck,) = block(pool, ending, make_client, 1, b"B")
    assert say(other, b"e") == [b"e"]
    ending.open_gate()
    assert recv_until_eof(stuck) == pack(b"end")
    assert say(other, b"e") == [b"e"]
    wait_counts(ending, disconnected=1, released=1)
