"""White box: the table, ids, ownership (_lock.pxd, _conn.pxd, _shard.pxd)."""

import contextlib
import errno
import itertools
import os
import threading

import pytest
from _whitebox import (
    CHUNK,
    DEAD,
    DETACHED,
    ENTRY_STATES,
    OPEN,
    OWNED,
    PAUSED,
    QUEUED,
    SLOTS,
    WANT_CLOSE,
    WANT_IN,
    WANT_OUT,
    Counter,
    Engine,
    Entries,
    Hammer,
    clear,
)
from helpers import patient, scaled

ACQUIRED, BUSY, GONE = 1, 0, -1


def in_parallel(*functions):
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(patient(60))
        assert not thread.is_alive()


@pytest.fixture
def engine():
    made = Engine()
    yield made
    made.close()


@pytest.fixture
def descriptor():
    fd = os.open("/dev/null", os.O_RDONLY)
    yield fd
    with contextlib.suppress(OSError):
        os.close(fd)


# -- the lock


def test_the_spin_lock_lets_one_thread_in():
    counter, rounds = Counter(), scaled(20_000)
    in_parallel(*[lambda: counter.add(rounds)] * 4)
    assert counter.value == 4 * rounds


# -- the table


def test_an_id_finds_its_connection_and_no_later_one(engine):
    first = engine.open(7)
    assert first.id == 1 << 32 | 7
    assert engine.finds(first.id) == 7
    assert engine.finds(7) == 7  # a bare descriptor: whoever has it now
    clear(first)
    assert engine.finds(first.id) is None
    assert engine.finds(7) is None
    second = engine.open(7)
    assert second.id == 2 << 32 | 7
    assert engine.finds(first.id) is None
    assert engine.finds(second.id) == 7
    assert not first.alive
    assert second.alive


def test_generations_wrap_around_and_none_is_zero(engine, descriptor):
    """B02: a slot whose 2^32 generations are used up begins anew with 1, since an id with 0 means whoever is there now;
    an id comes again after 2^32 - 1 others, no earlier."""
    generations, stale = [2**32 - 2, 2**32 - 1, 1, 2], []
    engine.age(descriptor, generations[0])
    for generation in generations:
        connection = engine.open(descriptor)
        assert connection.id == generation << 32 | descriptor
        assert engine.finds(connection.id) == engine.finds(descriptor) == descriptor
        for old in stale:
            assert engine.finds(old.id) is None
            assert not old.alive
            assert old.acquire()[0] == old.ask(WANT_CLOSE) == old.close_output() == GONE
            assert old.append(b"for another") == (-errno.ENOTCONN, False)
            assert old.mark(PAUSED) is False
        assert connection.state == OPEN
        assert connection.append(b"x") == (1, True)
        assert connection.acquire() == (ACQUIRED, 0)
        connection.retire()  # as the engine ends one: the slot is free, the descriptor closed
        assert engine.finds(connection.id) is None
        stale.append(connection)
        again = os.open("/dev/null", os.O_RDONLY)
        if again != descriptor:
            os.dup2(again, descriptor)
            os.close(again)


def test_a_slot_is_given_to_one_connection_at_a_time(engine):
    engine.open(7)
    assert engine.open(7) is None


def test_slots_come_in_chunks_when_they_are_needed(engine):
    assert not engine.has_slot(0)
    engine.open(CHUNK - 1)
    assert engine.has_slot(0)
    assert not engine.has_slot(CHUNK)
    engine.open(CHUNK)
    assert engine.has_slot(2 * CHUNK - 1)
    assert engine.finds(CHUNK - 1) == CHUNK - 1
    assert engine.finds(CHUNK) == CHUNK


@pytest.mark.parametrize("number", [SLOTS, SLOTS + 1, 2**31 - 1, 2**32 - 1, 2**63])
def test_nothing_lies_beyond_the_table(engine, number):
    """B10."""
    assert engine.finds(number) is None
    assert engine.finds(5 << 32 | number & 0xFFFFFFFF) is None
    if number < 2**31:
        assert engine.open(number) is None


def test_threads_that_need_the_same_chunk_share_it(engine):
    opened = []
    in_parallel(*[lambda i=i: opened.append(engine.open(CHUNK * 5 + i)) for i in range(8)])
    assert sorted(engine.finds(connection.id) for connection in opened) == [CHUNK * 5 + i for i in range(8)]


# -- ownership


def test_one_owner_at_a_time(engine):
    connection = engine.open(3)
    assert connection.acquire() == (ACQUIRED, 0)
    assert connection.acquire()[0] == BUSY
    assert connection.release() is False
    assert connection.acquire() == (ACQUIRED, 0)


def test_a_stale_generation_can_do_nothing(engine):
    """B10."""
    old = engine.open(3)
    clear(old)
    new = engine.open(3)
    assert old.acquire()[0] == GONE
    assert old.ask(WANT_CLOSE) == GONE
    assert old.mark(PAUSED) is False
    assert old.append(b"x") == (-errno.ENOTCONN, False)
    assert old.close_output() == GONE
    assert old.flush() == 0
    assert new.state == OPEN
    assert new.append(b"x") == (1, True)


def test_a_request_to_an_idle_connection_must_be_pushed_once(engine):
    connection = engine.open(3)
    assert connection.ask(WANT_OUT) == 1
    assert connection.ask(WANT_OUT) == 0
    assert connection.ask(WANT_CLOSE) == 0
    assert connection.state == OPEN | QUEUED | WANT_OUT | WANT_CLOSE


def test_a_request_to_an_owned_connection_is_seen_by_its_release(engine):
    connection = engine.open(3)
    connection.acquire()
    assert connection.ask(WANT_OUT) == 0
    assert connection.release() is True  # push it: somebody wants something
    assert connection.state == OPEN | QUEUED | WANT_OUT
    assert connection.acquire() == (ACQUIRED, WANT_OUT)
    assert connection.release() is False


