"""send_data that a handler asks for before it raises: it is sent, and then on_error's verdict holds."""

import pytest
from contract_helpers import every_trigger, handler
from helpers import recv_exact, recv_until_eof

from tstpool import LengthPrefixed, TstStat

FRAMING = LengthPrefixed(4)

each_framing = pytest.mark.parametrize("framing", [None, FRAMING], ids=["no framing", "framing"])


def frame(framing, data):
    return len(data).to_bytes(4, "big") + data if framing else data


def fails(sock, data):
    """Sends, asks for more to be sent from the buffer, and raises."""
    sock.send(b"sent;")
    sock.send_data.s[:5] = b"asked"
    sock.send_data.req_len = 5
    raise ValueError(bytes(data))


def pool_of(make_pool, path, hooks, **options):
    """A pool where that is the pool's handler, or the socket's own one; a function has the pool's on_error."""
    if path == "pools object":
        return make_pool(handler(on_message=fails, **hooks), **options)
    if path == "pools function":
        return make_pool(lambda sock: fails(sock, sock.read()), **options)
    own = handler(on_message=fails, **hooks) if path == "own object" else lambda sock: fails(sock, sock.read())
    return make_pool(handler(on_connect=lambda sock: setattr(sock, "handler", own), **hooks), **options)


@pytest.mark.parametrize("path", ["pools object", "own object", "pools function", "own function"])
@each_framing
@every_trigger
def test_with_the_default_on_error_before_the_end(make_pool, make_client, path, framing, trigger):
    """A control: it is logged and disconnected, but not before all that was asked for is out."""
    pool = pool_of(make_pool, path, {}, framing=framing, trigger=trigger, workers=2)
    client = make_client(pool, timeout=3)
    client.sendall(frame(framing, b"x"))
    assert recv_until_eof(client) == b"sent;asked"


@pytest.mark.parametrize("path", ["pools object", "own object", "own function"])
@each_framing
@every_trigger
def test_with_an_on_error_that_suspends_at_once(make_pool, make_client, path, framing, trigger):
    """A control: not with the next message, and each time anew."""
    hooks = {"on_error": lambda sock, error: TstStat.SUSPEND}
    pool = pool_of(make_pool, path, hooks, framing=framing, trigger=trigger, workers=2)
    client = make_client(pool, timeout=3)
    for _ in range(3):
        client.sendall(frame(framing, b"x"))
        assert recv_exact(client, 10) == b"sent;asked"
