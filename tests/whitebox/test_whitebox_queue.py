"""White box: output that waits (_queue.pxd)."""

from _whitebox import PIECES, Queue
from hypothesis import given, settings
from hypothesis import strategies as st


def test_small_output_shares_one_chunk():
    queue = Queue()
    for _ in range(10):
        assert queue.append(b"x" * 64) == 0
    assert queue.chunks == 1
    assert queue.pieces() == ([b"x" * 640], 640)


def test_an_empty_queue_has_no_chunk():
    queue = Queue()
    queue.append(b"hello")
    queue.consume(5)
    assert (queue.size, queue.chunks) == (0, 0)
    assert queue.pieces() == ([], 0)


def test_an_append_that_overflows_a_chunk_is_split_and_stays_in_order():
    queue = Queue()
    queue.append(b"a" * 900)
    queue.append(b"b" * 900)
    pieces, total = queue.pieces()
    assert total == 1800
    assert b"".join(pieces) == b"a" * 900 + b"b" * 900
    assert queue.chunks == 2


def test_what_a_flusher_has_picked_up_does_not_move_when_more_is_appended():
    queue = Queue()
    queue.append(b"a" * 10)
    before, _ = queue.pieces()
    for _ in range(100):
        queue.append(b"b" * 1000)
    after, _ = queue.pieces()
    assert after[0].startswith(before[0])


def test_one_send_is_given_a_bounded_number_of_pieces_whose_sum_is_the_total():
    queue = Queue()
    for _ in range(PIECES + 5):
        queue.append(b"x" * 70000)
    pieces, total = queue.pieces()
    assert len(pieces) == PIECES
    assert total == sum(map(len, pieces)) < queue.size


def test_dropping_forgets_what_waits_and_counts_it_as_gone():
    queue = Queue()
    queue.append(b"x" * 5000)
    queue.consume(100)
    queue.drop()
    assert (queue.size, queue.chunks) == (0, 0)
    assert queue.counts == (5000, 5000)
    queue.append(b"again")
    assert queue.pieces() == ([b"again"], 5)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.integers(0, 40_000)),
            st.tuples(st.just("consume"), st.floats(0, 1)),
        ),
        max_size=40,
    )
)
@settings(deadline=None, max_examples=150)
def test_any_sequence_agrees_with_a_model(steps):
    queue, model, n = Queue(), bytearray(), 0
    queued = sent = 0
    for step, amount in steps:
        if step == "append":
            n += 1
            piece = n.to_bytes(2, "big") * (amount // 2)
            assert queue.append(piece) == 0
            model += piece
            queued += len(piece)
        else:
            pieces, total = queue.pieces()
            taken = int(total * amount)
            queue.consume(taken)
            del model[:taken]
            sent += taken
        pieces, total = queue.pieces()
        assert bytes(model[:total]) == b"".join(pieces)
        assert queue.size == len(model)
        assert queue.counts == (queued, sent)
        assert (queue.chunks == 0) == (not model) or amount == 0 or queue.size == 0
