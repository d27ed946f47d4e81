"""Framed echo with an asyncio Protocol, as most people write one: collect, cut, answer each message by itself."""

import asyncio

from ._loops import run, serve_protocol


class Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        self.buffer = bytearray()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while len(self.buffer) >= 4:
            end = 4 + int.from_bytes(self.buffer[:4], "big")
            if len(self.buffer) < end:
                break
            message = bytes(self.buffer[4:end])
            del self.buffer[:end]
            self.message_received(message)

    def message_received(self, message: bytes) -> None:
        self.transport.write(len(message).to_bytes(4, "big") + message)


if __name__ == "__main__":
    run(lambda: serve_protocol(Echo))
