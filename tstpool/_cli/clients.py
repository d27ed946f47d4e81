"""The demo's clients, one process a kind: ``python -m tstpool._cli.clients PLAN`` (see :class:`wire.Plan`).

They are plain blocking sockets on purpose, one thread each: they share nothing with the engine that they check, and
each kind reads as the conversation that it holds. Every wait has an end, so a server that hangs is named, not waited
for. Standard output carries one :class:`wire.Tally` a line, the last one with ``finished`` set.
"""

import os
import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable

from tstpool._cli.wire import GREETING, LENGTH, NEWS, ORDER, PART_SIZE, Kind, Plan, Tally, difference, payload

REPLY_TIMEOUT = 10.0  # seconds; above this an answer counts as lost
REPORT_EVERY = 0.2


class WrongBytes(Exception):
    """The server sent something else than it should have."""


class Report:
    """The tally of this process, kept by all its conversations."""

    def __init__(self, kind: Kind) -> None:
        self.tally = Tally(kind)
        self.round_trips: list[float] = []
        self.lock = threading.Lock()

    def connected(self) -> None:
        with self.lock:
            self.tally.connections += 1

    def received(self, size: int, round_trip: float | None = None) -> None:
        with self.lock:
            self.tally.messages += 1
            self.tally.bytes += size
            if round_trip is not None:
                self.round_trips.append(round_trip)

    def failed(self, connection: int, error: Exception) -> None:
        with self.lock:
            self.tally.failures.append(f"connection {connection}: {error or type(error).__name__}")

    def send(self) -> None:
        with self.lock:
            print(self.tally.to_json(), flush=True)

    def send_last(self) -> None:
        """Report for the last time, with what only the whole can tell."""
        ordered = sorted(self.round_trips)
        if ordered:
            self.tally.median = ordered[len(ordered) // 2]
            self.tally.percentile_99 = ordered[len(ordered) * 99 // 100]
            self.tally.slowest = ordered[-1]
        self.tally.finished = True
        self.send()


class Conversation:
    """One connection: it knows its number and, so, every byte that may come; it measures and counts."""

    def __init__(self, kind: Kind, number: int, sock: socket.socket, report: Report) -> None:
        self.kind = kind
        self.number = number
        self.sock = sock
        self.report = report
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The kernel's own time-out: settimeout() would add a poll() to each call and so to each round trip.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(REPLY_TIMEOUT), 0))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(REPLY_TIMEOUT), 0))
        report.connected()

    def message(self, number: int, size: int) -> bytes:
        return payload(self.kind, self.number, number, size)

    def send(self, data: bytes) -> None:
        try:
            self.sock.sendall(data)
        except BlockingIOError:
            raise TimeoutError(f"the server took nothing for {REPLY_TIMEOUT:.0f} s") from None

    def receive(self, size: int) -> bytes:
        """Return exactly ``size`` bytes."""
        data = bytearray(size)
        have = 0
        while have < size:
            try:
                got = self.sock.recv_into(memoryview(data)[have:])
            except BlockingIOError:
                raise TimeoutError(f"{have} of {size} bytes came, then none for {REPLY_TIMEOUT:.0f} s") from None
            if got == 0:
                raise WrongBytes(f"the server closed after {have} of {size} bytes")
            have += got
        return bytes(data)

    def expect(self, expected: bytes, what: str) -> None:
        wrong = difference(expected, self.receive(len(expected)))
        if wrong:
            raise WrongBytes(f"{what}: {wrong}")

    def expect_end(self) -> None:
        """Say that all has been sent: the server must close, without one byte more."""
        self.sock.shutdown(socket.SHUT_WR)
        try:
            extra = self.sock.recv(1024)
        except BlockingIOError:
            raise TimeoutError(f"the server did not close within {REPLY_TIMEOUT:.0f} s") from None
        if extra:
            raise WrongBytes(f"{len(extra)} bytes too many after the last reply")

    def round_trip(self, number: int, size: int) -> None:
        """Send one message, expect it back, and time that."""
        message = self.message(number, size)
        begin = time.perf_counter()
        self.send(message)
        received = self.receive(size)
        elapsed = time.perf_counter() - begin
        wrong = difference(message, received)
        if wrong:
            raise WrongBytes(f"reply {number}: {wrong}")
        self.report.received(size, elapsed)


def ping_pong(conversation: Conversation, deadline: float) -> None:
    """One message out, the same one back, small and of changing size."""
    chance = random.Random(conversation.number)
    number = 0
    while time.monotonic() < deadline:
        conversation.round_trip(number, chance.randint(1, 1024))
        number += 1
    conversation.expect_end()


def header_body(conversation: Conversation, deadline: float) -> None:
    """Frames of a length and a body, cut into pieces anywhere, sometimes two at once: each comes back whole."""
    chance = random.Random(conversation.number)
    number = 0
    while time.monotonic() < deadline:
        frames = []
        for _ in range(chance.choice((1, 1, 2))):
            body = conversation.message(number, chance.choice((1, 100, 4_000, 40_000)) + chance.randint(0, 99))
            frames.append(LENGTH.pack(len(body)) + body)
            number += 1
        stream = b"".join(frames)
        cuts = sorted(chance.randint(0, len(stream)) for _ in range(2))
        for piece in (stream[: cuts[0]], stream[cuts[0] : cuts[1]], stream[cuts[1] :]):
            conversation.send(piece)
            if chance.random() < 0.2:
                time.sleep(0.001)  # let the server see the piece alone
        for frame in frames:
            conversation.expect(frame, f"frame before {number}")
            conversation.report.received(len(frame))
    conversation.expect_end()


def slow_reader(conversation: Conversation, deadline: float) -> None:
    """Ask for a reply far larger than any buffer and read it slowly; hurry only once time is up."""
    parts = 64
    conversation.send(ORDER.pack(conversation.number, parts))
    pause = (deadline - time.monotonic()) / parts
    for part in range(parts):
        conversation.expect(conversation.message(part, PART_SIZE), f"part {part}")
        conversation.report.received(PART_SIZE)
        if time.monotonic() + pause < deadline:
            time.sleep(pause)
    conversation.expect_end()


def reset(conversation: Conversation, deadline: float) -> None:
    """Read a part of the reply, then drop the connection with a reset while the rest is under way."""
    message = conversation.message(0, 65_536)
    conversation.send(message)
    conversation.expect(message[:1024], "begin of the reply")
    conversation.report.received(1024)
    conversation.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def broadcast(conversation: Conversation, deadline: float) -> None:
    """Say nothing; receive each message of the sending thread from the first that comes to the last, none missing."""
    expected = None
    while True:
        number, size = NEWS.unpack(conversation.receive(NEWS.size))
        if expected is not None and number != expected:
            raise WrongBytes(f"message {number} came where {expected} should have")
        conversation.expect(payload(conversation.kind, 0, number, size), f"message {number}")
        conversation.report.received(NEWS.size + size)
        if size == 0:
            break
        expected = number + 1
    conversation.expect_end()


def blocking(conversation: Conversation, deadline: float) -> None:
    """Ping-pong with a handler that sleeps before it answers."""
    number = 0
    while time.monotonic() < deadline:
        conversation.round_trip(number, 512)
        number += 1
    conversation.expect_end()


def client_mode(conversation: Conversation, deadline: float) -> None:
    """The pool came to us: it greets, and then answers like any server."""
    conversation.expect(GREETING, "greeting")
    conversation.report.received(len(GREETING))
    ping_pong(conversation, deadline)


TALKS: dict[Kind, Callable[[Conversation, float], None]] = {
    Kind.PING_PONG: ping_pong,
    Kind.HEADER_BODY: header_body,
    Kind.SLOW_READER: slow_reader,
    Kind.RESET: reset,
    Kind.BROADCAST: broadcast,
    Kind.BLOCKING: blocking,
    Kind.CLIENT: client_mode,
}


def meet(plan: Plan, listener: socket.socket | None) -> socket.socket:
    """Connect to the server; in client mode, wait for the pool to connect to us."""
    if listener is None:
        return socket.create_connection((plan.host, plan.port), timeout=REPLY_TIMEOUT)
    try:
        return listener.accept()[0]
    except BlockingIOError:
        raise TimeoutError(f"the pool did not connect within {REPLY_TIMEOUT:.0f} s") from None


def hold(plan: Plan, number: int, report: Report, listener: socket.socket | None) -> None:
    """The life of one thread: meet the server and talk; resetting peers come back until time is up."""
    deadline = time.monotonic() + plan.seconds
    try:
        while True:
            with meet(plan, listener) as sock:
                sock.settimeout(None)
                TALKS[plan.kind](Conversation(plan.kind, number, sock, report), deadline)
            if plan.kind is not Kind.RESET or time.monotonic() >= deadline:
                break
            number += plan.connections
            time.sleep(0.005)
    except (OSError, WrongBytes) as error:
        report.failed(number, error)


def run(plan: Plan) -> None:
    """Hold all conversations of one kind, and report while they last."""
    report = Report(plan.kind)
    listener = socket.socket(fileno=plan.listener) if plan.listener >= 0 else None
    if listener is not None:
        listener.setblocking(True)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(REPLY_TIMEOUT), 0))
    threads = [
        threading.Thread(target=hold, args=(plan, number, report, listener)) for number in range(plan.connections)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(REPORT_EVERY)
            report.send()
    report.send_last()


def end_with_the_demo() -> None:
    """Wait for standard input to close, which it does when the demo is gone, and go too."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=end_with_the_demo, daemon=True).start()
    run(Plan.from_json(sys.argv[1]))
