"""``python -m tstkv``: serves until Ctrl-C or SIGTERM. Nothing is written to disk: the keys go with the process."""

from __future__ import annotations

import argparse
import contextlib
import resource
import signal
import sys

import tstpool
from tstkv import KeyValueHandler, __version__

MAX_TOTAL_QUEUED = 1 << 30  # bytes of replies that the pool holds for all clients; more of them wait in the handler
WRITE_TIMEOUT = 60  # seconds in which a client takes nothing of what the pool holds for it
CLIENTS_MOST = 1_000_000
REFUSED_MOST = 32  # connections that are open beside the clients, only to be told that there are too many
OTHER_DESCRIPTORS = 32  # that the process has open beside its connections, more or less
UNITS = {"": 1, "kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30}


def size(text: str) -> int:
    """Bytes, as Redis's configuration has them: 1000, 64kb, 256mb, 2gb."""
    number = text.lower().rstrip("kmgb")
    unit = text.lower()[len(number) :]
    if not number.isascii() or not number.isdigit() or unit not in UNITS:
        raise argparse.ArgumentTypeError(f"not a size such as 1000, 64kb, 256mb or 2gb: {text!r}")
    return int(number) * UNITS[unit]


def clients(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= CLIENTS_MOST:
        raise argparse.ArgumentTypeError(f"not a number from 1 to {CLIENTS_MOST}: {text!r}")
    return int(text)


def possible_clients(wanted: int) -> int:
    """As many of them as there can be descriptors for. The process's limit is raised if need be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + REFUSED_MOST + OTHER_DESCRIPTORS
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return wanted
    if hard != resource.RLIM_INFINITY:
        needed = min(needed, hard)
    with contextlib.suppress(ValueError, OSError):  # the system may have a limit of its own
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        soft = needed
    possible = min(wanted, max(1, soft - OTHER_DESCRIPTORS))
    if possible < wanted:
        print(f"tstkv: {soft} descriptors are enough for {possible} clients, not for {wanted}", file=sys.stderr)
    return possible


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tstkv", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on, or unix:/path (%(default)s)")
    parser.add_argument("--port", type=int, default=6379, help="0: any free one (%(default)s)")
    parser.add_argument("--shards", type=int, default=1, help="threads that serve connections (%(default)s)")
    parser.add_argument(
        "--busy-poll", type=int, default=50, help="microseconds to poll before sleeping, while busy (%(default)s)"
    )
    parser.add_argument("--maxmemory", type=size, default="256mb", help="for keys and values; 0: all (%(default)s)")
    parser.add_argument("--maxclients", type=clients, default=10000, help="connections at a time (%(default)s)")
    parser.add_argument("--version", action="version", version=f"tstkv {__version__}, tstpool {tstpool.__version__}")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_arguments()
    maxclients = possible_clients(options.maxclients)
    try:
        handler = KeyValueHandler(maxmemory=options.maxmemory, maxclients=maxclients)
    except ValueError as error:
        sys.exit(f"tstkv: {error}")
    # As many workers as shards: no command blocks, so that nobody need stand by. The handler has limits of its own, and
    # a client of Redis may be silent for as long as it likes; but not ask on and leave the replies unread for as long.
    pool = tstpool.TstPool(
        handler,
        workers=options.shards,
        shards=options.shards,
        busy_poll=options.busy_poll * 1e-6,
        name="tstkv",
        max_connections=maxclients + REFUSED_MOST,
        first_byte_timeout=None,
        idle_timeout=None,
        write_timeout=WRITE_TIMEOUT,
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
