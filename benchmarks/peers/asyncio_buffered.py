"""Echo with an asyncio BufferedProtocol: the loop receives into a buffer of ours, one for each connection."""

import asyncio

from ._loops import run, serve_protocol


class Echo(asyncio.BufferedProtocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        self.buffer = bytearray(65536)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.transport.write(self.buffer[:nbytes])


if __name__ == "__main__":
    run(lambda: serve_protocol(Echo))
