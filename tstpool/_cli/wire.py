"""What the demo's server and its clients agree on: kinds of traffic, every byte of it, and how clients report.

Both sides compute each message from its name (kind, connection, number), so that neither has to remember or to trust
what the other sent: a byte that is lost, doubled, late or of another connection can not be right by accident.
"""

import hashlib
import json
import struct
from dataclasses import asdict, dataclass, field
from enum import Enum

LENGTH = struct.Struct("!I")  # header, then body: how long the body is
ORDER = struct.Struct("!II")  # slow reader asks: my connection number, how many parts
NEWS = struct.Struct("!II")  # broadcast begins: message number, size; size 0 says that it was the last
PART_SIZE = 256 * 1024  # one part of a large reply
BLOCKING_SECONDS = 0.5  # how long the blocking handler sleeps


class Kind(str, Enum):
    """The kinds of traffic. Each has a listener of its own, so the port says what a connection is."""

    __str__ = str.__str__  # enum.StrEnum does it, from Python 3.11 on

    PING_PONG = "ping-pong"
    HEADER_BODY = "header, then body"
    SLOW_READER = "slow reader"
    RESET = "peer that resets"
    BROADCAST = "broadcast"
    BLOCKING = "blocking handler"
    CLIENT = "client mode"


def payload(kind: Kind, connection: int, number: int, size: int) -> bytes:
    """Return the bytes of one message: pseudo-random, the same in every process, unlike those of any other message."""
    return hashlib.shake_128(f"{kind}/{connection}/{number}".encode()).digest(size)


def difference(expected: bytes, received: bytes) -> str | None:
    """Say where two messages of one size first differ; None when they are equal."""
    if expected == received:
        return None
    place = next(i for i, (want, got) in enumerate(zip(expected, received, strict=True)) if want != got)
    return f"byte {place} of {len(expected)} is {received[place]:#04x} and should be {expected[place]:#04x}"


GREETING = payload(Kind.CLIENT, -1, 0, 256)  # client mode: what the pool says first


@dataclass
class Plan:
    """What one client process is told to do."""

    kind: Kind
    host: str
    port: int
    connections: int
    seconds: float
    listener: int = -1  # client mode only: descriptor of a listening socket, inherited, on which to meet the pool

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        values = json.loads(text)
        return cls(**{**values, "kind": Kind(values["kind"])})


@dataclass
class Tally:
    """What one client process has done so far. Bytes are those that came from the server and were compared."""

    kind: Kind
    connections: int = 0
    messages: int = 0
    bytes: int = 0
    failures: list[str] = field(default_factory=list)
    median: float | None = None  # seconds of a round trip; only in the last report, and only where trips are timed
    percentile_99: float | None = None
    slowest: float | None = None
    finished: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Tally":
        values = json.loads(text)
        return cls(**{**values, "kind": Kind(values["kind"])})
