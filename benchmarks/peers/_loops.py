"""Runs a peer's coroutine on the event loop that its command line names: asyncio, uvloop or aiofastnet."""

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any


def _new_loop(name: str) -> asyncio.AbstractEventLoop:
    if name == "asyncio":
        return asyncio.new_event_loop()
    import uvloop

    if name == "uvloop":
        return uvloop.new_event_loop()
    import aiofastnet

    return aiofastnet.patch_loop(uvloop.new_event_loop())  # its transports on uvloop's loop


def run(serve: Callable[[], Coroutine[Any, Any, None]]) -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in ("asyncio", "uvloop", "aiofastnet"):
        sys.exit("usage: python -m benchmarks.peers.NAME asyncio|uvloop|aiofastnet")
    _new_loop(sys.argv[1]).run_until_complete(serve())


async def serve_protocol(protocol: Callable[[], asyncio.BaseProtocol]) -> None:
    """What all peers made of protocols do: listen, print the port, serve."""
    server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def serve_streams(client: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]) -> None:
    server = await asyncio.start_server(client, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
