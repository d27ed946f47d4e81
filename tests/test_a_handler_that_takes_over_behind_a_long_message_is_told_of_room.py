"""sock.handler = new while a long message is under way: the old one still gets that, and the new one hears of room."""

import pytest
from compiled_helpers import socket_of
from contract_helpers import every_trigger, handler
from helpers import connect, recv_exact, wait_until

from tstpool import LengthPrefixed

FRAMING = LengthPrefixed(4, max_message=1 << 24)
LONG = b"m" * (1 << 20)
BEGUN = 300_000
MUCH = bytes(16 << 20)


def frame(data):
    return len(data).to_bytes(4, "big") + data


def old_handler(kind, log):
    """It echoes what is short, which is how a test sees that the worker has been everywhere."""

    def on_message(sock, data):
        if len(data) > 4:
            log.append(("old", len(data)))
        else:
            sock.send_message(data)

    return handler(on_message=on_message) if kind == "object" else lambda sock: on_message(sock, sock.read())


def round_trips(client):
    """Of another connection, by the pool's only worker: it has then seen to all that there was to do."""
    for _ in range(3):
        client.sendall(frame(b"x"))
        assert recv_exact(client, 5) == frame(b"x")


def new_handler(log):
    return handler(
        on_message=lambda sock, data: log.append(("new", len(data))), on_writable=lambda sock: log.append("room")
    )


def part_of_a_message(pool, client):
    """The pool's socket for the client, which has sent that."""
    sock = socket_of(pool, client)
    client.sendall(frame(LONG)[:BEGUN])
    wait_until(lambda: pool.stats().bytes_in == BEGUN)
    return sock


def taken_over_and_drained(pool, client, other, log):
    """The message has begun, `new` was assigned and much was sent, of which nothing waits any more."""
    sock = part_of_a_message(pool, client)
    round_trips(other)
    sock.handler = new_handler(log)
    sock.send(MUCH)
    assert recv_exact(client, len(MUCH)) == MUCH
    wait_until(lambda: pool.stats().bytes_queued == 0)
    round_trips(other)
    assert log == []


@pytest.mark.parametrize("kind", ["object", "function"])
@every_trigger
def test_when_the_message_is_whole(make_pool, make_client, trigger, kind):
    """No other message follows: the old handler gets that one, and what is to be told brings the change about."""
    log = []
    pool = make_pool(old_handler(kind, log), framing=FRAMING, trigger=trigger, workers=1, max_queued=None)
    client = make_client(pool, timeout=3)
    with connect(pool) as other:
        taken_over_and_drained(pool, client, other, log)
    client.sendall(frame(LONG)[BEGUN:])
    wait_until(lambda: len(log) >= 2, 0.7, lambda: f"not told of room: {log}")
    assert log == [("old", len(LONG)), "room"]
    client.sendall(frame(b"next one"))
    wait_until(lambda: len(log) >= 3)
    assert log[2:] == [("new", 8)]


@pytest.mark.parametrize("kind", ["object", "function"])
@every_trigger
def test_when_another_message_follows(make_pool, make_client, trigger, kind):
    """That is the new one's, and it is told of room once, before or after it."""
    log = []
    pool = make_pool(old_handler(kind, log), framing=FRAMING, trigger=trigger, workers=1, max_queued=None)
    client = make_client(pool, timeout=3)
    with connect(pool) as other:
        taken_over_and_drained(pool, client, other, log)
        client.sendall(frame(LONG)[BEGUN:] + frame(b"next one"))
        wait_until(lambda: len(log) >= 3, 0.7, lambda: f"not told of room: {log}")
        round_trips(other)
    assert log[0] == ("old", len(LONG))
    assert sorted(map(str, log[1:])) == ["('new', 8)", "room"]


@every_trigger
def test_when_nothing_was_sent_it_is_not_told(make_pool, make_client, trigger):
    """A control: nobody asked for room, so there is nothing to be told; this was so before, too."""
    log = []
    pool = make_pool(old_handler("object", log), framing=FRAMING, trigger=trigger, workers=1)
    client = make_client(pool, timeout=3)
    part_of_a_message(pool, client).handler = new_handler(log)
    client.sendall(frame(LONG)[BEGUN:] + frame(b"next one"))
    wait_until(lambda: len(log) >= 2)
    round_trips(make_client(pool, timeout=3))
    assert log == [("old", len(LONG)), ("new", 8)]
