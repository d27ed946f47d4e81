"""White box: framing (_frame.pxd), against models of a few lines."""

import errno

import pytest
from _whitebox import Framing
from helpers import scaled
from hypothesis import given, settings
from hypothesis import strategies as st

RAW, FIXED, DELIMITED, LENGTH = range(4)
MORE, WHOLE, TOO_LARGE = 0, 1, -errno.EMSGSIZE


def cut_all(framing, pieces):
    """The messages of a stream that arrives in these pieces, as the engine cuts them; and what is left over."""
    messages, unread, scanned = [], b"", 0
    for piece in pieces:
        unread += piece
        while True:
            result, message, whole, needed, scanned = framing.cut(unread, scanned)
            if result == TOO_LARGE:
                return messages, None
            if result == MORE:
                assert needed > len(unread) or not unread
                break
            messages.append(message)
            unread = unread[whole:]
    return messages, unread


def model_fixed(stream, size):
    n = len(stream) // size
    return [stream[i * size : (i + 1) * size] for i in range(n)], stream[n * size :]


def model_delimited(stream, delimiter, keep):
    *messages, rest = stream.split(delimiter)
    return [message + delimiter if keep else message for message in messages], rest


def model_length(stream, size, order, offset, adjust, keep):
    messages = []
    while len(stream) >= offset + size:
        body = int.from_bytes(stream[offset : offset + size], order) + adjust
        end = offset + size + body
        if len(stream) < end:
            break
        messages.append(stream[0 if keep else offset + size : end])
        stream = stream[end:]
    return messages, stream


@st.composite
def splits(draw, streams):
    """A stream, and the pieces that it arrives in."""
    stream = draw(streams)
    places = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    return stream, [stream[a:b] for a, b in zip([0, *places], [*places, len(stream)], strict=True)]


EXAMPLES = settings(deadline=None, max_examples=scaled(500, minimum=50))


@given(split=splits(st.binary(max_size=60)), size=st.integers(1, 9))
@EXAMPLES
def test_fixed_agrees_with_its_model(split, size):
    """B61."""
    stream, pieces = split
    assert cut_all(Framing(FIXED, fixed=size), pieces) == model_fixed(stream, size)


@given(
    split=splits(
        st.lists(st.sampled_from([b"a", b"b", b"\r", b"\n", b"\r\n", b"ab", b"aab"]), max_size=30).map(b"".join)
    ),
    delimiter=st.sampled_from([b"\n", b"\r\n", b"ab", b"aab", b"aa", b"abab"]),
    keep=st.booleans(),
)
@EXAMPLES
def test_delimited_agrees_with_its_model(split, delimiter, keep):
    """B61."""
    stream, pieces = split
    assert cut_all(Framing(DELIMITED, delimiter=delimiter, keep=keep), pieces) == model_delimited(
        stream, delimiter, keep
    )


@given(
    bodies=st.lists(st.binary(max_size=20), max_size=6),
    size=st.sampled_from([1, 2, 3, 4, 8]),
    order=st.sampled_from(["big", "little"]),
    offset=st.integers(0, 5),
    adjust=st.integers(-6, 0),
    keep=st.booleans(),
    data=st.data(),
)
@EXAMPLES
def test_length_prefixed_agrees_with_its_model(bodies, size, order, offset, adjust, keep, data):
    """B61."""
    head = bytes(range(offset))
    stream = b"".join(head + (len(body) - adjust).to_bytes(size, order) + body for body in bodies)
    stream, pieces = data.draw(splits(st.just(stream + data.draw(st.binary(max_size=offset + size - 1)))))
    framing = Framing(LENGTH, length_size=size, little=order == "little", offset=offset, adjust=adjust, keep=keep)
    assert cut_all(framing, pieces) == model_length(stream, size, order, offset, adjust, keep)


