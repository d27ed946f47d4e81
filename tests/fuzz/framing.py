"""Fuzz target: framing. A framing with any parameters, a stream, and the reads that it comes in, against a model.

The bytes: a framing; another one and after how many messages it takes over; the size of reads; the stream.
"""

import pickle

import _whitebox
from fuzz.framing_model import TOO_LARGE, acceptable, cut, edge, model_from
from fuzz.source import Source

import tstpool

MOST = 4096  # bytes in a stream: some thousand reads
ALLOCATED = 2**20  # a length that a peer announces is memory at once: up to max_message, which is the user's choice


def target(data):
    source = Source(data)
    model = model_from(source)
    try:
        framing = model.real()
    except ValueError:
        assert not acceptable(model), f"refused: {model}"
        return
    assert acceptable(model), f"taken: {model}"
    assert pickle.loads(pickle.dumps(framing)) == framing
    check_header(model, edge(source))
    changes = {}
    if model.kind is not tstpool.Raw and source.flag():
        later = model_from(source)
        if acceptable(later):
            changes[source.below(4) + 1] = later
    steps = [source.below(64) + 1 for _ in range(source.below(8) + 1)]
    stream = source.rest()[:MOST]
    check_stream(model, framing, stream, steps, changes)


def check_stream(model, framing, stream, steps, changes):
    """The bare function; then as for a handler in Python, which may change the framing, and as for one in C."""
    if model.kind is not tstpool.Raw:
        assert cut_all(_whitebox.Framing.like(framing), stream, steps) == cut(model, stream)
    if any(each.max_message > ALLOCATED for each in [model, *changes.values()]):
        return
    for compiled in (False, True):
        used = {} if compiled else changes
        cutter = _whitebox.Stream(framing, compiled)
        for number, later in used.items():
            cutter.change_framing(number, later.real())
        feed(cutter, stream, steps)
        expect(cutter, model, stream, used)


def feed(cutter, stream, steps):
    place = turn = 0
    while place < len(stream) and not cutter.too_large:
        step = steps[turn % len(steps)]
        cutter.arrive(stream[place : place + step])
        place += step
        turn += 1


def expect(cutter, model, stream, changes):
    raw = [later for later in [model, *changes.values()] if later.kind is tstpool.Raw]
    expected, left, too_large = cut(model, stream, changes)
    if raw:  # its messages depend on the reads: whole messages up to there, then every byte once
        n = next(iter(changes), 0)
        assert cutter.messages[:n] == expected[:n]
        assert b"".join(cutter.messages[n:]) == b"".join(expected[n:])
        assert all(0 < len(message) <= raw[0].max_message for message in cutter.messages[n:])
    else:
        assert cutter.messages == expected
    assert cutter.too_large == too_large
    assert cutter.waiting == left


def cut_all(framing, stream, steps):
    """What frame_next() alone finds, when it is asked after each read."""
    messages, unread, scanned, place, turn = [], b"", 0, 0, 0
    while place < len(stream):
        step = steps[turn % len(steps)]
        unread += stream[place : place + step]
        place += step
        turn += 1
        while True:
            result, message, whole, needed, scanned = framing.cut(unread, scanned)
            if result < 0:
                return messages, b"", True
            if result == 0:
                assert needed > len(unread) or not unread
                break
            messages.append(message)
            unread = unread[whole:]
    return messages, unread, False


def check_header(model, size):
    expected = model.header(size)
    header = _whitebox.Framing.like(model.real()).header(size)
    assert (TOO_LARGE if isinstance(header, int) else header) == expected
