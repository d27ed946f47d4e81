"""Echo with asyncio streams, as their documentation shows it: read, write, drain."""

import asyncio

from ._loops import run, serve_streams


async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    writer.close()


if __name__ == "__main__":
    run(lambda: serve_streams(client))
