"""S2, S4, S34, B42, B43: the second entry style, TstPool(handler) with listen, start, stop."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from contract_helpers import (
    Gate,
    ServerProcess,
    as_function,
    echo,
    every_trigger,
    free_port,
    handler,
    in_threads,
    round_trip,
    serve,
)
from downstream_handlers import Echo
from helpers import (
    PATIENCE,
    SANITIZER,
    connect,
    native_threads,
    open_fds,
    patient,
    recv_exact,
    recv_until_eof,
    scaled,
    wait_until,
)

import tstpool
from tstpool import TstError, TstPool


def test_listen_returns_the_real_address_and_start_serves(make_pool, make_client):
    """S2: port 0 asks the kernel for a port, and listen says which."""
    pool = make_pool(handler(on_message=echo), listen=None, start=False)
    host, port = pool.listen("127.0.0.1", 0)
    assert host == "127.0.0.1"
    assert port > 0
    assert pool.addresses == [(host, port)]
    assert not pool.running
    pool.start()
    assert pool.running
    assert round_trip(make_client((host, port)), b"hello") == b"hello"


def test_a_client_that_connects_before_start_is_served_after_it(make_pool, make_client):
    """S2: listen makes the backlog, start serves it."""
    pool = make_pool(handler(on_message=echo), start=False)
    client = make_client(pool)
    client.sendall(b"early")
    pool.start()
    assert client.recv(5) == b"early"


def test_a_plain_callable_is_a_handler_too(make_pool, make_client):
    """DESIGN 4: TstPool(function)."""
    pool = make_pool(as_function(echo))
    assert round_trip(make_client(pool), b"hello") == b"hello"


def test_several_listeners_before_and_after_start(make_pool, make_client):
    """S19: all of them are served, also one that is added while the pool runs."""
    pool = make_pool(handler(on_message=echo))
    pool.listen("127.0.0.1", 0)
    assert len(pool.addresses) == 2
    for address in pool.addresses:
        assert round_trip(make_client(address), b"hello") == b"hello"
    assert pool.stats().listeners == 2


def test_the_context_manager_starts_and_stops(make_client):
    """Issue 2: `with pool:`; a pool that runs already may be entered too."""
    pool = TstPool(handler(on_message=echo), workers=2)
    pool.listen("127.0.0.1", 0)
    with pool as entered:
        assert entered is pool
        assert round_trip(make_client(pool), b"hello") == b"hello"
    assert not pool.running
    pool.listen("127.0.0.1", 0)
    pool.start()
    with pool:
        assert round_trip(make_client(pool), b"hello") == b"hello"
    assert not pool.running


def test_the_context_manager_stops_when_the_body_raises():
    """Issue 2: and lets the exception through."""
    pool = TstPool(handler(on_message=echo))
    with pytest.raises(ZeroDivisionError), pool:
        raise ZeroDivisionError
    assert not pool.running


def test_start_twice_is_an_error_and_the_pool_goes_on(make_pool, make_client):
    """Bad input: start twice."""
    pool = make_pool(handler(on_message=echo), workers=2)
    before = native_threads()
    with pytest.raises(TstError):
        pool.start()
    assert native_threads() <= before
    assert round_trip(make_client(pool), b"hello") == b"hello"


def test_start_without_a_handler_is_an_error():
    """Bad input: nobody to call."""
    pool = TstPool()
    with pytest.raises(TstError):
        pool.start()
    assert not pool.running


def test_stop_before_start_closes_the_listeners():
    """B42."""
    pool = TstPool(handler(on_message=echo))
    address = pool.listen("127.0.0.1", 0)
    assert pool.stop() is True
    assert pool.addresses == []
    with pytest.raises(ConnectionRefusedError):
        connect(address)


def test_stop_twice_is_harmless(make_pool):
    """B42."""
    pool = make_pool(handler(on_message=echo))
    assert pool.stop() is True
    assert pool.stop() is True
    assert not pool.running


def test_a_stopped_pool_may_start_again(make_pool, make_client):
    """SPEC: after stop, listen and start once more."""
    pool = make_pool(handler(on_message=echo))
    pool.stop()
    pool.listen("127.0.0.1", 0)
    pool.start()
    assert round_trip(make_client(pool), b"again") == b"again"


@pytest.mark.parametrize("rounds", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_start_and_stop_on_the_same_port_many_times(make_client, rounds):
    """B43: no EADDRINUSE, no descriptor and no thread more than before."""
    port = free_port()
    fds, threads = open_fds().keys(), native_threads()
    pool = TstPool(handler(on_message=echo), workers=4)
    for _ in range(scaled(rounds)):
        pool.listen("127.0.0.1", port)
        pool.start()
        with connect(("127.0.0.1", port)) as client:
            assert round_trip(client, b"hello") == b"hello"
        assert pool.stop() is True
    # Fewer is right as well: a thread of the test before may still have been ending at the start.
    wait_until(lambda: open_fds().keys() <= fds and native_threads() <= threads)


@pytest.mark.parametrize("rounds", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_create_and_destroy_on_the_same_port_many_times(rounds):
    """B43, in the original's style."""
    port = free_port()
    fds, threads = open_fds().keys(), native_threads()
    pool = TstPool()
    for _ in range(scaled(rounds)):
        pool.create(4, "127.0.0.1", port, as_function(echo))
        with connect(("127.0.0.1", port)) as client:
            assert round_trip(client, b"hello") == b"hello"
        assert pool.destroy() is True
    # Fewer is right as well: a thread of the test before may still have been ending at the start.
    wait_until(lambda: open_fds().keys() <= fds and native_threads() <= threads)


