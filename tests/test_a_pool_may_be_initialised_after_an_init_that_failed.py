"""B44: an __init__ that raised has left nothing to the next one on the same object."""

import pytest
from contract_helpers import echo, handler, ignore, open_sockets, round_trip
from helpers import RunningPool, connect, wait_until

import tstpool

STRICT = {"first_byte_timeout": 0.05, "high_water": 1000, "low_water": 0, "max_queued": 1000, "on_overflow": "close"}


def initialised_again(hooks, wrong, **options):
    pool = tstpool.TstPool.__new__(tstpool.TstPool)
    with pytest.raises((ValueError, TypeError)):
        pool.__init__(hooks, **STRICT, **wrong)
    pool.__init__(hooks, **options)
    return pool


WRONG = [{"workers": 0}, {"idle_time": "5"}, {"max_send_size": 0}, {"accepts_per_turn": 0}]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: next(iter(wrong)))
def test_its_limits_are_those_of_the_second(wrong):
    """B44: those of the first would close whom the pool accepts, and refuse what is sent."""
    pool = initialised_again(handler(on_message=ignore), wrong, first_byte_timeout=None)
    try:
        pool.listen("127.0.0.1", 0)
        pool.start()
        with connect(pool):
            (sock,) = open_sockets(pool, 1)
            with pytest.raises(tstpool.SendQueueFull):  # "raise" is the default: it is not closed for it
                while True:
                    sock.send(b"x" * 100_000)
            assert sock.close(abort=True)
    finally:
        pool.stop()


def test_its_deadlines_are_those_of_the_second():
    """B44: another pool, with the deadline of the first, closes a later client before ours has said a word."""
    with RunningPool(handler(on_message=echo), **STRICT) as strict:
        pool = initialised_again(handler(on_message=echo), {"workers": 0}, first_byte_timeout=None)
        try:
            pool.listen("127.0.0.1", 0)
            pool.start()
            with connect(pool) as client:
                open_sockets(pool, 1)
                with connect(strict):
                    wait_until(lambda: strict.stats().first_byte_closed == 1)
                assert round_trip(client, b"hello") == b"hello"
            assert pool.stats().first_byte_closed == 0
        finally:
            pool.stop()
