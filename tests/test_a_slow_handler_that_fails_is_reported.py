"""S24, S36: on_slow hears of a slow handler, however it ends and whatever was timed with it; and of nothing else."""

import time

import pytest
from contract_helpers import handler, round_trip
from helpers import PATIENCE, patient, wait_until

from tstpool import LengthPrefixed, TstStat

LIMIT = patient(0.1 if PATIENCE == 1 else 0.4)  # on a busy machine a quick handler is not to take so long


def raises(sock):
    raise ValueError


def returns_something_wrong(sock):
    return "text"


def returns_a_reply_that_is_too_long(sock):
    return bytes(256)


def warmed_up(client):
    """Calls for it have been quick for so long that they are timed together."""
    for _ in range(40):
        assert round_trip(client, b"\x05quick") == b"\x05quick"
    return client


@pytest.mark.parametrize("end", [raises, returns_something_wrong, returns_a_reply_that_is_too_long])
def test_after_quick_ones(make_pool, make_client, end):
    """They are timed together, and this one among them."""
    slow = []

    def on_message(sock, data):
        if data == b"slow":
            time.sleep(1.5 * LIMIT)
            return end(sock)
        return data

    pool = make_pool(
        handler(
            on_message=on_message,
            on_slow=lambda sock, seconds: slow.append(seconds),
            on_error=lambda sock, error: TstStat.SUSPEND,
        ),
        workers=1,
        slow_handler=LIMIT,
        framing=LengthPrefixed(1),
    )
    client = warmed_up(make_client(pool))
    before = len(slow)  # a busy machine may have made a quick one slow
    client.sendall(b"\x04slow")
    assert round_trip(client, b"\x05quick") == b"\x05quick"
    wait_until(lambda: len(slow) > before)
    assert max(slow[before:]) >= 1.5 * LIMIT
    assert pool.stats().slow_calls == len(slow)


def test_the_next_message_does_not_answer_for_on_error(make_pool, make_client):
    """Both have come together, and on_error takes longer than a handler may."""
    slow = []

    def on_error(sock, error):
        time.sleep(1.5 * LIMIT)
        return TstStat.SUSPEND

    pool = make_pool(
        handler(
            on_message=lambda sock, data: "text" if data == b"wrong" else data,
            on_slow=lambda sock, seconds: slow.append(seconds),
            on_error=on_error,
        ),
        workers=1,
        slow_handler=LIMIT,
        framing=LengthPrefixed(1),
    )
    client = warmed_up(make_client(pool))
    before = len(slow)
    client.sendall(b"\x05wrong")
    assert round_trip(client, b"\x05quick") == b"\x05quick"
    assert round_trip(client, b"\x05quick") == b"\x05quick"
    assert slow[before:] == []
