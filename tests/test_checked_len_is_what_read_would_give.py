"""recv_data.checked_len with a framing: this message's bytes, from the first call on, whatever has come behind it."""

import pytest
from compiled_helpers import pack
from contract_helpers import every_trigger, handler
from helpers import wait_until

from tstpool import Delimited, Fixed, LengthPrefixed, TstHandler

# framing, a stream, and its messages
STREAMS = [
    (Delimited(), b"ab\ncdef\n\ng\n", [b"ab", b"cdef", b"", b"g"]),
    (Delimited(b"\r\n", keep=True), b"ab\r\n\r\ncdef\r\n", [b"ab\r\n", b"\r\n", b"cdef\r\n"]),
    (Fixed(3), b"abcdefghi", [b"abc", b"def", b"ghi"]),
    (LengthPrefixed(1), b"\2ab\4cdef\0\1g", [b"ab", b"cdef", b"", b"g"]),
    (LengthPrefixed(4), pack(b"ab", bytes(300_000), b"c"), [b"ab", bytes(300_000), b"c"]),
    (LengthPrefixed(2, strip=False), b"\0\2ab\0\1g", [b"\0\2ab", b"\0\1g"]),
]
each_stream = pytest.mark.parametrize(("framing", "stream", "messages"), STREAMS, ids=lambda value: repr(value)[:40])
each_place = pytest.mark.parametrize("place", ["pool", "own"])


def serve(make_pool, served, place, **options):
    """A pool whose handler this is, or where each socket has it as its own."""
    if place == "own":
        served = handler(on_connect=lambda sock, own=served: setattr(sock, "handler", own))
    return make_pool(served, workers=2, **options)


@each_stream
@each_place
@every_trigger
def test_in_a_function(make_pool, make_client, framing, stream, messages, place, trigger):
    """The messages come in one burst; then another one, when the first is all read."""
    seen = []

    def function(sock):
        seen.append((sock.recv_data.checked_len, sock.read()))

    client = make_client(serve(make_pool, function, place, framing=framing, trigger=trigger))
    for n in (1, 2):
        client.sendall(stream)
        wait_until(lambda n=n: len(seen) == n * len(messages))
    assert seen == [(len(body), body) for body in messages] * 2


@each_stream
@each_place
@every_trigger
def test_in_on_message_nothing_is_left_to_read(make_pool, make_client, framing, stream, messages, place, trigger):
    """The message was handed out as bytes; what has come behind it is another call's."""
    seen = []

    class Handler(TstHandler):
        def on_message(self, sock, data):
            seen.append((data, sock.recv_data.checked_len, sock.read()))

    client = make_client(serve(make_pool, Handler(), place, framing=framing, trigger=trigger))
    client.sendall(stream)
    wait_until(lambda: len(seen) == len(messages))
    assert seen == [(body, 0, b"") for body in messages]
