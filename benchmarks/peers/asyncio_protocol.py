"""Echo with asyncio, the way its documentation shows it: a Protocol. On uvloop it is the fastest interface without
tuning."""

import asyncio

from ._loops import run, serve_protocol


class Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


if __name__ == "__main__":
    run(lambda: serve_protocol(Echo))