def test_stop_inside_a_handler_starts_the_stop_and_returns_at_once(make_pool, make_client):
    """B42, bad input: it can't wait for itself; the pool ends soon after the handler returned."""
    took, started = [], threading.Event()

    def stop_it(sock, data):
        begin = time.monotonic()
        pool.stop(patient(5))
        took.append(time.monotonic() - begin)
        started.set()

    pool = make_pool(handler(on_message=stop_it), workers=2)
    client = make_client(pool)
    client.sendall(b"x")
    assert started.wait(patient(10))
    assert took[0] < patient(1)
    assert client.recv(1) == b""
    wait_until(lambda: not pool.running)
    assert pool.stop() is True


@pytest.mark.parametrize("method", ["stop", "destroy"])
def test_stop_from_several_threads_at_once(make_pool, make_client, method):
    """B42: each of them returns, none hangs, the pool is stopped after any of them."""
    pool = make_pool(handler(on_message=echo), workers=4)
    round_trip(make_client(pool), b"hello")

    def stop():
        getattr(pool, method)(5.0)
        return pool.running

    assert in_threads(*[stop] * 4) == [False] * 4


@pytest.mark.parametrize("style", ["create", "handler"])
def test_stop_waits_for_a_running_handler(make_pool, make_client, style):
    """S34: it returns True, and only after the handler ended; its answer is sent first."""
    finished = []

    with Gate() as gate:

        def slow(sock, data):
            gate.wait()
            sock.send(b"answer")
            finished.append(True)

        pool = serve(make_pool, style, slow, workers=2)
        address = pool.addresses[0]
        client = make_client(address)
        client.sendall(b"x")
        wait_until(lambda: gate.inside)
        stopper = threading.Thread(target=lambda: finished.append(pool.destroy(patient(10))))
        stopper.start()
        wait_until(lambda: refuses(address))
        assert finished == []
        gate.open()
        stopper.join(patient(10))
    assert finished == [True, True]
    assert client.recv(100) == b"answer"
    assert client.recv(1) == b""


def refuses(address):
    try:
        connect(address).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:
        pass  # the listener went while we were in its backlog
    return False


def test_stop_gives_up_waiting_after_its_time_and_kills_nobody(make_pool, make_client):
    """S34, defect 10: False after the drain time; the blocked worker lives, and ends by itself later."""
    after = []
    with Gate() as gate:

        def stuck(sock, data):
            gate.wait()
            after.append(threading.current_thread())

        pool = make_pool(handler(on_message=stuck), workers=2)
        make_client(pool).sendall(b"x")
        wait_until(lambda: gate.inside)
        begin = time.monotonic()
        assert pool.stop(drain=0.1) is False
        assert time.monotonic() - begin < (3 if PATIENCE == 1 else patient(1.5))
        gate.open()
        wait_until(lambda: after)
        wait_until(lambda: not after[0].is_alive())
    assert pool.stop() is True


