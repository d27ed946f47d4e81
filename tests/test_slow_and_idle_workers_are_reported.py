"""S24, S36, S37: on_slow, setEventMostElapsed, on_idle, stats()."""

import dataclasses
import logging
import threading
import time

import pytest
from compiled_helpers import FRAMING, pack, receive
from contract_helpers import Gate, as_function, echo, every_style, handler, round_trip, serve
from downstream_handlers import Commands
from helpers import FREE_THREADED, PATIENCE, patient, quick_switches, recv_exact, recv_until_eof, wait_until

from tstpool import PoolStats, WorkerStats


def slow_echo(sock, data):
    """The length of the message is the length of the job, in milliseconds."""
    time.sleep(len(data) / 1000)
    sock.send(data)


@pytest.mark.parametrize("arguments", [1, 2])
def test_most_elapsed_is_called_for_each_new_record_of_a_worker(make_pool, make_client, arguments):
    """S24: f(sock) or f(sock, seconds); a job that is no record calls nobody."""
    records, jobs = [], []

    def one(sock):
        records.append(None)

    def two(sock, seconds):
        records.append(seconds)

    def job(sock, data):
        slow_echo(sock, data)
        jobs.append(len(records))

    pool = make_pool(as_function(job), start=False, workers=1)
    pool.setEventMostElapsed(one if arguments == 1 else two)
    pool.start()
    client = make_client(pool)

    def ask(milliseconds):
        round_trip(client, b"x" * milliseconds)
        wait_until(lambda: pool.stats().workers[0].exec_count == len(jobs))

    def longer():
        # On a busy machine a job takes longer than it sleeps: a record is what is longer than all before have been.
        return int(pool.stats().workers[0].most_elapsed * 1000) + 40

    ask(longer())
    ask(longer())
    ask(1)
    ask(longer())
    wait_until(lambda: len(records) >= 3)
    ask(1)
    assert len(records) >= 3
    assert jobs[-1] == jobs[-2] + 1  # the last long one was a record, and nothing has been since
    if arguments == 2:
        assert records == sorted(records)
        assert 0.09 < records[-1] < 10


def test_on_slow_is_called_for_each_job_over_the_limit(make_pool, make_client):
    """S24: with the seconds; quick jobs don't count."""
    slow = []
    limit = 0.04 if PATIENCE == 1 else patient(0.25)  # a quick job may be held up for a second where others run
    pool = make_pool(
        handler(on_message=slow_echo, on_slow=lambda sock, seconds: slow.append((sock.peer, seconds))),
        slow_handler=limit,
    )
    client = make_client(pool)
    long = int(limit * 1000) + 20
    for milliseconds in (1, long, 1, long, 1):
        round_trip(client, b"x" * milliseconds)
    wait_until(lambda: len(slow) >= 2)
    assert len(slow) == 2
    assert all(peer == client.getsockname() and limit <= seconds < limit + 10 for peer, seconds in slow)


@pytest.mark.parametrize("told", ["log", "on_slow", "most_elapsed"])
def test_a_job_that_is_slow_and_raises_is_reported_and_its_exception_is_handled(make_pool, make_client, told, caplog):
    """S24, B60: a hook that ran while the exception waits would lose it (and crash the interpreter, from 3.12 on)."""
    errors, reports = [], []

    def fails(sock, data):
        time.sleep(0.05)
        raise ValueError(data)

    def on_slow(sock, seconds):
        reports.append(seconds)

    def on_error(sock, exc):
        errors.append(exc)

    hooks = {"on_slow": on_slow} if told == "on_slow" else {}
    pool = make_pool(
        handler(on_message=fails, on_error=on_error, **hooks),
        start=False,
        workers=1,
        slow_handler=0.01,
        framing=FRAMING,
    )
    if told == "most_elapsed":
        pool.setEventMostElapsed(on_slow)
    pool.start()
    with make_client(pool) as client:
        client.sendall(pack(b"hello"))
        assert recv_until_eof(client) == b""
    (error,) = errors
    assert isinstance(error, ValueError)
    assert error.args == (b"hello",)
    wait_until(lambda: reports or (told == "log" and "a handler took" in caplog.text))


