"""A handler sends many small messages in one call: each but the first goes a shorter way, and none goes otherwise."""

import random

import pytest
from contract_helpers import every_trigger, handler
from helpers import recv_exact, scaled, wait_until

from tstpool import Delimited, LengthPrefixed, MessageTooLarge, SendQueueFull

CHUNK = 16384  # bytes of a piece, which is counted until all of it is gone


def prefixed(size, byteorder="big", offset=0, adjust=0):
    """A framing, and what it makes of a body."""
    framing = LengthPrefixed(size, byteorder, offset=offset, adjust=adjust)
    return framing, lambda body: bytes(offset) + (len(body) - adjust).to_bytes(size, byteorder) + body


FRAMINGS = [
    prefixed(4),
    prefixed(1),
    prefixed(2, "little"),
    prefixed(3, adjust=-3),
    prefixed(8, "little", adjust=2),
    prefixed(4, offset=2),
    (Delimited(b"\r\n"), lambda body: body + b"\r\n"),
    (None, lambda body: body),
]


def bodies(seed):
    """Mostly small ones; some are as large as a length field of one byte, some larger than a queue's chunk."""
    chosen = random.Random(seed)
    sizes = [chosen.choice([1, 7, 64, 200]) if chosen.random() < 0.9 else chosen.randrange(1, 20000) for _ in range(60)]
    return [bytes([chosen.randrange(65, 91)]) * size for size in sizes]


@pytest.mark.parametrize(("framing", "framed"), FRAMINGS, ids=lambda value: "" if callable(value) else repr(value))
@every_trigger
def test_of_any_framing(make_pool, make_client, framing, framed, trigger):
    """Among them: some that are too large for the framing, and bytes without any frame."""
    expected = {}

    def on_message(sock, data):
        wire = []
        for i, body in enumerate(bodies(data[-1])):
            if i % 7 == 3:
                sock.send(body)
                wire.append(body)
                continue
            try:
                sock.send_message(body)
            except MessageTooLarge:
                continue
            wire.append(framed(body))
        expected[data[-1]] = b"".join(wire)

    client = make_client(make_pool(handler(on_message=on_message), framing=framing, trigger=trigger))
    for key in range(65, 65 + scaled(40, minimum=8)):
        client.sendall(framed(bytes([0, key])))
        wire = wait_until(lambda key=key: expected.get(key))
        assert recv_exact(client, len(wire)) == wire


@pytest.mark.parametrize("size", [1, 100, 900])
def test_up_to_the_limit_and_no_further(make_pool, make_client, size):
    """A message that would be one too many is refused, as it would be if it came alone; all others arrive."""
    taken = []

    def on_message(sock, data):
        with pytest.raises(SendQueueFull):
            while True:
                sock.send_message(b"x" * size)
                taken.append(None)
        taken.append(pool.stats().bytes_queued)

    # One worker: of a handler that is held up another would send what waits.
    sizes = {"low_water": 2000, "high_water": 5000, "max_queued": 20000}
    pool = make_pool(handler(on_message=on_message), framing=LengthPrefixed(4), workers=1, **sizes)
    client = make_client(pool)
    client.sendall(b"\0\0\0\1x")
    wait_until(lambda: taken and taken[-1] is not None, 30)
    assert 20000 <= taken.pop() < 20000 + size + 4 + CHUNK
    frame = size.to_bytes(4, "big") + b"x" * size
    assert recv_exact(client, len(taken) * len(frame)) == frame * len(taken)
