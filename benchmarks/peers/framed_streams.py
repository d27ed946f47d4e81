"""Framed echo with asyncio streams, as their documentation suggests: readexactly, write, drain."""

import asyncio

from ._loops import run, serve_streams


async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            header = await reader.readexactly(4)
            message = await reader.readexactly(int.from_bytes(header, "big"))
            writer.write(header + message)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


if __name__ == "__main__":
    run(lambda: serve_streams(client))