def test_a_slow_job_is_logged_by_default(make_pool, make_client, caplog):
    """S24: a warning to the logger "tstpool"."""
    caplog.set_level(logging.WARNING, "tstpool")
    client = make_client(make_pool(handler(on_message=slow_echo), slow_handler=0.01, workers=1))
    round_trip(client, b"x" * 50)
    wait_until(lambda: caplog.records)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("tstpool", logging.WARNING)


@every_style
@pytest.mark.parametrize("shards", [1, 2])
def test_a_handler_that_is_stuck_is_logged_with_its_stack_while_it_runs(make_pool, make_client, caplog, style, shards):
    """B14: by a worker that is free, once for each call, whether or not others come meanwhile."""
    caplog.set_level(logging.WARNING, "tstpool")

    stuck = set()

    def reports():
        # Of the stuck ones: on a busy machine another handler may be as slow.
        lines = [record.getMessage() for record in caplog.records]
        return [line for line in lines if "has been in a handler" in line and line.partition(" ")[0] in stuck]

    for quiet in (True, False):
        caplog.clear()
        stuck.clear()
        with Gate() as gate:

            def stuck_in_here(sock, data, gate=gate):
                if data == b"block":
                    stuck.add(threading.current_thread().name)
                    gate.wait()
                sock.send(data)

            pool = serve(make_pool, style, stuck_in_here, workers=4, shards=shards, slow_handler=0.05, name="slowly")
            first, second, other = (make_client(pool) for _ in range(3))
            for client in (first, second):
                client.sendall(b"block")
            wait_until(lambda gate=gate: gate.inside == 2)
            if not quiet:
                wait_until(lambda client=other: round_trip(client, b"hello") and len(reports()) >= 2)
            wait_until(lambda: len(reports()) >= 2)
            time.sleep(0.3)  # a window in which no more may come
            lines = reports()
            assert gate.inside == len(lines) == 2
            assert len({line.partition(" ")[0] for line in lines}) == 2  # two workers
            for line in lines:
                assert line.startswith("slowly-") and "0.050 s and more" in line
                assert ("in stuck_in_here" in line and "gate.wait()" in line) or FREE_THREADED
            gate.open()
            assert recv_exact(first, 5) == recv_exact(second, 5) == b"block"
            pool.stop()


def test_what_the_log_says_of_a_stuck_handlers_time_is_true(make_pool, make_client):
    """B14: one that is stuck when others are looked at has not been for as long as they have."""
    limit = 0.3
    began, ends, claims = {}, [], []

    def on_message(sock, data):
        began[threading.current_thread().name] = time.monotonic()
        time.sleep(float(data))
        wait_until(lambda: len(claims) >= 2)  # who is to look may be held up
        ends.append(data)

    class Listening(logging.Filter):
        def filter(self, record):
            if "has been in a handler" in record.msg:
                name = record.getMessage().split()[0]
                claims.append((name, time.monotonic() - began[name]))
            return False

    listening = Listening()
    logging.getLogger("tstpool").addFilter(listening)
    try:
        pool = make_pool(handler(on_message=on_message), workers=5, slow_handler=limit)
        first, second = make_client(pool), make_client(pool)
        first.sendall(b"2")
        wait_until(lambda: began)
        time.sleep(0.7 * limit)  # the second one begins when there is little left until they are looked at
        second.sendall(b"1.5")
        wait_until(lambda: len(ends) == 2)
    finally:
        logging.getLogger("tstpool").removeFilter(listening)
    assert len(claims) == 2
    assert all(seconds >= limit for _, seconds in claims), claims


