"""Framing against models of a few lines: wherever a stream is cut into reads, the messages are the same."""

import itertools
import socket
import time

import pytest
from _whitebox import Stream
from contract_helpers import handler
from helpers import patient, scaled, wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tstpool import Delimited, Fixed, LengthPrefixed, MessageTooLarge, Raw

# -------------------------------------------------------------------------------------------------- models
#
# Each says where the first message of a stream lies: (its begin, its end, the begin of the next one), or None when it
# is not whole yet. TooLarge: it is longer than allowed, or will be.


class TooLarge(Exception):
    pass


def first_fixed(stream, size):
    return (0, size, size) if len(stream) >= size else None


def first_delimited(stream, delimiter, keep, max_message):
    place = stream.find(delimiter)
    if place > max_message or (place < 0 and len(stream) - (len(delimiter) - 1) > max_message):
        raise TooLarge  # the last bytes may be the beginning of a delimiter: they do not count yet
    end = place + len(delimiter)
    return (0, end if keep else place, end) if place >= 0 else None


def first_prefixed(stream, size, byteorder, offset, adjust, strip, max_message):
    header = offset + size
    if len(stream) < header:
        return None
    end = header + int.from_bytes(stream[offset:header], byteorder) + adjust
    if not header <= end <= header + max_message:
        raise TooLarge
    return (header if strip else 0, end, end) if len(stream) >= end else None


def model(first, options, stream):
    """(messages of a stream, what is left of it); what is left is None when it ends with an error."""
    messages = []
    try:
        while stream and (found := first(stream, **options)):
            begin, end, following = found
            messages.append(stream[begin:end])
            stream = stream[following:]
    except TooLarge:
        stream = None
    return messages, stream


# ------------------------------------------------------------------------------------------------- streams
#
# Each strategy draws (framing, model, its options, stream, the places where the stream is cut into reads). Few draws
# for each, with bytes that choose among what is interesting: Hypothesis takes much longer to draw than we to cut.

PLACES = st.binary(min_size=3, max_size=8)  # each byte a part of the stream's length; see pieces()

DELIMITERS = [b"\n", b"\0", b"\r\n", b"ab", b"aa", b"aab", b"abab", b"aabaaab", b"-" * 255]
DELIMITED_OPTIONS = itertools.product(DELIMITERS, (False, True), (1, 2, 7, 20, 300, 1 << 20))
PREFIXED_OPTIONS = itertools.product(
    (1, 2, 3, 4, 8), ("big", "little"), range(6), range(-9, 10), (False, True), (1, 20, 40, 1 << 20)
)
FIXED = st.tuples(st.integers(1, 20), st.binary(min_size=10, max_size=60), PLACES)
DELIMITED = st.tuples(st.sampled_from(list(DELIMITED_OPTIONS)), st.binary(min_size=5, max_size=20), PLACES)
PREFIXED = st.tuples(st.sampled_from(list(PREFIXED_OPTIONS)), st.binary(min_size=2, max_size=8), PLACES)


def fixed(drawn):
    size, stream, places = drawn
    return Fixed(size), first_fixed, {"size": size}, stream, places


