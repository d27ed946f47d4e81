"""White box: transfers and unread input (_data.pxd)."""

import errno
import sys

import pytest
from _whitebox import Input, Jobs, Transfer
from helpers import SANITIZER
from hypothesis import given, settings
from hypothesis import strategies as st

HUGE = 2**64 - 1


def test_a_request_may_fill_the_buffer_and_not_one_byte_more():
    data = Transfer(100)
    assert data.request(0, 100) == 0
    assert data.request(60, 40) == 0
    for position, length in [(0, 101), (61, 40), (101, 0), (HUGE, 1), (1, HUGE), (HUGE, HUGE), (50, HUGE - 49)]:
        assert data.request(position, length) == -errno.EINVAL
        assert data.numbers == (100, 60, 40, 0)


def test_done_never_exceeds_what_was_requested():
    data = Transfer(10)
    data.request(0, 5)
    assert data.set_done(5) == 0
    assert data.set_done(6) == -errno.EINVAL
    assert data.set_done(HUGE) == -errno.EINVAL
    assert data.numbers[3] == 5


def test_the_buffer_is_made_when_first_needed_and_zeroed():
    data = Transfer(8)
    assert data.contents is None
    data.request(2, 3)
    assert data.fill(b"ab") == 2
    assert data.contents == b"\0\0ab\0\0\0\0"


def test_a_transfer_takes_no_more_than_it_asked_for():
    data = Transfer(10)
    data.request(2, 5)
    assert data.fill(b"abc") == 3
    assert not data.complete
    assert data.fill(b"defgh") == 2
    assert data.complete
    assert data.contents == b"\0\0abcde\0\0\0"


def test_a_complete_transfer_begins_anew_with_the_next_input():
    data = Transfer(4)
    data.request(0, 4)
    assert data.fill(b"1234") == 4
    assert data.fill(b"56") == 2
    assert data.contents == b"5634"
    assert not data.complete


def test_the_time_of_a_transfer_is_from_its_first_byte_to_its_last():
    data = Transfer(4)
    data.request(0, 4)
    data.fill(b"1", 1000)
    data.fill(b"2", 1500)
    data.fill(b"34", 1800)
    assert data.trans_time == 800


def test_resizing_keeps_contents_and_zeroes_what_is_new():
    data = Transfer(3)
    data.request(0, 3)
    data.fill(b"abc")
    assert data.resize(6) == 0
    assert data.contents == b"abc\0\0\0"
    assert data.resize(2) == -errno.EINVAL
    assert data.resize(0) == -errno.EINVAL
    assert data.numbers[0] == 6
    data.request(0, 1)
    assert data.resize(2) == 0
    assert data.contents == b"ab"


@pytest.mark.skipif("address" in SANITIZER, reason="AddressSanitizer reports what the test asks for")
def test_memory_that_cannot_be_had_leaves_the_buffer_as_it_was():
    data = Transfer(3)
    data.request(0, 3)
    data.fill(b"abc")
    assert data.resize(sys.maxsize) == -errno.ENOMEM
    assert data.contents == b"abc"


def test_receiving_in_place_pins_the_buffer():
    data = Transfer(100)
    data.request(10, 50)
    assert data.receive(51, b"") == (0, None)
    assert data.receive(50, b"x" * 20, resize_meanwhile=200) == (50, -errno.EBUSY)
    assert data.numbers == (100, 10, 50, 20)
    assert data.contents[10:31] == b"x" * 20 + b"\0"
    assert data.resize(200) == 0


def test_no_request_means_no_room_in_place():
    data = Transfer(100)
    assert data.receive(0, b"") == (0, None)


@given(
    size=st.integers(1, 40),
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("request"), st.integers(0, 50), st.integers(0, 50)),
            st.tuples(st.just("fill"), st.binary(max_size=30)),
            st.tuples(st.just("resize"), st.integers(0, 60)),
        ),
        max_size=30,
    ),
)
@settings(deadline=None, max_examples=200)
def test_any_sequence_agrees_with_a_model(size, steps):
    data, model = Transfer(size), bytearray(size)
    position = length = done = 0
    for step, *arguments in steps:
        if step == "request":
            fits = sum(arguments) <= len(model)
            assert (data.request(*arguments) == 0) == fits
            if fits:
                (position, length), done = arguments, 0
        elif step == "resize":
            fits = arguments[0] > 0 and arguments[0] >= position + length
            assert (data.resize(arguments[0]) == 0) == fits
            if fits:
                model = (model + bytes(60))[: arguments[0]] if arguments[0] > len(model) else model[: arguments[0]]
        else:
            (piece,) = arguments
            done = 0 if done == length else done
            piece = piece[: length - done]
            assert data.fill(arguments[0]) == len(piece)
            model[position + done : position + done + len(piece)] = piece
            done += len(piece)
        assert data.numbers == (len(model), position, length, done)
        assert data.contents in (None, bytes(model))


def test_input_stays_in_the_scratch_buffer_until_the_turn_ends():
    data = Input()
    data.arrive(b"hello")
    assert not data.stored
    assert data.consume(2) == b"he"
    assert data.keep() == 0
    assert data.stored
    assert data.waiting == b"llo"


def test_an_empty_input_holds_no_memory():
    data = Input()
    data.arrive(b"hello")
    data.keep()
    assert data.capacity
    data.consume(5)
    assert data.capacity == 0
    data.arrive(b"x")
    data.consume(1)
    data.keep()
    assert data.capacity == 0


def test_storage_grows_by_doubling_so_that_single_bytes_cost_linear_time():
    data, capacities = Input(), set()
    data.arrive(b"x")
    data.keep()
    for _ in range(5000):
        data.arrive_behind(b"x", 1)
        capacities.add(data.capacity)
    assert data.waiting == b"x" * 5001
    assert len(capacities) < 20


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("arrive"), st.binary(min_size=1, max_size=50)),
            st.tuples(st.just("consume"), st.integers(0, 60)),
            st.tuples(st.just("unread"), st.binary(min_size=1, max_size=20)),
            st.tuples(st.just("keep")),
        ),
        max_size=40,
    )
)
@settings(deadline=None, max_examples=200)
def test_any_sequence_of_input_agrees_with_a_model(steps):
    data, model = Input(), b""
    for step, *arguments in steps:
        if step == "arrive":
            if model:
                data.arrive_behind(arguments[0], len(arguments[0]) + 3)
            else:
                data.arrive(arguments[0])
            model += arguments[0]
        elif step == "consume":
            n = min(arguments[0], len(model))
            assert data.consume(n) == model[:n]
            model = model[n:]
        elif step == "unread":
            assert data.unread(arguments[0]) == 0
            model = arguments[0] + model
        else:
            assert data.keep() == 0
            assert data.stored == bool(model)
        assert data.waiting == model


def test_only_a_longest_job_is_reported():
    jobs = Jobs()
    assert [jobs.enter(begin, end) for begin, end in [(0, 10), (10, 15), (20, 30), (30, 41), (50, 50)]] == [
        10,
        0,
        0,
        11,
        0,
    ]
    assert jobs.seen == (5, 36, 11)


@pytest.mark.parametrize("size", [1, 2**20])
def test_a_fresh_transfer_has_asked_for_nothing(size):
    data = Transfer(size)
    assert data.numbers == (size, 0, 0, 0)
    assert not data.complete