def test_a_log_that_fails_costs_the_worker_nothing(make_pool, make_client, caplog):
    """What a filter of the application raises is logged; the worker that wanted to tell goes on, and so do others."""

    def fail(record):
        if "has been in a handler" in record.getMessage():
            raise ZeroDivisionError
        return True

    def failures():
        return [record for record in caplog.records if record.getMessage() == "a record could not be logged"]

    logger = logging.getLogger("tstpool")
    logger.addFilter(fail)
    try:
        with Gate() as gate:

            def answer(sock, data):
                if data == b"block":
                    gate.wait()
                sock.send(data)

            pool = make_pool(handler(on_message=answer), workers=2, slow_handler=0.02)
            stuck, other = make_client(pool), make_client(pool)
            stuck.sendall(b"block")
            wait_until(failures)
            assert failures()[0].exc_info[0] is ZeroDivisionError
            assert round_trip(other, b"hello") == b"hello"
            gate.open()
            assert recv_exact(stuck, 5) == b"block"
    finally:
        logger.removeFilter(fail)


def test_who_has_an_on_slow_of_its_own_gets_no_such_log(make_pool, make_client, caplog):
    """B14: it is told when the handler has returned."""
    told = []
    with Gate() as gate:
        hooks = {"on_message": lambda sock, data: gate.wait(), "on_slow": lambda sock, seconds: told.append(seconds)}
        make_client(make_pool(handler(**hooks), workers=2, slow_handler=0.02)).sendall(b"block")
        wait_until(lambda: gate.inside)
        time.sleep(0.2)  # a window in which none may come
        gate.open()
        wait_until(lambda: told)
    assert told[0] >= 0.2
    assert caplog.records == []


def test_a_compiled_handler_that_is_stuck_is_logged(make_pool, make_client, caplog):
    """B14: its thread is named."""
    commands = Commands()
    pool = make_pool(commands, framing=FRAMING, workers=3, slow_handler=0.05, name="compiled")
    client = make_client(pool)
    try:
        client.sendall(pack(b"b"))
        wait_until(lambda: commands.waiting == 1)
        wait_until(lambda: any("has been in a handler" in record.getMessage() for record in caplog.records))
    finally:
        commands.open_gate()
    assert receive(client) == [b"b"]


@every_style
def test_an_idle_worker_says_so(make_pool, style):
    """S37: again and again, each idle_time, with the worker's number."""
    numbers = []
    if style == "create":
        pool = make_pool(listen=None, start=False, idle_time=0.05)
        pool.setEventIdle(numbers.append)
        pool.create(2, "127.0.0.1", 0, as_function(echo))
    else:
        pool = make_pool(handler(on_message=echo, on_idle=numbers.append), workers=2, idle_time=0.05)
    begin = time.monotonic()
    wait_until(lambda: len(numbers) >= 4)
    assert time.monotonic() - begin < patient(3)
    assert set(numbers) <= {0, 1}
    assert sum(worker.idle_count for worker in pool.stats().workers) >= 4


def test_an_idle_hook_that_raises_harms_nobody(make_pool, make_client, caplog):
    """B52: it is logged, the worker lives."""
    calls = []

    def fail(worker_no):
        calls.append(worker_no)
        raise ZeroDivisionError

    pool = make_pool(handler(on_message=echo, on_idle=fail), workers=1, idle_time=0.02)
    wait_until(lambda: len(calls) >= 3)
    assert round_trip(make_client(pool), b"hello") == b"hello"
    assert any(record.exc_info and record.exc_info[0] is ZeroDivisionError for record in caplog.records)


@pytest.mark.parametrize("hook", ["on_slow", "setEventMostElapsed"])
def test_a_report_that_raises_harms_nobody(make_pool, make_client, caplog, hook):
    """B52: it is logged, the connection lives."""

    def fail(sock, seconds):
        raise ZeroDivisionError

    hooks = {"on_slow": fail} if hook == "on_slow" else {}
    pool = make_pool(handler(on_message=echo, **hooks), workers=1, slow_handler=0, start=False)
    if not hooks:
        pool.setEventMostElapsed(fail)
    pool.start()
    client = make_client(pool)
    for _ in range(3):
        assert round_trip(client, b"hello") == b"hello"
    assert any(record.exc_info and record.exc_info[0] is ZeroDivisionError for record in caplog.records)


