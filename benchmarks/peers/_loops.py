"""Runs a peer's coroutine on the event loop that its command line names: asyncio, uvloop or aiofastnet.

Each is set up as its documentation says. That aiofastnet is slower than the uvloop below it, and a Protocol on asyncio
slower than a BufferedProtocol, has one reason: both receive into a new bytes object of 256 KiB, and then shrink it to
what came. The C library takes blocks of that size from the kernel, so that a message of 64 bytes costs mmap, mremap,
munmap and page faults: most of its CPU time. strace shows them; they are gone with MALLOC_MMAP_THRESHOLD_ and
MALLOC_TOP_PAD_ at 1 MiB, which their users do not set. Often they are gone, too, once the first clients have left, for
then such a block lies on the heap: in pairs.py, where clients come anew each turn, aiofastnet is as fast as uvloop.
uvloop receives into one buffer that it keeps.
"""

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
    server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def serve_streams(client: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]) -> None:
    server = await asyncio.start_server(client, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
