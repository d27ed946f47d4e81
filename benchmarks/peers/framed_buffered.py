"""Framed echo with an asyncio BufferedProtocol, as an expert writes it for large messages.

As framed_tuned.py while messages are small, except that the loop receives into a buffer that all connections share,
because nothing stays in it. The rest of a large message is received straight to its place: its bytes are copied once,
by the kernel. Small messages pay for that with one more call for each chunk.
"""

import asyncio
import struct

from ._loops import run, serve_protocol

MAX_MESSAGE = 1024 * 1024
LARGE = 32 * 1024  # smaller ones are put together by copying
shared = bytearray(256 * 1024)
shared_view = memoryview(shared)
length_at = struct.Struct(">I").unpack_from


class Echo(asyncio.BufferedProtocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        self.tail = b""  # the beginning of a small message
        self.place: memoryview | None = None  # where the rest of a large one goes
        self.large = bytearray()  # the whole of it

    def get_buffer(self, sizehint: int) -> bytearray | memoryview:
        return self.place or shared

    def buffer_updated(self, nbytes: int) -> None:
        if self.place:
            self.place = self.place[nbytes:]
            if not self.place:
                self.transport.write(self.large)
                self.place = None
            return
        data = self.tail + bytes(shared_view[:nbytes])
        replies = []
        start, size = 0, len(data)
        while (end := start + 4) <= size:
            end += length_at(data, start)[0]
            if end > size:
                break
            replies.append(data[start:end])
            start = end
        if replies:
            self.transport.write(b"".join(replies))
        self.tail = data[start:]
        if end - start > LARGE:
            self.begin_large(end - start)

    def begin_large(self, size: int) -> None:
        if size > 4 + MAX_MESSAGE:
            self.transport.abort()
            return
        self.large = bytearray(size)
        self.large[: len(self.tail)] = self.tail
        self.place = memoryview(self.large)[len(self.tail) :]
        self.tail = b""


if __name__ == "__main__":
    run(lambda: serve_protocol(Echo))