def test_destroy_while_every_worker_is_busy_then_all_return(make_pool, make_client):
    """S34, defect 10: the original frees the mutexes of threads that still hold them."""
    with Gate() as gate:
        pool = serve(make_pool, "create", lambda sock, data: gate.wait(), workers=4)
        for _ in range(4):
            make_client(pool).sendall(b"x")
        wait_until(lambda: gate.inside == 4)
        assert pool.destroy(0.05) is False
        gate.open()
        wait_until(lambda: not gate.inside)
    assert pool.destroy(5.0) is True


def test_no_handler_runs_after_stop_returned_true(make_pool, make_client):
    """B41: also under load."""
    calls, stop = [], threading.Event()
    pool = make_pool(handler(on_message=lambda sock, data: calls.append(1)), workers=2)
    client = make_client(pool)

    def flood():
        try:
            while not stop.is_set():
                client.sendall(b"x" * 100)
        except OSError:
            pass

    sender = threading.Thread(target=flood)
    sender.start()
    wait_until(lambda: len(calls) > 100)
    assert pool.stop() is True
    count = len(calls)
    stop.set()
    sender.join(10)
    assert len(calls) == count


@pytest.mark.parametrize("shards", [1, 2])
@every_trigger
def test_stop_closes_the_listeners_before_it_lets_go_of_anybody(make_pool, make_client, trigger, shards):
    """B41: a handler that runs sees that its own listener refuses already; then it replies, and its peer gets that."""
    refused = []

    def on_message(sock, data):
        def is_refused():
            try:
                connect(address).close()
            except (ConnectionRefusedError, ConnectionResetError):
                return True

        inside.set()
        stopping.wait(patient(10))
        wait_until(is_refused)
        refused.append(sock.closed)
        sock.send(b"the last reply")

    inside, stopping = threading.Event(), threading.Event()
    pool = make_pool(handler(on_message=on_message), workers=4, trigger=trigger, shards=shards)
    address = pool.addresses[0]
    client = make_client(pool)
    client.sendall(b"x")
    assert inside.wait(patient(10))  # else it might still be in the backlog of a listener that goes

    def stop():
        stopping.set()
        return pool.stop(drain=patient(10))

    result, reply = in_threads(stop, lambda: recv_until_eof(client))
    assert result is True
    assert reply == b"the last reply"
    assert refused == [False]


def test_stop_closes_each_of_many_listeners(make_pool):
    """Also of those that came after the start."""
    pool = make_pool(handler(on_message=echo), workers=4, shards=1, start=False)
    for number in range(60):
        if number == 30:
            pool.start()
        pool.listen("127.0.0.1", 0)
    addresses = pool.addresses
    assert len(set(addresses)) == 61
    with connect(addresses[30]) as client:
        assert round_trip(client, b"hello") == b"hello"
    assert pool.stop(drain=5)
    for address in addresses:
        with pytest.raises(ConnectionRefusedError):
            connect(address)


LATE_LISTENERS = """
def descriptors():
    names = os.listdir("/proc/self/fd")
    return {int(name) for name in names if os.path.lexists("/proc/self/fd/" + name)}  # the listing's own is gone

pool = TstPool(Echo(), workers=2, shards=1)
port = pool.listen("127.0.0.1", 0)[1]
pool.start()
clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(600)]
while len(pool.sockets()) < 600:
    time.sleep(0.001)
before = descriptors()
listeners = [pool.listen("127.0.0.1", 0) for _ in range(3)]
for client in clients:
    client.send(b"hello")
    assert client.recv(5) == b"hello"
print(port)
print(*(descriptors() - before))
print(*(sock.sd for sock in pool.sockets()))
sys.stdin.read()
pool.stop()
"""


