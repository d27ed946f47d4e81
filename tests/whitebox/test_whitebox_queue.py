"""White box: output that waits (_queue.pxd)."""

import sys

import pytest
from _whitebox import BLOCKS, PIECES, STOCK, Queue
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
    for burst, size in ((False, 900), (True, 12_000)):
        queue = Queue(burst)
        queue.append(b"a" * size)
        queue.append(b"b" * size)
        pieces, total = queue.pieces()
        assert total == 2 * size
        assert b"".join(pieces) == b"a" * size + b"b" * size
        assert queue.chunks == 2


def test_chunks_go_back_to_the_stock_and_are_used_again():
    queue = Queue()
    for _ in range(3):
        queue.append(b"x" * 30_000)  # one of the usual size, then one as large as the rest
        queue.append(b"y" * 10)
        queue.consume(queue.size)
        assert queue.in_stock == 1
    for _ in range(STOCK + 10):
        queue.append(b"x" * 16_000)
    queue.consume(queue.size)
    assert queue.in_stock == STOCK


def test_a_thread_outside_takes_no_more_than_it_needs():
    queue = Queue(burst=False)
    queue.append(b"x" * 64)
    assert queue.memory < 1_100
    queue.consume(64)
    assert queue.in_stock == 0


def test_what_the_kernel_does_not_take_moves_into_memory_of_its_own_size():
    queue = Queue()
    queue.append(b"x" * 64)
    queue.consume(10)
    queue.settle()
    assert queue.memory < 200
    assert queue.pieces() == ([b"x" * 54], 54)
    assert queue.in_stock == 1
    queue.append(b"y" * 10)
    assert b"".join(queue.pieces()[0]) == b"x" * 54 + b"y" * 10
    queue.consume(64)
    assert queue.size == 0


def test_much_that_the_kernel_does_not_take_stays_where_it_is():
    queue = Queue()
    queue.append(b"x" * 8_000)
    queue.settle()
    assert queue.in_stock == 0


def test_shared_bytes_are_queued_without_a_copy_in_their_place():
    queue = Queue()
    queue.append(b"a" * 10)
    queue.share(b"b" * 5_000)
    queue.append(b"c" * 10)
    assert queue.size == 5_020
    assert queue.memory < 2 * 16_384 + 200
    queue.consume(15)
    assert b"".join(queue.pieces()[0]) == b"b" * 4_995 + b"c" * 10
    queue.consume(queue.size)
    assert (queue.chunks, queue.drop_litter()) == (0, 0)


@pytest.mark.parametrize("end", ["consume", "drop"])
def test_a_shared_object_lives_until_it_is_sent_and_is_let_go_by_the_interpreter(end):
    queue = Queue()
    data = bytes(bytearray(10_000))
    before = sys.getrefcount(data)
    queue.share(data, as_object=True)
    assert sys.getrefcount(data) == before + 1
    assert queue.drop_litter() == 0
    if end == "consume":
        queue.consume(10_000)
    else:
        queue.drop()
    assert sys.getrefcount(data) == before + 1  # nobody could let it go without the interpreter
    assert queue.drop_litter() == 1
    assert sys.getrefcount(data) == before


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


def test_a_header_goes_in_front_of_shared_bytes():
    queue = Queue()
    queue.append(b"head")
    queue.share(b"12345678" + b"x" * 9000, front=8)
    queue.append(b"next")
    assert queue.join()
    assert queue.pieces() == ([b"head" + b"x" * 9000, b"next"], 9008)
    assert queue.counts == (9008, 0)
    assert not queue.join()
    queue.consume(6)
    assert queue.pieces() == ([b"x" * 8998, b"next"], 9002)
    queue.consume(9002)
    assert queue.chunks == 0


@pytest.mark.parametrize(
    "fill",
    [
        lambda queue: None,
        lambda queue: queue.append(b"head"),
        lambda queue: queue.share(b"12345678" + b"x" * 9000, front=8),
        lambda queue: (queue.append(b"ninebytes"), queue.share(b"12345678" + b"x" * 9000, front=8)),
        lambda queue: (queue.append(b"head"), queue.share(b"x" * 9000)),
        lambda queue: (queue.append(b"head"), queue.share(b"12345678" + b"x" * 9000, front=8, times=2)),
        lambda queue: (queue.append(b"head"), queue.consume(1), queue.share(b"12345678" + b"x" * 9000, front=8)),
        lambda queue: (queue.append(b"h" * 16300), queue.append(b"h" * 100), queue.share(bytes(9000), front=8)),
    ],
    ids=["nothing", "no bytes", "no header", "too long", "no front", "used twice", "partly sent", "other output"],
)
def test_it_stays_where_it_is_else(fill):
    queue = Queue()
    fill(queue)
    before = queue.pieces()
    assert not queue.join()
    assert queue.pieces() == before


def test_a_long_message_gets_one_piece_if_nothing_waits():
    queue = Queue()
    assert queue.reserve(20_004) == 0
    queue.append(b"head")
    queue.append(b"x" * 20_000)
    assert queue.pieces() == ([b"head" + b"x" * 20_000], 20_004)
    assert queue.reserve(50_000) == 0  # it does not go into the middle of what waits
    assert queue.chunks == 1
    queue.drop()
    assert queue.reserve(1000) == 0
    assert queue.chunks == 0


def test_a_block_is_used_again_for_a_message_that_hardly_needs_less():
    queue = Queue()
    first, held = queue.block(1_000_000)
    assert held == 1_000_000
    queue.leave_block(first)
    for size in (1_000_000, 900_000, 800_001):
        again, held = queue.block(size)
        assert (again, held) == (first, 1_000_000)
        queue.leave_block(again)
    assert queue.blocks_in_stock == [1_000_000]


@pytest.mark.parametrize("size", [1_000_001, 700_000])
def test_if_none_fits_there_is_a_new_one_beside_those_that_are_kept(size):
    """So that messages of several sizes, in turn, find theirs."""
    queue = Queue()
    blocks = {other: queue.block(other)[0] for other in (1_000_000, 500_000, 200_000)}
    for block in blocks.values():
        queue.leave_block(block)
    other, held = queue.block(size)
    assert held == size
    assert queue.blocks_in_stock == [200_000, 500_000, 1_000_000]
    for size in blocks:
        assert queue.block(size)[0] == blocks[size]
    assert queue.blocks_in_stock == []
    for block in (*blocks.values(), other):
        queue.leave_block(block)


def test_no_more_blocks_are_kept_than_may_be():
    """Those that were kept first go, and one that is larger than all may be goes at once."""
    queue = Queue()
    for size in (BLOCKS, BLOCKS + 1):
        queue.leave_block(queue.block(size)[0])
    assert queue.blocks_in_stock == [BLOCKS]
    sizes = (BLOCKS // 2, BLOCKS // 4, BLOCKS // 4, 131_072)
    blocks = [queue.block(size)[0] for size in sizes]
    assert queue.blocks_in_stock == [BLOCKS]
    for block in blocks:
        queue.leave_block(block)
    assert queue.blocks_in_stock == [131_072, BLOCKS // 4, BLOCKS // 4]


def test_blocks_go_when_a_run_ends():
    queue = Queue()
    blocks = [queue.block(size)[0] for size in (200_000, 300_000)]
    for block in blocks:
        queue.leave_block(block)
    queue.free_blocks()
    assert queue.blocks_in_stock == []
