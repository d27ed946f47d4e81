"""B51, B52, issue 2: on_error, one log record, that socket is disconnected, the worker lives."""

import array
import contextlib
import gc
import logging
import socket
import threading
import weakref

import pytest
from contract_helpers import echo, every_style, handler, ignore, in_threads, open_sockets, round_trip, serve
from helpers import patient, recv_until_eof, wait_until

from tstpool import TstHandler, TstStat


class Odd(BaseException):
    """Neither Exception nor one of the known others."""


def recurse(n=0):
    return recurse(n + 1) + 1


def failing(kind):
    """A hook that ends with `kind`, whatever it is called with."""

    def fail(*args):
        if kind is RecursionError:
            recurse()
        raise kind("on purpose")

    return fail


every_exception = pytest.mark.parametrize(
    "kind",
    [Exception, OSError, SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError, RecursionError, StopIteration, Odd],
)


@every_style
@every_exception
@pytest.mark.parametrize("workers", [1, 2])
def test_the_socket_is_closed_and_the_workers_live(make_pool, make_client, caplog, style, kind, workers):
    """B51: one log record with traceback; on_disconnect has the exception; the same threads serve others."""
    fail, ended = failing(kind), []

    def answer(sock, data):
        if data == b"fail":
            fail()
        sock.send(data)

    pool = serve(make_pool, style, answer, on_disconnect=lambda sock, reason: ended.append(reason), workers=workers)
    other = make_client(pool)
    assert round_trip(other, b"before") == b"before"
    threads = set(threading.enumerate())
    for i in range(workers + 1):
        client = make_client(pool)
        client.sendall(b"fail")
        assert client.recv(1) == b""
        wait_until(lambda i=i: len(ended) == i + 1)
    assert round_trip(other, b"after") == b"after"
    assert set(threading.enumerate()) == threads
    assert all(isinstance(reason, kind) for reason in ended)
    records = [record for record in caplog.records if record.name == "tstpool" and record.exc_info]
    assert len(records) == workers + 1
    assert all(record.levelno >= logging.ERROR and isinstance(record.exc_info[1], kind) for record in records)
    assert pool.stats().handler_errors == workers + 1


@every_exception
def test_on_error_is_called_once_instead_of_the_log(make_pool, make_client, caplog, kind):
    """B51: with the socket and the exception, before on_disconnect."""
    calls = []
    pool = make_pool(
        handler(
            on_message=failing(kind),
            on_error=lambda sock, exc: calls.append(("error", sock, exc)),
            on_disconnect=lambda sock, reason: calls.append(("disconnect", sock, reason)),
        ),
        slow_handler=30,  # which would be logged
    )
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    client.sendall(b"x")
    assert client.recv(1) == b""
    wait_until(lambda: len(calls) == 2)
    assert [(name, where) for name, where, _ in calls] == [("error", sock), ("disconnect", sock)]
    assert isinstance(calls[0][2], kind)
    assert calls[0][2] is calls[1][2]
    assert calls[0][2].__traceback__ is not None
    assert not [record for record in caplog.records if record.name == "tstpool"]


def test_suspend_from_on_error_keeps_the_socket(make_pool, make_client):
    """SPEC: None and DISCONNECT close it, SUSPEND keeps it."""
    errors = []

    def answer(sock, data):
        if data == b"fail":
            raise ValueError
        sock.send(data)

    def forgive(sock, exc):
        errors.append(exc)
        return TstStat.SUSPEND

    client = make_client(make_pool(handler(on_message=answer, on_error=forgive)))
    for i in range(1, 4):
        client.sendall(b"fail")
        wait_until(lambda i=i: len(errors) == i)
        assert round_trip(client, b"hello") == b"hello"


@pytest.mark.parametrize("answer", [None, TstStat.DISCONNECT])
def test_none_and_disconnect_from_on_error_close_the_socket(make_pool, make_client, answer):
    """SPEC."""
    pool = make_pool(handler(on_message=failing(ValueError), on_error=lambda sock, exc: answer))
    client = make_client(pool)
    client.sendall(b"x")
    assert client.recv(1) == b""