@pytest.mark.skipif(shutil.which("strace") is None or bool(SANITIZER), reason="needs strace, and no sanitizer")
def test_listeners_are_closed_first_whatever_their_descriptors(tmp_path):
    """B41: the order of the system calls of a stop with more connections than one turn ends: listeners that came late,
    and so have higher descriptors, are closed before any connection is. (Several shards stop side by side: there a
    connection of another shard may be a moment ahead of the last listener.)"""
    log = tmp_path / "strace"
    with ServerProcess(LATE_LISTENERS) as server:
        late, connections = ([int(word) for word in server.process.stdout.readline().split()] for _ in range(2))
        command = ["strace", "-f", "-qq", "-e", "trace=close", "-o", str(log), "-p", str(server.process.pid)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as trace:
            wait_until(lambda: traced(server.process.pid) or trace.poll() is not None)
            server.finish()
            trace.communicate(timeout=patient(20))
    closed = [int(number) for number in re.findall(r"close\((\d+)", log.read_text() if log.exists() else "")]
    if not closed:
        pytest.skip("strace may not attach")
    assert (len(late), len(connections)) == (3, 600)
    assert min(late) > max(connections)
    assert max(map(closed.index, late)) < min(map(closed.index, connections))


def traced(pid):
    """Somebody watches all of its threads."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return all("TracerPid:\t0\n" not in (task / "status").read_text() for task in tasks)


def test_queued_output_is_sent_before_the_connection_ends(make_pool, make_client):
    """S34: stop sends first what the handlers had queued, even to a slow reader."""
    queued = threading.Event()

    def reply(sock, data):
        sock.send(b"z" * (2 << 20))
        queued.set()

    pool = make_pool(handler(on_message=reply), workers=2)
    client = make_client(pool)
    client.sendall(b"x")
    assert queued.wait(10)
    result, received = in_threads(
        lambda: pool.stop(drain=20), lambda: sum(len(piece) for piece in iter(lambda: client.recv(1 << 14), b""))
    )
    assert result is True
    assert received == 2 << 20


def test_a_peer_that_never_reads_does_not_hold_stop_longer_than_its_time(make_pool, make_client):
    """B41: what is left after the drain time is dropped."""
    queued = threading.Event()

    def reply(sock, data):
        sock.send(b"z" * (32 << 20))
        queued.set()

    pool = make_pool(handler(on_message=reply), workers=2)
    make_client(pool).sendall(b"x")
    assert queued.wait(10)
    begin = time.monotonic()
    pool.stop(drain=0.2)
    assert time.monotonic() - begin < (3 if PATIENCE == 1 else patient(1.5))
    assert not pool.running


def test_a_peer_that_never_reads_does_not_outlive_the_drain_of_a_stop_that_nobody_waits_for(make_pool, make_client):
    """B41, B42: stop() inside a handler returns at once; the engine itself must cut off what is left after the time."""

    def reply(sock, data):
        sock.send(b"z" * (32 << 20))
        pool.stop(0.2)

    pool = make_pool(handler(on_message=reply), workers=2, name="draining", linger_timeout=patient(5))
    make_client(pool).sendall(b"x")
    # An ordinary close would give the peer as long as that.
    wait_until(lambda: not any(thread.name.startswith("draining") for thread in threading.enumerate()), timeout=3)


def test_serve_on_a_thread_leaves_signals_alone_and_ends_when_somebody_stops_the_pool(make_client, monkeypatch):
    """Only the main thread may set what a signal does."""
    pools = []

    def make(*arguments, **options):
        pools.append(TstPool(*arguments, **options))
        return pools[-1]

    monkeypatch.setattr("tstpool._serve.TstPool", make)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    server = threading.Thread(target=tstpool.serve, args=(handler(on_message=echo),), kwargs={"host": "127.0.0.1"})
    server.start()
    try:
        wait_until(lambda: pools and pools[0].running)
        assert round_trip(make_client(pools[0]), b"hello") == b"hello"
        assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    finally:
        pools[0].stop(1)
        server.join(patient(10))
    assert not server.is_alive()


def test_while_it_drains_it_still_counts_whose_handlers_run(make_pool, make_client):
    """S28: listeners go first, and are not taken for connections that have gone."""
    gate = Gate()
    pool = make_pool(handler(on_message=lambda sock, data: gate.wait()))
    client = make_client(pool)
    client.sendall(b"hello")
    wait_until(lambda: gate.inside)
    thread = threading.Thread(target=pool.stop)
    thread.start()
    try:
        wait_until(lambda: refuses(client.getpeername()))
        # One that refuses() has made before may still be among them.
        wait_until(lambda: len(pool) == pool.stats().connections == 1)
    finally:
        gate.open()
        thread.join()
    assert len(pool) == 0


@pytest.mark.parametrize(("drain", "error"), [(-1, ValueError), (float("nan"), ValueError), (None, TypeError)])
def test_serve_forever_says_at_once_that_drain_is_wrong(drain, error):
    """Not when it is interrupted: it would go on serving."""
    with pytest.raises(error):
        TstPool(handler()).serve_forever(drain=drain)


def test_serve_forever_ends_when_somebody_stops_the_pool(make_client):
    """Issue 2: serve_forever starts if needed and blocks until stop()."""
    pool = TstPool(handler(on_message=echo), workers=2)
    pool.listen("127.0.0.1", 0)
    server = threading.Thread(target=pool.serve_forever)
    server.start()
    wait_until(lambda: pool.running)
    assert round_trip(make_client(pool), b"hello") == b"hello"
    assert server.is_alive()
    pool.stop()
    server.join(10)
    assert not server.is_alive()


def test_workers_are_named_non_daemon_python_threads(make_pool):
    """Issue 2: tstpool-0 ... are what threading, debuggers and profilers show."""
    before = set(threading.enumerate())
    make_pool(handler(on_message=echo), workers=3)
    started = sorted(set(threading.enumerate()) - before, key=lambda thread: thread.name)
    assert [thread.name for thread in started] == ["tstpool-0", "tstpool-1", "tstpool-2"]
    assert not any(thread.daemon for thread in started)


def test_thread_no_is_the_number_in_the_thread_name(make_pool, make_client):
    """S36: sock.thread_no tells which worker runs the handler."""
    seen = []
    pool = make_pool(
        handler(on_message=lambda sock, data: seen.append((sock.thread_no, threading.current_thread().name))),
        workers=3,
        name="numbered",
    )
    make_client(pool).sendall(b"x")
    wait_until(lambda: seen)
    number, name = seen[0]
    assert number in range(3)
    assert name == f"numbered-{number}"


def test_the_default_number_of_workers(make_pool):
    """DESIGN 3: min(32, cores + 4); cores are those this process may use, or those of the machine."""
    pool = TstPool(handler(on_message=echo))
    cores = {os.cpu_count(), len(os.sched_getaffinity(0))}
    assert pool.workers in {min(32, n + 4) for n in cores}
    assert pool.trigger == "level"
    assert tstpool.__version__ == "0.1.0"


def test_counters_begin_anew_with_each_start():
    """Those that no worker keeps, too; what was added before start() belongs to the run that closes it."""
    pool = TstPool(handler(on_message=echo), workers=1)
    for _ in range(2):
        ours, theirs = socket.socketpair()
        with theirs:
            sock = pool.addsocket(ours)
            pool.start()
            sock.send(b"hello")
            sock.flush(10)  # on this thread, perhaps: such bytes are counted apart
            assert recv_exact(theirs, 5) == b"hello"
        wait_until(lambda: not len(pool))
        stats = pool.stats()
        assert (stats.accepted, stats.added, stats.closed, stats.bytes_out) == (0, 1, 1, 5)
        assert pool.stop()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("workers", [1, 4])
def test_shards_unless_told_otherwise(make_pool, compiled, workers):
    """One under a GIL, for more would only wait for each other; one a core where handlers run at the same time."""
    before = list(open_fds().values()).count("anon_inode:[eventpoll]")
    make_pool(Echo() if compiled else handler(on_message=echo), workers=workers)
    with_gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    expected = 1 if with_gil and not compiled else min(workers, len(os.sched_getaffinity(0)))
    assert list(open_fds().values()).count("anon_inode:[eventpoll]") - before == expected
