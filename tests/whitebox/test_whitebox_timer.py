"""White box: the wheel of timers (_timer.pxd), B38."""

import pytest
from _whitebox import WHEEL_AHEAD, Wheel, idle_deadline, linger_deadline
from helpers import scaled
from hypothesis import given, settings
from hypothesis import strategies as st

ROUND = 1 << 32
NUMBERS = 12

# About the edges of the four levels, within them, and beyond what the wheel holds.
ahead = st.one_of(
    st.integers(1, 70),
    st.integers(1, 5_000),
    st.integers(1, 300_000),
    st.integers(1, 20_000_000),
    st.integers(WHEEL_AHEAD - 3, WHEEL_AHEAD + 3),
    st.integers(WHEEL_AHEAD, 1 << 30),
    st.builds(lambda level, step: max(1, 64**level + step), st.integers(0, 4), st.integers(-2, 2)),
)
starts = st.one_of(
    st.integers(0, ROUND - 1),
    st.builds(lambda step: step % ROUND, st.integers(-300, 300)),
    st.builds(lambda level, step: (ROUND - 64**level + step) % ROUND, st.integers(0, 4), st.integers(-2, 2)),
)


def walk(wheel, tick, end):
    """{number: how many ticks after `tick` it fired}, going from next() to next(), as a shard that sleeps does."""
    fired, at = {}, 0
    while True:
        following = wheel.next()
        if following is None or (following - tick) % ROUND > end:
            for number in wheel.fire((tick + end) % ROUND):
                pytest.fail(f"{number} fired, though next() had said that there was nothing")
            return fired
        step = (following - tick) % ROUND
        assert step > at, "next() must be later than what has fired"
        at = step
        for number in wheel.fire(following):
            assert number not in fired
            fired[number] = step


def test_a_timer_fires_at_its_tick_and_not_before():
    """B38."""
    wheel = Wheel(1)
    wheel.put(0, 10)
    assert wheel.next() == 10
    assert wheel.fire(9) == []
    assert wheel.fire(10) == [0]
    assert wheel.fire(11) == []
    assert wheel.is_empty


@pytest.mark.parametrize("start", [0, 1, 63, 64, 4095, 12345, ROUND - 1, ROUND - 64, ROUND - 4096, ROUND - 64**4])
@pytest.mark.parametrize("distance", [1, 2, 63, 64, 65, 4095, 4096, 4097, 262143, 262144, 262145, 16777214])
@pytest.mark.parametrize("more", [0, 1, 2, 16777216, 40000000])
def test_it_is_exact_at_the_edges_of_levels_and_of_the_number(start, distance, more):
    """B38: a walk from next() to next() finds it at its tick, wherever the wheel stands."""
    wheel = Wheel(1, start)
    wheel.put(0, (start + distance + more) % ROUND)
    assert walk(wheel, start, distance + more + 5) == {0: distance + more}
    assert wheel.is_empty


def test_what_is_in_the_past_fires_at_once():
    """B38: up to half a round of numbers back."""
    for late in (0, 1, 64, 100_000, (1 << 31) - 1):
        wheel = Wheel(1, 1000)
        wheel.put(0, (1000 - late) % ROUND)
        assert wheel.fire(1000) == [0]
        assert wheel.is_empty


def test_one_that_is_removed_does_not_fire_and_may_be_removed_again():
    """B38: the first, one in the middle and the last of a slot's list."""
    for gone in range(3):
        wheel = Wheel(3)
        for number in range(3):
            wheel.put(number, 100)
        wheel.remove(gone)
        wheel.remove(gone)
        assert sorted(wheel.fire(100)) == sorted({0, 1, 2} - {gone})
        wheel.remove(gone)
        assert wheel.is_empty


def test_many_in_one_slot():
    """B38."""
    wheel = Wheel(1000)
    for number in range(1000):
        wheel.put(number, 5000 + number % 3)
    assert wheel.fire(4999) == []
    assert [len(wheel.fire(tick)) for tick in (5000, 5001, 5002)] == [334, 333, 333]
    assert wheel.is_empty


