"""``python -m tstkv``: serves until Ctrl-C or SIGTERM. Nothing is written to disk: the keys go with the process."""

from __future__ import annotations

import argparse
import contextlib
import signal

import tstpool
from tstkv import KeyValueHandler, __version__

MAX_TOTAL_QUEUED = 1 << 30  # bytes of replies that wait for all clients; who asks for more is closed
UNITS = {"": 1, "kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30}


def size(text: str) -> int:
    """Bytes, as Redis's configuration has them: 1000, 64kb, 256mb, 2gb."""
    number = text.lower().rstrip("kmgb")
    unit = text.lower()[len(number) :]
    if not number.isascii() or not number.isdigit() or unit not in UNITS:
        raise argparse.ArgumentTypeError(f"not a size such as 1000, 64kb, 256mb or 2gb: {text!r}")
    return int(number) * UNITS[unit]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tstkv", description=__doc__.partition("\n")[0])
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on, or unix:/path (%(default)s)")
    parser.add_argument("--port", type=int, default=6379, help="0: any free one (%(default)s)")
    parser.add_argument("--shards", type=int, default=1, help="threads that serve connections (%(default)s)")
    parser.add_argument(
        "--busy-poll", type=int, default=50, help="microseconds to poll before sleeping, while busy (%(default)s)"
    )
    parser.add_argument("--maxmemory", type=size, default="256mb", help="for keys and values (%(default)s)")
    parser.add_argument("--maxclients", type=int, default=10000, help="connections at a time (%(default)s)")
    parser.add_argument("--version", action="version", version=f"tstkv {__version__}, tstpool {tstpool.__version__}")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_arguments()
    handler = KeyValueHandler(maxmemory=options.maxmemory, maxclients=options.maxclients)
    # As many workers as shards: no command blocks, so that nobody need stand by. The handler has limits of its own, and
    # a client of Redis may be silent for as long as it likes.
    pool = tstpool.TstPool(
        handler,
        workers=options.shards,
        shards=options.shards,
        busy_poll=options.busy_poll * 1e-6,
        name="tstkv",
        first_byte_timeout=None,
        idle_timeout=None,
        max_queued=None,
        auto_pause=False,
        max_total_queued=MAX_TOTAL_QUEUED,
    )
    address = pool.listen(options.host, options.port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"tstkv {__version__} listens on {address[0]} port {address[1]}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # that is how a server is ended; the pool has stopped then
        pool.serve_forever()


if __name__ == "__main__":
    main()