def delimited(drawn):
    """Delimiters, beginnings and ends of them, and what is neither."""
    options, choices, places = drawn
    delimiter = options[0]
    parts = [delimiter, delimiter[: len(delimiter) // 2], delimiter[:-1], delimiter[:1], delimiter[-1:], b"x", b"xyz"]
    stream = b"".join(parts[choice % len(parts)] for choice in choices)
    options = dict(zip(("delimiter", "keep", "max_message"), options, strict=True))
    return Delimited(**options), first_delimited, options, stream, places


def prefixed(drawn):
    """Most length fields say truly how long the body is; the others are as small or as large as can be."""
    options, choices, places = drawn
    options = dict(zip(("size", "byteorder", "offset", "adjust", "strip", "max_message"), options, strict=True))
    most = 256 ** options["size"] - 1
    lies = [0, options["max_message"] - options["adjust"], options["max_message"] + 1, most // 2, most - 1, most]
    stream = b""
    for choice in choices:
        body = b"abcdefghijklmnopqrstuvwxy"[: choice // 10]
        number = lies[choice % 10] if choice % 10 < len(lies) and choice >= 230 else len(body) - options["adjust"]
        header = min(max(number, 0), most).to_bytes(options["size"], options["byteorder"])
        stream += b"\xff" * options["offset"] + header + body
    return LengthPrefixed(**options), first_prefixed, options, stream, places


def pieces(stream, places):
    """The stream as it is read: cut anywhere; or, if the first place lies far behind, byte by byte."""
    if places[0] >= 224:
        return [stream[i : i + 1] for i in range(len(stream))]
    cuts = [0, *sorted(place * len(stream) // 255 for place in places), len(stream)]
    return [stream[begin:end] for begin, end in itertools.pairwise(cuts) if begin < end]


def examples(n):
    """10,000 in all, from the tests below; fewer under a sanitizer."""
    return settings(
        deadline=None,
        max_examples=scaled(n, minimum=100),
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


KINDS = {
    "fixed": (FIXED.map(fixed), 1000),
    "delimited": (DELIMITED.map(delimited), 4000),
    "prefixed": (PREFIXED.map(prefixed), 4000),
}


def cut(framing, reads, compiled):
    """The Stream after these reads, cut by the engine's own code: as for handlers in Python, or for those in C."""
    stream = Stream(framing, compiled)
    for read in reads:
        stream.arrive(read)
    return stream


@pytest.mark.parametrize("kind", KINDS)
def test_any_split_without_a_kernel_that_joins_the_pieces(kind):
    """B61."""
    strategy, n = KINDS[kind]

    @given(case=strategy)
    @examples(n)
    def check(case):
        framing, first, options, stream, places = case
        messages, left = model(first, options, stream)
        for compiled in (False, True):
            result = cut(framing, pieces(stream, places), compiled)
            assert result.messages == messages
            assert result.too_large == (left is None)
            assert result.waiting == (left or b"")

    check()


@given(stream=st.binary(max_size=100), limit=st.none() | st.integers(1, 30), places=PLACES)
@examples(1000)
def test_without_messages_all_bytes_come_in_order(stream, limit, places):
    """Raw: where messages end depends on the reads, within the limit; the bytes do not."""
    reads = pieces(stream, places)
    for framing in (Raw(max_message=limit), None):
        for compiled in (False, True):
            messages = cut(framing, reads, compiled).messages
            assert b"".join(messages) == stream
            if framing is None or limit is None:
                assert messages == reads
            else:
                assert all(0 < len(message) <= limit for message in messages)


@pytest.mark.parametrize("kind", KINDS)
def test_any_split_in_a_pool(make_pool, kind):
    """B61: over a socket; the next piece is written when the pool has read the one before."""
    messages, ends = [], []

    def on_error(sock, exc):
        messages.append(type(exc))

    hooks = handler(
        on_message=lambda sock, data: messages.append(data),
        on_error=on_error,
        on_disconnect=lambda sock, reason: ends.append(reason),
    )
    pool = make_pool(hooks, listen=None, workers=2)

    @given(case=KINDS[kind][0])
    @examples(200)
    def check(case):
        framing, first, options, stream, places = case
        expected, left = model(first, options, stream)
        messages.clear()
        ends.clear()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            pool.addsocket(theirs, framing=framing)
            for piece in pieces(stream, places):
                goal = pool.stats().bytes_in + len(piece)
                try:
                    ours.sendall(piece)
                except (BrokenPipeError, ConnectionResetError):
                    break  # the pool has had enough: the messages tell whether it was right
                wait_until(lambda goal=goal: pool.stats().bytes_in == goal or ends)
            else:
                ours.shutdown(socket.SHUT_WR)
            wait_until(lambda: ends)
        assert messages == expected + [MessageTooLarge] * (left is None)

    check()


# ---------------------------------------------------------------------------------------------------- cost


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("framing", "stream"),
    [
        (Delimited(), b"x" * ((1 << 20) - 1) + b"\n"),
        (Delimited(b"aab"), b"a" * ((1 << 20) - 1) + b"b"),
        (Delimited(b"\r\n"), (b"x" * 62 + b"\r\n") * (1 << 14)),
        (LengthPrefixed(4), ((1 << 20) - 4).to_bytes(4, "big") + b"x" * ((1 << 20) - 4)),
        (LengthPrefixed(2), ((62).to_bytes(2, "big") + b"x" * 62) * (1 << 14)),
    ],
    ids=["one line", "many half delimiters", "many lines", "one length", "many lengths"],
)
def test_a_megabyte_in_reads_of_one_byte_is_cut_in_linear_time(framing, stream, compiled):
    """B61: if each read looked at, or moved, all that waits already, it would take minutes."""
    assert len(stream) == 1 << 20
    cutter = Stream(framing, compiled)
    began = time.monotonic()
    cutter.arrive(stream, step=1)
    assert time.monotonic() - began < patient(2)
    assert sum(map(len, cutter.messages)) >= len(stream) - 4 - 2 * len(cutter.messages)
    assert cutter.waiting == b""
    assert cutter.capacity == 0


@pytest.mark.parametrize("delimiter", [b"\n", b"\r\n", b"aab", b"abab", b"-" * 255], ids=repr)
def test_a_delimiter_across_reads_is_found_once(delimiter):
    """B61: split at each of its places: not found before its last byte is there, and only once."""
    for split in range(1, len(delimiter) + 1):
        cutter = Stream(Delimited(delimiter))
        cutter.arrive(b"one" + delimiter[:split])
        assert cutter.messages == ([b"one"] if split == len(delimiter) else [])
        cutter.arrive(delimiter[split:] + b"two")
        assert cutter.messages == [b"one"]
        assert cutter.waiting == b"two"
        cutter.arrive(delimiter)
        assert cutter.messages == [b"one", b"two"]
        assert cutter.waiting == b""


@pytest.mark.parametrize("delimiter", [b"\n", b"\r\n", b"-" * 255], ids=repr)
def test_a_delimiter_is_not_searched_from_the_start(delimiter):
    """B61: one that is put, behind the engine's back, where it has looked already is not seen; the next one is."""
    cutter = Stream(Delimited(delimiter))
    for n in range(1, 1001):
        cutter.arrive(b"x")
        assert cutter.scanned == n
    for i, byte in enumerate(delimiter):
        cutter.change_byte(100 + i, byte)
    cutter.arrive(b"x" * 1000)
    assert cutter.messages == []
    assert cutter.scanned == 2000
    cutter.arrive(delimiter)
    assert cutter.messages == [b"x" * 100 + delimiter + b"x" * (1900 - len(delimiter))]


def test_the_size_of_a_message_that_is_gone_is_not_taken_for_the_next_one():
    """A handler holds back what follows, a long message was the last of the input, and the first bytes of another come:
    an object for a long message must not be made by the size of the one before."""
    stream = Stream(LengthPrefixed(4), compiled=True)
    stream.holds = True
    stream.arrive((200_000).to_bytes(4, "big") + bytes(200_000))
    assert [len(message) for message in stream.messages] == [200_000]
    assert not stream.go_on()
    assert stream.needed <= 4