def test_an_empty_wheel_keeps_up_with_the_clock():
    """B38: also when nothing was in it for more than half a round of numbers, which is 104 days."""
    for idle in (1, 64, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 31) + 5, ROUND - 10):
        wheel = Wheel(1, 7)
        assert wheel.fire((7 + idle) % ROUND) == []
        assert wheel.tick == (7 + idle) % ROUND
        wheel.put(0, (7 + idle + 50) % ROUND)
        assert walk(wheel, (7 + idle) % ROUND, 60) == {0: 50}


steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, NUMBERS - 1), ahead),
        st.tuples(st.just("late"), st.integers(0, NUMBERS - 1), st.none()),
        st.tuples(st.just("remove"), st.integers(0, NUMBERS - 1), st.none()),
        st.tuples(st.just("pass"), st.none(), ahead),
        st.tuples(st.just("next"), st.integers(0, 3), st.none()),
    ),
    max_size=60,
)


@given(starts, steps)
@settings(deadline=None, max_examples=scaled(500, 50))
def test_any_sequence_agrees_with_a_sorted_list(start, sequence):
    """B38: never early, never later than the tick that is asked for, each once; next() is never later than the first.

    The model counts without wrapping; what is late, or due now, fires at the next tick, as shard_set_timer has it.
    """
    wheel, model, now = Wheel(NUMBERS, start), {}, start
    for step, number, amount in sequence:
        if step in ("put", "late"):
            due = now + amount if step == "put" else now + 1
            model[number] = due
            wheel.put(number, due % ROUND)
        elif step == "remove":
            model.pop(number, None)
            wheel.remove(number)
        else:
            if step == "pass":
                now += amount
            else:
                following = wheel.next()
                if following is None:
                    assert not model
                    continue
                now += ((following - now) % ROUND) + number  # at it, or a little later
            due = {each: when for each, when in model.items() if when <= now}
            fired = wheel.fire(now % ROUND)
            assert sorted(fired) == sorted(due)
            assert [due[each] for each in fired] == sorted(due.values())
            for each in fired:
                del model[each]
            assert wheel.tick == now % ROUND
        following = wheel.next()
        assert (following is None) == (not model)
        if model:
            assert 0 < (following - now) % ROUND <= min(model.values()) - now
    for number in model:
        wheel.remove(number)
    assert wheel.is_empty


@given(starts, st.lists(ahead, min_size=1, max_size=NUMBERS))
@settings(deadline=None, max_examples=scaled(200, 30))
def test_who_sleeps_until_next_finds_each_at_its_tick(start, distances):
    """B38: and is woken no more often than once a level for each."""
    wheel = Wheel(NUMBERS, start)
    distances = [min(distance, 20 * WHEEL_AHEAD) for distance in distances]
    for number, distance in enumerate(distances):
        wheel.put(number, (start + distance) % ROUND)
    assert walk(wheel, start, max(distances) + 1) == dict(enumerate(distances))
    assert wheel.is_empty


HALF = 1 << 31  # ticks, 104 days: of two that are as far apart the later one looks like the earlier


@pytest.mark.parametrize("silent", [1000, HALF - 10, HALF + 1_000_000, ROUND + 1000])
@pytest.mark.parametrize("peer_is_silent", [True, False])
def test_idle_is_counted_from_the_last_transfer_however_long_the_other_way_was_silent(silent, peer_is_silent):
    """B38: a peer that only listens for months, or only speaks. Its timer fires every now and then."""
    step = min(silent, 1_000_000)
    assert idle_deadline(12_345, 2_000_000, peer_is_silent, step, silent // step) == 2_000_000


@pytest.mark.parametrize("linger", [1000, 1 << 28, HALF // 6 + 1000, 953_674_317])
def test_a_long_linger_is_not_over_at_once(linger):
    """B38: six times 4,000,000 seconds are more ticks than there are."""
    assert linger_deadline(5, linger) == linger
