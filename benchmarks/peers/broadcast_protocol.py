"""What comes on standard input goes to all connections: an event loop, which a thread beside it must ask for that."""

import asyncio
import os
import threading

from ._loops import run, serve_protocol
from .asyncio_protocol import Echo

transports: set[asyncio.Transport] = set()


class Member(Echo):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transports.add(transport)

    def connection_lost(self, reason: Exception | None) -> None:
        transports.discard(self.transport)


def send_to_all(data: bytes) -> None:
    for transport in transports:
        transport.write(data)


def read_orders(loop: asyncio.AbstractEventLoop) -> None:
    while data := os.read(0, 65536):
        loop.call_soon_threadsafe(send_to_all, data)


async def serve() -> None:
    threading.Thread(target=read_orders, args=(asyncio.get_running_loop(),), daemon=True).start()
    await serve_protocol(Member)


if __name__ == "__main__":
    run(serve)
