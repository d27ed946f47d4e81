"""The demo's server side: one pool, one listener a kind of traffic, and books on every connection.

Each service is an ordinary handler, written the way a user would, so this is also the place to see how each kind is
served. What the demo needs beside that, who came and who left, is kept by :class:`Books` from the pool-wide events.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from tstpool import EPOLLOUT, TstHandler, TstPool, TstSocket, TstSockType, TstStat
from tstpool._cli.wire import BLOCKING_SECONDS, LENGTH, NEWS, ORDER, PART_SIZE, Kind, payload

LARGEST_BODY = 1 << 20  # bytes that header_then_body accepts


class Echo(TstHandler):
    """Send back what has come, as it comes."""

    def on_message(self, sock: TstSocket, data: bytes) -> None:
        sock.send(data)


class BlockingEcho(TstHandler):
    """An echo that takes its time, as a handler may that asks a database. Others must not notice."""

    def on_message(self, sock: TstSocket, data: bytes) -> None:
        time.sleep(BLOCKING_SECONDS)
        sock.send(data)

    def on_slow(self, sock: TstSocket, seconds: float) -> None:
        pass  # it is slow on purpose: no warning


class LargeReply(TstHandler):
    """Stream a reply far larger than any buffer: a part is made only when the one before it has been taken."""

    def on_message(self, sock: TstSocket, data: bytes) -> TstStat:
        connection, parts = ORDER.unpack(data)
        sock.user_data = (payload(Kind.SLOW_READER, connection, part, PART_SIZE) for part in range(parts))
        sock.send_data.resize(PART_SIZE)
        return self.on_writable(sock)

    def on_writable(self, sock: TstSocket) -> TstStat:
        parts: Iterator[bytes] = sock.user_data
        part = next(parts, None)
        if part is None:
            return TstStat.SUSPEND
        sock.send_data.s[:] = part
        sock.send_data.req_len = len(part)
        return TstStat.SEND


def header_then_body(sock: TstSocket) -> TstStat:
    """Answer a frame with itself, in the original's style: a function that says what it wants next.

    The header is received at position 0 and the body behind it, so the frame lies in one piece in the buffer, and
    ``req_pos`` tells which of the two has come.
    """
    recv, send = sock.recv_data, sock.send_data
    if sock.events & EPOLLOUT:  # the reply is out: ask for the next header
        recv.req_pos, recv.req_len = 0, LENGTH.size
        return TstStat.SUSPEND
    if recv.req_pos == 0:  # a header: ask for its body
        (size,) = LENGTH.unpack(recv.s[: LENGTH.size])
        if not 0 < size <= LARGEST_BODY:  # what a peer claims is not yet a reason to allocate it
            return TstStat.DISCONNECT
        recv.resize(max(recv.s_len, LENGTH.size + size))
        recv.req_pos, recv.req_len = LENGTH.size, size
        return TstStat.SUSPEND
    frame_size = LENGTH.size + recv.com_len
    send.resize(max(send.s_len, frame_size))
    send.s[:frame_size] = recv.s[:frame_size]
    send.req_len = frame_size
    return TstStat.SEND


class Silent(TstHandler):
    """A subscriber's handler: it is only ever sent to, by another thread."""


@dataclass(frozen=True)
class Service:
    """How connections of one kind are served, and how many bytes to wait for first (0: whatever comes)."""

    handler: TstHandler | Callable[[TstSocket], TstStat | None]
    first_request: int = 0


SERVICES = {
    Kind.PING_PONG: Service(Echo()),
    Kind.HEADER_BODY: Service(header_then_body, first_request=LENGTH.size),
    Kind.SLOW_READER: Service(LargeReply(), first_request=ORDER.size),
    Kind.RESET: Service(Echo()),
    Kind.BROADCAST: Service(Silent()),
    Kind.BLOCKING: Service(BlockingEcho()),
    Kind.CLIENT: Service(Echo()),
}


class Books:
    """Who came and who left: the demo's own count, to hold against the pool's and the clients'."""

    def __init__(self, kinds: Mapping[object, Kind]) -> None:
        self.kinds = kinds  # address of the listener -> kind
        self.lock = threading.Lock()
        self.present: dict[int, Kind] = {}  # id of the connection -> kind
        self.arrived: Counter[Kind] = Counter()
        self.left = 0
        self.reset = 0
        self.failures: list[str] = []

    def connected(self, sock: TstSocket) -> None:
        """Note a new connection and hand it to its service."""
        kind = Kind.CLIENT if sock.type == TstSockType.CLIENT else self.kinds[sock.local]
        with self.lock:
            if sock.id in self.present:
                self.failures.append(f"{kind}: on_connect came twice for connection {sock.id:#x}")
            self.present[sock.id] = kind
            self.arrived[kind] += 1
        service = SERVICES[kind]
        sock.handler = service.handler
        if service.first_request:
            sock.recv_data.req_len = service.first_request

    def disconnected(self, sock: TstSocket, reason: BaseException | None) -> None:
        with self.lock:
            kind = self.present.pop(sock.id, None)
            self.left += 1
            if kind is None:
                self.failures.append(f"on_disconnect came for connection {sock.id:#x}, which was not here")
            elif reason is not None and kind is not Kind.RESET:
                self.failures.append(f"{kind}: a connection ended with {reason!r}")
            elif reason is not None:
                self.reset += 1

    @property
    def balanced(self) -> bool:
        """Whether on_disconnect has come for every on_connect."""
        with self.lock:
            return not self.present and self.left == self.arrived.total()

    def is_subscriber(self, sock: TstSocket) -> bool:
        return self.present.get(sock.id) is Kind.BROADCAST

    def subscribers(self) -> int:
        with self.lock:
            return sum(kind is Kind.BROADCAST for kind in self.present.values())


class Broadcaster(threading.Thread):
    """The thread from outside the pool that sends to all subscribers, with no lock of its own."""

    def __init__(self, pool: TstPool, books: Books, subscribers: int, seconds: float) -> None:
        super().__init__(name="demo-broadcaster", daemon=True)
        self.pool = pool
        self.books = books
        self.subscribers = subscribers
        self.seconds = seconds
        self.sent = 0  # copies, one a subscriber
        self.failure: str | None = None
        self.stop = threading.Event()

    def run(self) -> None:
        try:
            self._wait_for_subscribers()
            self._send_news()
        except Exception as error:
            self.failure = f"broadcast: the sending thread ended with {error!r}"

    def _wait_for_subscribers(self) -> None:
        deadline = time.monotonic() + 10.0
        while self.books.subscribers() < self.subscribers and time.monotonic() < deadline:
            if self.stop.wait(0.02):
                break

    def _send_news(self) -> None:
        deadline = time.monotonic() + self.seconds
        number = 0
        while time.monotonic() < deadline and not self.stop.wait(0.01):
            self._send(number, size=16 + number * 37 % 4000)
            number += 1
        self._send(number, size=0)

    def _send(self, number: int, size: int) -> None:
        message = NEWS.pack(number, size) + payload(Kind.BROADCAST, 0, number, size)
        self.sent += self.pool.broadcast(message, where=self.books.is_subscriber)
