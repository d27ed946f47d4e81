"""B14, B47, S38: code of the user's that is no hook, a finalizer or a handler of the log, may block as one may."""

import contextlib
import logging
import weakref

import pytest
from contract_helpers import Gate, echo, handler, is_answered, round_trip
from helpers import FREE_THREADED, connect, wait_until

from tstpool import TstHandler, TstStat

WORKERS = 4


class Waits:
    """Its finalizer waits at the gate."""

    def __init__(self, gate):
        self.gate = gate

    def __del__(self):
        self.gate.wait()


class WaitingLog(logging.Handler):
    """The first who logs that no more connections are accepted waits at the gate; others who log do not wait for it."""

    def __init__(self, gate):
        super().__init__()
        self.gates = [gate]

    def handle(self, record):  # without the lock that it has
        if "accepts no more" in record.getMessage() and self.gates:
            self.gates.pop().wait()


@contextlib.contextmanager
def logged_by(log):
    logger = logging.getLogger("tstpool")
    logger.addHandler(log)
    try:
        yield
    finally:
        logger.removeHandler(log)


@pytest.mark.skipif(FREE_THREADED, reason="there a finalizer runs on the thread that has made the object")
@pytest.mark.parametrize("shards", [1, 2])
def test_a_finalizer_of_user_data_that_blocks_is_not_felt_by_others(make_pool, make_client, shards):
    """B14, S38: the connection that it hung on is over. Its shard goes to another worker meanwhile."""
    with Gate() as gate:
        things = [Waits(gate)]

        def on_connect(sock):
            if things:
                sock.user_data = things.pop()  # which alone refers to it

        pool = make_pool(handler(on_connect=on_connect, on_message=echo), workers=WORKERS, shards=shards)
        first = make_client(pool)
        assert is_answered(first)
        others = [make_client(pool) for _ in range(4)]
        assert all(is_answered(other) for other in others)
        first.close()
        wait_until(lambda: gate.inside)
        assert [is_answered(other) for other in others] == [True] * 4
        assert is_answered(make_client(pool))
        assert gate.inside == 1
    wait_until(lambda: len(pool) == 5)


@pytest.mark.skipif(FREE_THREADED, reason="there a finalizer runs on the thread that has made the object")
@pytest.mark.parametrize("how", ["callback", "finalize"])
def test_a_callback_that_blocks_when_its_socket_goes_is_not_felt_by_others(make_pool, make_client, how):
    """B14, S38: the connection that it waited for is over, and its shard goes to another worker meanwhile."""
    kept = []
    with Gate() as gate:

        def on_message(sock, data):
            if data == b"watch" and how == "callback":
                kept.append(weakref.ref(sock, lambda _: gate.wait()))
            elif data == b"watch":
                weakref.finalize(sock, gate.wait).atexit = False
            return data

        pool = make_pool(handler(on_message=on_message), workers=WORKERS, shards=1)
        client = make_client(pool)
        others = [make_client(pool) for _ in range(4)]
        assert all(is_answered(other) for other in others)
        assert round_trip(client, b"watch") == b"watch"
        client.close()
        wait_until(lambda: gate.inside)
        assert all(is_answered(other) for other in others)
        assert is_answered(make_client(pool))
        assert gate.inside == 1
    wait_until(lambda: len(pool) == 5)


class Fails(TstHandler):
    """Echoes; but b"fail" raises, and the frame that the traceback holds has something whose finalizer waits."""

    def __init__(self, gate, verdict):
        self.gate = gate
        self.verdict = verdict

    def on_message(self, sock, data):
        if data == b"fail":
            local = Waits(self.gate)
            raise ValueError(local)
        return data

    def on_error(self, sock, error):
        return self.verdict


@pytest.mark.skipif(FREE_THREADED, reason="there a finalizer runs on the thread that has made the object")
@pytest.mark.parametrize("verdict", [TstStat.SUSPEND, TstStat.DISCONNECT], ids=lambda verdict: verdict.name)
def test_a_finalizer_of_what_a_traceback_holds_is_not_felt_by_others(make_pool, make_client, verdict):
    """B14, S38: it goes when on_error has run, or with the connection."""
    with Gate() as gate:
        pool = make_pool(Fails(gate, verdict), workers=WORKERS, shards=1)
        others = [make_client(pool) for _ in range(4)]
        assert all(is_answered(other) for other in others)
        make_client(pool).sendall(b"fail")
        wait_until(lambda: gate.inside)
        assert [is_answered(other) for other in others] == [True] * 4


class OwnHandler(Waits, TstHandler):
    """A socket's own handler, until b"replace" comes; then its finalizer waits."""

    def on_message(self, sock, data):
        if data == b"replace":
            sock.handler = None
        return data


@pytest.mark.skipif(FREE_THREADED, reason="there a finalizer runs on the thread that has made the object")
def test_a_finalizer_of_a_handler_that_is_replaced_is_not_felt_by_others(make_pool, make_client):
    """B14, S38: it goes when the next message finds that another one was assigned."""
    with Gate() as gate:

        def on_message(sock, data):
            if data == b"assign":
                sock.handler = OwnHandler(gate)
            return data

        pool = make_pool(handler(on_message=on_message), workers=WORKERS, shards=1)
        others = [make_client(pool) for _ in range(4)]
        assert all(is_answered(other) for other in others)
        client = make_client(pool)
        for message in (b"assign", b"hello", b"replace"):
            assert round_trip(client, message) == message
        client.sendall(b"hello")
        wait_until(lambda: gate.inside)
        assert [is_answered(other) for other in others] == [True] * 4


def test_a_log_that_blocks_is_not_felt_by_others(make_pool):
    """B14: the record says that there are max_connections of them. Its shard goes to another worker meanwhile."""
    with Gate() as gate, contextlib.ExitStack() as stack:
        stack.enter_context(logged_by(WaitingLog(gate)))
        pool = make_pool(handler(on_message=echo), workers=WORKERS, shards=1, max_connections=2)
        first = stack.enter_context(connect(pool))
        assert is_answered(first)
        for _ in range(2):  # the second may be the one that is complained about
            stack.enter_context(connect(pool))
        wait_until(lambda: gate.inside)
        assert is_answered(first)
        assert gate.inside == 1
