"""S24: the time of a finalizer, or of on_slow itself, is not that of the call which is next."""

import contextlib
import socket
import time

import pytest
from contract_helpers import Gate, handler, round_trip
from helpers import FREE_THREADED, PATIENCE, patient, recv_exact, wait_until

from tstpool import LengthPrefixed

# Where others run, a quick handler may be held up for a second.
LIMIT = 0.25 if PATIENCE == 1 else patient(0.5)


def nap():
    """Longer than a handler may."""
    time.sleep(1.1 * LIMIT)


class Naps:
    """Its finalizer does."""

    def __del__(self):
        nap()


@contextlib.contextmanager
def joined(pool, name):
    """A client that is served already; its connection has the name for user_data."""
    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(patient(10))
        pool.addsocket(theirs, user_data=name)
        assert round_trip(ours, b"hello") == b"hello"
        yield ours


@pytest.mark.skipif(FREE_THREADED, reason="there a finalizer runs on the thread that has made the object")
def test_the_next_connection_does_not_answer_for_a_finalizer(make_pool):
    """S24, S36: on_slow is not called for it, and stats() does not count it."""
    blamed = []
    with Gate() as gate:

        def on_message(sock, data):
            if data == b"hold":
                gate.wait()
            elif data == b"mine":
                sock.user_data = Naps()
            return data

        pool = make_pool(
            handler(on_message=on_message, on_slow=lambda sock, seconds: blamed.append(sock.user_data)),
            listen=None,
            workers=1,
            slow_handler=LIMIT,
        )
        with joined(pool, "holder") as holder, joined(pool, "ends") as ends, joined(pool, "next") as following:
            assert round_trip(ends, b"mine") == b"mine"
            holder.sendall(b"hold")
            wait_until(lambda: gate.inside)  # so that both of the following come in one turn
            ends.close()
            following.sendall(b"quick")
            gate.open()
            assert recv_exact(following, 5) == b"quick"
            assert recv_exact(holder, 4) == b"hold"
            assert round_trip(holder, b"hello") == b"hello"  # by then all of that turn is over
            assert "next" not in blamed
            assert pool.stats().slow_calls == len(blamed)


def test_the_next_message_does_not_answer_for_on_slow(make_pool):
    """S24, S36: it has arrived together with the one that was slow."""
    calls, blamed = [], []

    def on_message(sock, data):
        calls.append(data)
        if data == b"slow":
            time.sleep(LIMIT)
        return data

    def on_slow(sock, seconds):
        blamed.append(calls[-1])
        nap()

    pool = make_pool(
        handler(on_message=on_message, on_slow=on_slow),
        listen=None,
        workers=1,
        slow_handler=LIMIT,
        framing=LengthPrefixed(1),
    )
    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(patient(10))
        pool.addsocket(theirs)
        assert round_trip(ours, b"\4slow\5quick") == b"\4slow\5quick"
        assert round_trip(ours, b"\5hello") == b"\5hello"  # by then all of that is over
        assert blamed == [b"slow"]
        assert pool.stats().slow_calls == 1
