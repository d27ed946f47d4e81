"""send_data and bytes from the same call: both go out at once, send_data first; an error takes neither away."""

import pytest
from contract_helpers import every_trigger, handler
from helpers import recv_exact, recv_until_eof, wait_until

from tstpool import LengthPrefixed, TstStat

FRAMING = LengthPrefixed(4)
LARGE = b"B" * 100_000


def put(sock, data):
    """Asks for these bytes to be sent from the buffer."""
    sock.send_data.s[: len(data)] = data
    sock.send_data.req_len = len(data)


def frame(framing, data):
    return len(data).to_bytes(4, "big") + data if framing else data


def answer(sock, data):
    """What the message says: "small" and "large" are replies with send_data before them, "raise" fails after that."""
    data = bytes(data)
    if data == b"none":
        return None
    put(sock, b"A")
    if data == b"raise":
        raise ValueError(data)
    return LARGE if data == b"large" else b"B"


def forgive(sock, error):
    return TstStat.SUSPEND


def pool_of(make_pool, path, on_message, on_error=forgive, **options):
    """A pool where that is the handler: the pool's or the socket's own one, an object or a function."""
    hooks = handler(on_message=on_message, on_error=on_error)
    if path == "pools object":
        return make_pool(hooks, **options)

    def function(sock):
        return on_message(sock, sock.read())

    if path == "pools function":
        return make_pool(function, **options)
    own = hooks if path == "own object" else function
    # Of a function that raises, the pool's on_error hears.
    return make_pool(handler(on_connect=lambda sock: setattr(sock, "handler", own), on_error=on_error), **options)


each_path = pytest.mark.parametrize("path", ["pools object", "own object", "pools function", "own function"])
each_object = pytest.mark.parametrize("path", ["pools object", "own object"])
each_with_on_error = pytest.mark.parametrize("path", ["pools object", "own object", "own function"])
each_framing = pytest.mark.parametrize("framing", [None, FRAMING], ids=["no framing", "framing"])


@each_path
@each_framing
@every_trigger
def test_both_come_at_once_and_in_this_order(make_pool, make_client, path, framing, trigger):
    """Of a small reply and of a large one; the same again, as the buffer is free by then."""
    pool = pool_of(make_pool, path, answer, framing=framing, trigger=trigger, workers=2)
    client = make_client(pool, timeout=3)
    for request, reply in [(b"small", b"B"), (b"large", LARGE)] * 3:
        expected = b"A" + frame(framing, reply)
        client.sendall(frame(framing, request))
        assert recv_exact(client, len(expected)) == expected


@each_object
@each_framing
def test_of_a_message_that_is_lent(make_pool, make_client, path, framing):
    """copy=False."""
    pool = pool_of(make_pool, path, answer, framing=framing, copy=False, workers=2)
    client = make_client(pool, timeout=3)
    for request, reply in [(b"small", b"B"), (b"large", LARGE)]:
        expected = b"A" + frame(framing, reply)
        client.sendall(frame(framing, request))
        assert recv_exact(client, len(expected)) == expected


@each_path
def test_each_message_of_a_burst(make_pool, make_client, path):
    pool = pool_of(make_pool, path, answer, framing=FRAMING, workers=2)
    client = make_client(pool, timeout=3)
    requests = [b"small", b"none", b"large", b"small"] * 10
    replies = {b"small": b"A" + frame(True, b"B"), b"large": b"A" + frame(True, LARGE), b"none": b""}
    expected = b"".join(replies[request] for request in requests)
    client.sendall(b"".join(frame(True, request) for request in requests))
    assert recv_exact(client, len(expected)) == expected


@each_with_on_error
@each_framing
@every_trigger
def test_after_an_error_that_was_forgiven_it_is_sent_too(make_pool, make_client, path, framing, trigger):
    """At once, not with the next message; and the next reply has one of its own before it."""
    pool = pool_of(make_pool, path, answer, framing=framing, trigger=trigger, workers=2)
    client = make_client(pool, timeout=3)
    for _ in range(2):
        client.sendall(frame(framing, b"raise"))
        assert recv_exact(client, 1) == b"A"
        client.sendall(frame(framing, b"small"))
        expected = b"A" + frame(framing, b"B")
        assert recv_exact(client, len(expected)) == expected


@each_with_on_error
@each_framing
@every_trigger
@pytest.mark.parametrize("verdict", [None, TstStat.DISCONNECT])
def test_what_on_error_asks_for_is_sent_before_the_disconnect(make_pool, make_client, path, framing, trigger, verdict):
    def fails(sock, data):
        raise ValueError(data)

    def sorry(sock, error):
        put(sock, b"sorry")
        return verdict

    pool = pool_of(make_pool, path, fails, sorry, framing=framing, trigger=trigger, workers=2)
    client = make_client(pool, timeout=3)
    client.sendall(frame(framing, b"x"))
    assert recv_until_eof(client) == b"sorry"


@each_object
@every_trigger
def test_what_on_error_asks_for_is_sent_to_a_peer_whose_message_is_too_long(make_pool, make_client, path, trigger):
    def too_long(sock, error):
        put(sock, b"too long")

    framing = LengthPrefixed(4, max_message=1000)
    pool = pool_of(make_pool, path, answer, too_long, framing=framing, trigger=trigger, workers=2)
    client = make_client(pool, timeout=3)
    client.sendall(frame(framing, b"none") + b"\xff" * 4)
    assert recv_until_eof(client) == b"too long"


@each_path
@each_framing
@every_trigger
def test_a_close_in_the_same_call_drops_it(make_pool, make_client, path, framing, trigger):
    """It was not sent, and com_len does not say so: close() ends the output there and then."""
    data = []

    def closes(sock, message):
        data.append(sock.send_data)
        sock.send(b"sent;")
        put(sock, b"bye")
        sock.close()

    pool = pool_of(make_pool, path, closes, framing=framing, trigger=trigger, workers=2)
    client = make_client(pool, timeout=3)
    client.sendall(frame(framing, b"x"))
    assert recv_until_eof(client) == b"sent;"
    client.close()
    wait_until(lambda: len(pool) == 0)
    assert data[0].com_len == 0