@given(size=st.sampled_from([1, 2, 3, 4, 8]), little=st.booleans(), offset=st.integers(0, 9), adjust=st.integers(-9, 9))
@EXAMPLES
def test_a_header_that_is_written_is_read_as_the_same_body(size, little, offset, adjust):
    framing = Framing(LENGTH, length_size=size, little=little, offset=offset, adjust=adjust)
    for body in (b"", b"x" * 9, b"y" * 200, b"z" * 300):
        header = framing.header(len(body))
        if header == TOO_LARGE:
            assert not 0 <= len(body) - adjust < 256**size
            continue
        assert len(header) == offset + size
        assert framing.cut(header + body)[:3] == (WHOLE, body, len(header) + len(body))


@pytest.mark.parametrize("number", [2**64 - 1, 2**63, 2**63 - 1, 2**32, 101])
@pytest.mark.parametrize("adjust", [0, 1, -1, 2**62, -(2**62)])
def test_a_length_beyond_the_limit_is_refused_before_anything_is_read(number, adjust):
    """B61."""
    framing = Framing(LENGTH, length_size=8, adjust=adjust, max_message=99)
    assert framing.cut(number.to_bytes(8, "big"))[0] == TOO_LARGE


@pytest.mark.parametrize(
    ("number", "adjust", "result"), [(5, -6, TOO_LARGE), (5, -5, WHOLE), (90, 9, MORE), (90, 10, TOO_LARGE)]
)
def test_a_body_is_never_negative_nor_beyond_the_limit(number, adjust, result):
    """B61."""
    framing = Framing(LENGTH, length_size=1, adjust=adjust, max_message=99)
    assert framing.cut(bytes([number]))[0] == result


def test_the_limit_of_a_delimited_message_counts_its_body_alone():
    framing = Framing(DELIMITED, delimiter=b"\r\n", max_message=5)
    assert framing.cut(b"12345\r\n")[:2] == (WHOLE, b"12345")
    assert framing.cut(b"12345\r")[0] == MORE
    assert framing.cut(b"123456")[0] == MORE  # the last byte may be half a delimiter: it is not looked at
    assert framing.cut(b"1234567")[0] == TOO_LARGE
    assert framing.cut(b"123456\r\n")[0] == TOO_LARGE


def test_a_delimiter_is_searched_once():
    framing = Framing(DELIMITED, delimiter=b"ab")
    scanned, unread = 0, b""
    for _ in range(50):
        unread += b"a"
        result, *_, scanned = framing.cut(unread, scanned)
        assert (result, scanned) == (MORE, len(unread))
    # It is not looked for where it was looked for in vain: one planted there now is not seen.
    planted = b"ab" + unread[2:]
    assert framing.cut(planted, scanned)[0] == MORE
    assert framing.cut(unread + b"b", scanned)[1] == b"a" * 49


def test_raw_is_all_that_is_there():
    framing = Framing(RAW)
    assert framing.cut(b"hello")[:3] == (WHOLE, b"hello", 5)
    assert framing.cut(b"")[0] == MORE


def test_fixed_writes_only_messages_of_its_size():
    framing = Framing(FIXED, fixed=4)
    assert framing.header(4) == b""
    assert framing.header(3) == TOO_LARGE


def about(*numbers):
    """These numbers and their neighbours, as far as they are not negative."""
    return sorted({number + step for number in numbers for step in (-1, 0, 1) if number + step >= 0})


@pytest.mark.parametrize("max_message", [1, 10, 255, 256, 66000])
@pytest.mark.parametrize("adjust", [-70000, -256, -255, -4, 0, 4, 255, 256, 70000])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_each_bound_of_a_length_is_exact(size, adjust, max_message):
    framing = Framing(LENGTH, length_size=size, adjust=adjust, max_message=max_message)
    field_most = 256**size - 1
    for body in about(0, adjust, max_message, min(field_most + adjust, 2**63)):
        number, header = body - adjust, framing.header(body)
        fits = body <= max_message and 0 <= number <= field_most
        assert header == (number.to_bytes(size, "big") if fits else TOO_LARGE)
    for number in about(0, -adjust, max_message - adjust, field_most):
        if number <= field_most:
            body = number + adjust
            result, message = framing.cut(number.to_bytes(size, "big") + bytes(max(0, min(body, 2 * max_message))))[:2]
            assert (result, message) == ((WHOLE, bytes(body)) if 0 <= body <= max_message else (TOO_LARGE, None))
