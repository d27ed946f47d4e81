"""Echo with trio: a task for each connection, as its tutorial shows it."""

import trio


async def echo(stream: trio.SocketStream) -> None:
    try:
        async for data in stream:
            await stream.send_all(data)
    except trio.BrokenResourceError:
        pass  # the client has gone


async def main() -> None:
    async with trio.open_nursery() as nursery:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=4096)
        print(listener.socket.getsockname()[1], flush=True)
        nursery.start_soon(trio.serve_listeners, echo, [listener])


if __name__ == "__main__":
    trio.run(main)