def test_an_on_error_that_raises_is_logged_and_the_socket_closed(make_pool, make_client, caplog):
    """B52: also SystemExit in there."""
    for kind in (ValueError, SystemExit):
        pool = make_pool(handler(on_message=failing(KeyError), on_error=failing(kind)), workers=1)
        client = make_client(pool)
        client.sendall(b"x")
        assert client.recv(1) == b""
        client = make_client(pool)  # the only worker lives
        client.sendall(b"x")
        assert client.recv(1) == b""
        assert any(record.exc_info and isinstance(record.exc_info[1], kind) for record in caplog.records)
        assert pool.stats().handler_errors == 4


def test_all_errors_are_counted_however_few_are_logged(make_pool, make_client, caplog):
    """B52: of on_error, on_slow and on_idle too; a start begins anew."""
    fail = failing(ValueError)
    twice = handler(on_message=fail, on_error=lambda sock, exc: TstStat.SUSPEND, on_slow=failing(KeyError))
    pool = make_pool(twice, slow_handler=1e-9, workers=1)
    client = make_client(pool)
    rounds = round(patient(30))  # there is a number of records for each second, which a busy machine has more of
    for i in range(1, rounds + 1):
        client.sendall(b"x")
        wait_until(lambda i=i: pool.stats().handler_errors == 2 * i)
    assert len(caplog.records) < rounds
    idle = make_pool(handler(on_message=echo, on_idle=failing(ValueError)), idle_time=0.001, workers=1)
    wait_until(lambda: idle.stats().handler_errors >= 2)
    pool.stop()
    pool.start()
    assert pool.stats().handler_errors == 0


@every_style
@every_exception
def test_on_connect_may_raise(make_pool, make_client, style, kind):
    """B52: that connection is closed, the next one accepted."""
    fail, calls = failing(kind), []

    def first_fails(sock):
        calls.append(sock)
        if len(calls) == 1:
            fail()

    pool = serve(make_pool, style, echo, on_connect=first_fails, workers=1)
    assert make_client(pool).recv(1) == b""
    assert round_trip(make_client(pool), b"hello") == b"hello"
    wait_until(lambda: pool.sockets() == [calls[1]])


@every_style
@every_exception
def test_on_disconnect_may_raise(make_pool, make_client, caplog, style, kind):
    """B52: it is called once, logged, and the worker lives."""
    fail, calls = failing(kind), []

    def end(sock, reason):
        calls.append(sock)
        fail()

    pool = serve(make_pool, style, echo, on_disconnect=end, workers=1)
    for i in range(3):
        client = make_client(pool)
        assert round_trip(client, b"hello") == b"hello"
        client.close()
        wait_until(lambda i=i: len(calls) == i + 1)
    wait_until(lambda: len(pool) == 0)
    assert len(set(calls)) == 3
    wait_until(lambda: sum(record.name == "tstpool" for record in caplog.records) >= 3)


@every_exception
def test_on_writable_may_raise(make_pool, make_client, kind):
    """B51."""
    errors = []
    pool = make_pool(
        handler(on_message=ignore, on_writable=failing(kind), on_error=lambda sock, exc: errors.append(exc)), workers=1
    )
    client = make_client(pool)
    (sock,) = wait_until(pool.sockets)
    pool.need_send(sock)
    assert client.recv(1) == b""
    wait_until(lambda: errors)
    assert isinstance(errors[0], kind)


@pytest.mark.parametrize(
    "wrong", ["text", 1.5, object(), array.array("b", b"x"), []], ids=lambda value: type(value).__name__
)
def test_another_return_type_is_a_type_error(make_pool, make_client, wrong):
    """SPEC: to on_error, like an exception of the handler."""
    errors = []
    pool = make_pool(handler(on_message=lambda sock, data: wrong, on_error=lambda sock, exc: errors.append(exc)))
    client = make_client(pool)
    client.sendall(b"x")
    assert client.recv(1) == b""
    assert [type(exc) for exc in errors] == [TypeError]


def test_output_of_the_handler_before_it_raised_is_sent(make_pool, make_client):
    """S28: what was queued goes out before the end."""

    def half(sock, data):
        sock.send(b"half an answer")
        raise ValueError

    client = make_client(make_pool(handler(on_message=half, on_error=lambda sock, exc: None)))
    client.sendall(b"x")
    assert client.recv(100) == b"half an answer"
    assert client.recv(1) == b""


