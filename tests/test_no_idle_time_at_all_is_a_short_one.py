"""S37: on_idle is called no more often than once a millisecond, whatever idle_time is."""

import time

import pytest
from contract_helpers import echo, handler, round_trip
from helpers import wait_until


@pytest.mark.parametrize("idle_time", [0, 1e-9])
def test_a_worker_does_not_spin(make_pool, make_client, idle_time):
    """S37: and serves as ever."""
    numbers = []
    pool = make_pool(handler(on_message=echo, on_idle=numbers.append), workers=1, idle_time=idle_time, start=False)
    began = time.monotonic()
    pool.start()
    wait_until(lambda: pool.stats().workers[0].idle_count >= 50)
    count = pool.stats().workers[0].idle_count
    most = 2 * (time.monotonic() - began) / 0.001 + 1  # twice what is promised: clocks differ
    assert count <= most
    assert round_trip(make_client(pool), b"hello") == b"hello"
    assert set(numbers) == {0}
