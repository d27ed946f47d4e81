"""busy_poll: a worker whose clients answer at once polls for a while before it sleeps.

It changes what a sleep costs, and nothing else.
"""

import time

import pytest
from contract_helpers import echo, every_trigger, handler, round_trip
from helpers import RunningPool, connect, process_cpu_seconds, recv_exact, wait_until

import tstpool


def cpu_while_quiet(busy_poll, seconds=0.3):
    """The share of a core that a pool takes right after a client's last message."""
    with (
        RunningPool(handler(on_message=echo), workers=1, shards=1, busy_poll=busy_poll) as pool,
        connect(pool) as client,
    ):
        for _ in range(20):
            round_trip(client, b"x")  # short sleeps: after them it polls
        before = process_cpu_seconds()
        time.sleep(seconds)
        return (process_cpu_seconds() - before) / seconds


def test_it_polls_while_the_time_lasts_and_not_without_being_asked():
    assert cpu_while_quiet(0.0) < 0.2
    wait_until(lambda: cpu_while_quiet(2.0) > 0.3, timeout=30)  # not at once where the machine has better things to do


def test_after_its_time_it_sleeps():
    with RunningPool(handler(on_message=echo), workers=1, shards=1, busy_poll=0.02) as pool, connect(pool) as client:
        round_trip(client, b"x")

        def is_quiet():
            before = process_cpu_seconds()
            time.sleep(0.2)
            return process_cpu_seconds() - before < 0.05

        wait_until(is_quiet, timeout=30)


def test_it_gives_up_where_it_does_not_pay(make_pool, make_client):
    """Short sleeps alternate with polls in vain, as with a client that needs the same processor to answer."""
    pool = make_pool(handler(on_message=echo), workers=1, shards=1, busy_poll=2e-3)
    client = make_client(pool)

    def cpu_share():
        before, began = process_cpu_seconds(), time.monotonic()
        for _ in range(100):
            round_trip(client, b"x")
            round_trip(client, b"x")  # a short sleep, after which it may poll
            time.sleep(3e-3)  # in vain
        return (process_cpu_seconds() - before) / (time.monotonic() - began)

    wait_until(lambda: cpu_share() < 0.2, timeout=30)  # it is 0.6 when every short sleep is followed by a poll


def test_what_other_threads_ask_for_is_done_meanwhile():
    """A shard that polls is not asleep, so nobody writes to its eventfd: it looks itself."""
    with RunningPool(handler(on_message=echo), workers=1, shards=1, busy_poll=60.0) as pool, connect(pool) as client:
        for _ in range(20):
            round_trip(client, b"x")
        [sock] = pool.sockets()
        for number in range(100):
            sock.send(b"%5d" % number)
            assert recv_exact(client, 5) == b"%5d" % number
        sock.close()
        assert client.recv(1) == b""
        began = time.monotonic()
    assert time.monotonic() - began < 30  # stop() does not wait for the minute


@every_trigger
def test_an_echo_is_the_same_with_it(make_pool, make_client, trigger):
    pool = make_pool(handler(on_message=echo), trigger=trigger, busy_poll=1e-3)
    clients = [make_client(pool) for _ in range(4)]
    for number in range(50):
        for client in clients:
            message = b"%d " % number * 9
            assert round_trip(client, message) == message


@pytest.mark.parametrize("wrong", [-1, float("nan"), "soon", None])
def test_it_is_a_time(wrong):
    with pytest.raises((TypeError, ValueError)):
        tstpool.TstPool(lambda sock: None, busy_poll=wrong)