def test_exceptions_on_many_connections_at_once(make_pool, make_client):
    """B51: a hundred failing handlers on four workers, one on_error and one on_disconnect each."""
    errors, ended = [], []
    pool = make_pool(
        handler(
            on_message=failing(RuntimeError),
            on_error=lambda sock, exc: errors.append(sock.id),
            on_disconnect=lambda sock, reason: ended.append(sock.id),
        ),
        workers=4,
    )
    clients = [make_client(pool) for _ in range(100)]

    def fail(part):
        for client in part:
            client.sendall(b"x")
            assert client.recv(1) == b""

    in_threads(*(lambda part=clients[i::4]: fail(part) for i in range(4)))
    wait_until(lambda: len(ended) == 100)
    assert sorted(errors) == sorted(ended)
    assert len(set(ended)) == 100


class Local:
    """Lives in the frame of a handler, and so in its traceback."""


def test_the_exception_is_released(make_pool, make_client):
    """B51: nothing in the engine keeps the traceback, and with it the frame, alive."""
    alive = []

    def fail(sock, data):
        local = Local()
        alive.append(weakref.ref(local))
        raise ValueError

    pool = make_pool(handler(on_message=fail, on_error=lambda sock, exc: None), workers=1)
    for _ in range(3):
        client = make_client(pool)
        client.sendall(b"x")
        assert client.recv(1) == b""

    def collected():
        gc.collect()
        return [ref() for ref in alive] == [None] * 3

    wait_until(collected)


class Unequal:
    """A verdict, a reply or a number that nobody may ask anything."""

    def __eq__(self, other):
        raise ZeroDivisionError("compared")

    def __repr__(self):
        raise ZeroDivisionError("shown")

    __hash__ = None


class Number(int):
    def __eq__(self, other):
        raise ZeroDivisionError("compared")

    __lt__ = __gt__ = __le__ = __ge__ = __int__ = __index__ = __eq__
    __hash__ = None


ODD = {
    "object": Unequal(),
    "RUN": Number(1),
    "SUSPEND": Number(0),
    "an id": 1 << 40,
    "far below": -(1 << 70),
    "-1": -1,
    "99": 99,
    "100": 100,
    "empty": b"",
    "True": True,
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("hook", ["on_connect", "on_message", "on_writable", "on_disconnect", "on_error"])
def test_whatever_a_hook_returns(make_pool, make_client, hook, odd):
    """B52, bad input: also what can't be compared, shown, or put into a machine's number."""
    bad = threading.Event()

    def answer(name):
        return ODD[odd] if name == hook and bad.is_set() else None

    def on_message(sock, data):
        if hook == "on_error" and bad.is_set():
            raise ValueError
        if hook == "on_writable" and bad.is_set():
            pool.need_send(sock)
        sock.send(data)
        return answer("on_message")

    hooks = {
        name: (lambda *args, name=name: answer(name))
        for name in ("on_connect", "on_writable", "on_disconnect", "on_error")
    }
    pool = make_pool(handler(on_message=on_message, **hooks), workers=2)
    good = make_client(pool)
    assert round_trip(good, b"before") == b"before"
    threads = set(threading.enumerate())
    bad.set()
    for _ in range(3):
        client = make_client(pool)
        with contextlib.suppress(OSError):  # it may be closed before it has said anything
            client.sendall(b"bad")
            client.shutdown(socket.SHUT_WR)
            recv_until_eof(client)
    bad.clear()
    wait_until(lambda: len(pool) == 1)
    assert round_trip(good, b"after") == b"after"
    assert round_trip(make_client(pool), b"others") == b"others"
    assert set(threading.enumerate()) == threads


class Broken(logging.Handler):
    def emit(self, record):
        raise OSError("the log is full")


@pytest.mark.parametrize("workers", [1, 3])
def test_a_log_that_fails_takes_no_worker_with_it(make_pool, make_client, workers):
    """B51: the default on_error raises then, and so does the engine's own record about that."""
    pool = make_pool(TstHandler(), slow_handler=1e-9, idle_time=0.05, workers=workers)
    broken = Broken()
    logging.getLogger("tstpool").addHandler(broken)
    try:
        for _ in range(workers + 1):
            client = make_client(pool)
            pool.need_send(open_sockets(pool, 1)[0])
            client.close()
            wait_until(lambda: len(pool) == 0)
        sock = handler(on_message=failing(ValueError))
        other = make_pool(sock, workers=workers)
        for _ in range(workers + 1):
            client = make_client(other)
            client.sendall(b"x")
            assert client.recv(1) == b""
    finally:
        logging.getLogger("tstpool").removeHandler(broken)
    assert other.stop() is True
