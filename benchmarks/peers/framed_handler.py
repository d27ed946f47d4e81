"""The tuned Protocol of framed_tuned.py, with what tstpool does for its handler too: the body is cut out of its frame,
a method is called with it, and what that returns is sent in a frame of its own."""

import asyncio
import struct

from ._loops import run, serve_protocol

MAX_MESSAGE = 1024 * 1024
length_at = struct.Struct(">I").unpack_from
header_of = struct.Struct(">I").pack


class Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        self.chunks: list[bytes] = []  # of a message that is not whole yet
        self.missing = 0  # how many bytes must come before it is worth looking again

    def on_message(self, data: bytes) -> bytes:
        return data

    def data_received(self, data: bytes) -> None:
        if self.chunks:
            self.chunks.append(data)
            self.missing -= len(data)
            if self.missing > 0:
                return
            data = b"".join(self.chunks)
            self.chunks.clear()
        replies = []
        on_message = self.on_message
        start, size = 0, len(data)
        while (end := start + 4) <= size:
            body = end
            end += length_at(data, start)[0]
            if end > size:
                break
            reply = on_message(data[body:end])
            replies.append(header_of(len(reply)))
            replies.append(reply)
            start = end
        if replies:
            self.transport.write(b"".join(replies))
        if start < size:
            if end - start > 4 + MAX_MESSAGE:
                self.transport.abort()
            self.chunks.append(data[start:])
            self.missing = end - size


if __name__ == "__main__":
    run(lambda: serve_protocol(Echo))