def test_a_busy_worker_is_not_idle(make_pool, make_client):
    """S37: the time counts from the last job."""
    calls, idle_time = [], patient(0.5)
    client = make_client(make_pool(handler(on_message=echo, on_idle=calls.append), workers=1, idle_time=idle_time))
    begin = time.monotonic()
    while time.monotonic() - begin < 1.6 * idle_time:
        round_trip(client, b"x")
    assert len(calls) <= 1


@every_style
def test_stats_of_the_workers(make_pool, make_client, style):
    """S36: the original's names, per worker."""
    pool = serve(make_pool, style, slow_echo, workers=3, slow_handler=10)
    client = make_client(pool)
    begin = time.monotonic()
    for _ in range(5):
        round_trip(client, b"x" * 10)
    wait_until(lambda: sum(worker.exec_count for worker in pool.stats().workers) >= 5)
    workers = pool.stats().workers
    assert [worker.thread_no for worker in workers] == [0, 1, 2]
    assert all(isinstance(worker, WorkerStats) for worker in workers)
    assert sum(worker.sum_time for worker in workers) >= 0.05
    for worker in workers:
        if worker.exec_count == 0:
            assert (worker.sum_time, worker.most_elapsed, worker.average) == (0, 0, 0)
            continue
        assert worker.average == pytest.approx(worker.sum_time / worker.exec_count)
        assert worker.average <= worker.most_elapsed <= worker.sum_time + 1e-9
        assert worker.begin_time <= worker.end_time <= time.monotonic()
    assert max(worker.end_time for worker in workers) >= begin
    assert max(worker.most_elapsed for worker in workers) >= 0.01


@every_style
def test_stats_of_the_pool(make_pool, make_client, style):
    """Issue 2, S36: what the status line shows."""
    pool = serve(make_pool, style, echo)
    first, second = make_client(pool), make_client(pool)
    for _ in range(10):
        round_trip(first, b"0123456789")
    round_trip(second, b"x")
    second.close()
    wait_until(lambda: pool.stats().closed == 1)
    wait_until(lambda: pool.stats().bytes_out == 101)
    wait_until(lambda: pool.stats().messages == 11)  # counted when the handler has returned
    wait_until(lambda: pool.stats().connections == 1)
    stats = pool.stats()
    assert isinstance(stats, PoolStats)
    assert (stats.connections, stats.accepted, stats.closed, stats.listeners) == (1, 2, 1, 1)
    assert (stats.messages, stats.bytes_in, stats.bytes_out) == (11, 101, 101)
    assert (stats.spins, stats.accept_errors) == (0, 0)
    assert isinstance(stats.workers, tuple)
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.messages = 0


def test_stats_may_be_asked_before_start_and_after_stop(make_pool, make_client):
    """S36: a pool that does not run has numbers, too."""
    pool = make_pool(handler(on_message=echo), start=False, workers=2)
    assert pool.stats().messages == 0
    pool.start()
    round_trip(make_client(pool), b"x")
    pool.stop()
    assert pool.stats().connections == 0


def test_stats_from_many_threads_under_load(make_pool, make_client):
    """S36: asking disturbs nobody, and counts never go back."""
    pool = make_pool(handler(on_message=echo), workers=4)
    client, over, wrong = make_client(pool), threading.Event(), []

    def ask():
        last = 0
        while not over.is_set():
            now = pool.stats().messages
            if now < last:
                wrong.append((last, now))
            last = now

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for asker in askers:
        asker.start()
    try:
        with quick_switches():
            for _ in range(300):
                round_trip(client, b"x")
    finally:
        over.set()
        for asker in askers:
            asker.join(10)
    assert wrong == []