def test_a_request_to_a_connection_whose_owner_is_stuck_is_pushed_at_once(engine):
    connection = engine.open(3)
    connection.acquire()
    assert connection.mark(DETACHED, True, OWNED) is True
    assert connection.ask(0) == 1
    connection.release()
    assert not connection.state & DETACHED


def test_marks_need_the_flags_that_they_name(engine):
    connection = engine.open(3)
    assert connection.mark(DETACHED, True, OWNED) is False
    assert connection.mark(PAUSED, True, OPEN) is True
    assert connection.state == OPEN | PAUSED
    assert connection.mark(PAUSED, False, OPEN) is True
    assert connection.state == OPEN


def test_requests_survive_every_order_of_an_owner_and_two_askers(engine):
    """All interleavings of the owner's acquire and release with two requests: at the end each is served or queued."""
    steps = ["acquire", "release", "ask out", "ask close"]
    for order in itertools.permutations(steps):
        if order.index("acquire") > order.index("release"):
            continue
        connection = engine.open(3)
        served = 0
        for step in order:
            if step == "acquire":
                served |= connection.acquire()[1]
            elif step == "release":
                connection.release()
            else:
                connection.ask(WANT_OUT if step == "ask out" else WANT_CLOSE)
        waiting = connection.state & (WANT_OUT | WANT_CLOSE)
        assert served | waiting == WANT_OUT | WANT_CLOSE
        assert served & waiting == 0
        assert bool(connection.state & QUEUED) >= bool(waiting)
        clear(connection)


def test_no_request_is_lost_and_nobody_shares_ownership_under_fire(engine):
    rounds, askers = scaled(20_000), 3
    hammer = Hammer(engine, engine.open(3), askers)
    in_parallel(*[lambda: hammer.ask(rounds)] * askers, lambda: hammer.serve(True), *[lambda: hammer.serve(False)] * 2)
    hammer.serve(True)
    asked, served = hammer.counts
    assert asked == served == rounds * askers
    assert hammer.torn == 0


# -- output


def test_output_is_refused_once_closed(engine):
    connection = engine.open(3)
    assert connection.append(b"abc") == (3, True)
    assert connection.close_output() == 1
    assert connection.close_output() == 0
    assert connection.append(b"def") == (-errno.ENOTCONN, False)


def test_nobody_is_asked_to_flush_while_somebody_does(engine):
    connection = engine.open(3)
    connection.pretend_flushing(True)
    assert connection.append(b"abc") == (3, False)
    assert connection.flush() == 1
    connection.pretend_flushing(False)
    assert connection.append(b"def") == (6, True)


# -- requests and the token


def test_requests_are_taken_in_the_order_in_which_they_came(engine):
    for fd in (5, 3, 9):
        engine.open(fd).request(WANT_IN)
    assert engine.take() == [5, 3, 9]
    assert engine.take() == []


def test_a_sleeping_shard_is_woken_once_and_a_busy_one_never(engine):
    connections = [engine.open(fd) for fd in range(3, 9)]
    connections[0].request(WANT_IN)
    assert engine.wakes == 0
    engine.sleep()
    for connection in connections[1:]:
        connection.request(WANT_IN)
    assert engine.wakes == 1
    assert len(engine.take()) == len(connections)


def test_pushes_from_many_threads_are_all_taken(engine):
    connections = [engine.open(fd) for fd in range(400)]
    in_parallel(*[lambda i=i: [c.request(WANT_IN) for c in connections[i::4]] for i in range(4)])
    assert sorted(engine.take()) == list(range(400))


def test_the_token_can_be_taken_only_from_one_who_runs(engine):
    assert engine.token(None, (0, "polling"))
    assert engine.holds(0)
    assert not engine.token((0, "running"), (1, "running"))  # it polls: nobody can take it
    assert not engine.token(None, (1, "polling"))
    assert engine.token((0, "polling"), (0, "running"))
    assert engine.token((0, "running"), (1, "running"))
    assert engine.holds(1)
    assert not engine.holds(0)
    assert not engine.token((0, "running"), (0, "polling"))  # that is how 0 finds out


def test_each_entry_is_moved_by_one_thread():
    queued, running, ran, done = ENTRY_STATES
    entries, moved = Entries(scaled(20_000)), []
    for old, new in ((queued, running), (running, ran), (ran, done)):
        moved.clear()
        in_parallel(*[lambda old=old, new=new: moved.append(entries.move(old, new))] * 3)
        assert sum(moved) == scaled(20_000)
        assert set(entries.states()) == {new}


# -- the end


def test_retiring_frees_the_slot_and_closes_the_descriptor(engine, descriptor):
    connection = engine.open(descriptor)
    connection.acquire()
    connection.retire()
    assert not connection.alive
    assert engine.n_open == 0
    with pytest.raises(OSError):
        os.fstat(descriptor)
    assert engine.finds(connection.id) is None


def test_retiring_while_a_request_waits_leaves_the_end_to_whoever_takes_it(engine, descriptor):
    connection = engine.open(descriptor)
    connection.request(WANT_IN)
    connection.acquire()
    connection.retire()
    assert connection.state & DEAD
    assert not connection.state & OPEN
    assert engine.n_open == 1
    os.fstat(descriptor)
    assert engine.take() == [descriptor]


def test_retiring_while_another_thread_sends_leaves_the_end_to_it(engine, descriptor):
    connection = engine.open(descriptor)
    connection.acquire()
    connection.pretend_flushing(True)
    connection.retire()
    assert connection.alive
    assert engine.n_open == 1
    os.fstat(descriptor)
