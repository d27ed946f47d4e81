"""``python -m tstpool echo``: an echo server, and once a second one line on how it fares."""

import argparse
import math
import signal
import sys
import time

from rich.console import Console

from tstpool import PoolStats, TstPool
from tstpool._cli import show
from tstpool._cli.services import Echo

DRAIN = 5.0  # seconds that queued output gets when the server stops
HEADING = (
    f"{'connections':>11} {'messages/s':>10} {'MB/s in':>9} {'MB/s out':>9} {'slowest job':>11}  jobs/s of each worker"
)
HEADING_EVERY = 20  # lines
WORKERS_SHOWN = 8


def status_line(before: PoolStats, now: PoolStats, seconds: float) -> str:
    """One line on what happened between two looks, ``seconds`` apart."""
    jobs = [
        (new.thread_no, new.exec_count - old.exec_count) for old, new in zip(before.workers, now.workers, strict=True)
    ]
    busy = [f"{number}:{show.short(count / seconds)}" for number, count in jobs if count]
    if len(busy) > WORKERS_SHOWN:
        busy[WORKERS_SHOWN:] = [f"and {len(busy) - WORKERS_SHOWN} more"]
    return (
        f"{now.connections:>11,}"
        f" {show.short((now.messages - before.messages) / seconds):>10}"
        f" {(now.bytes_in - before.bytes_in) / seconds / 1e6:>9.2f}"
        f" {(now.bytes_out - before.bytes_out) / seconds / 1e6:>9.2f}"
        f" {show.duration(slowest_job(now)):>11}"
        f"  {' '.join(busy) or '-'}"
    )


def summary(stats: PoolStats) -> str:
    """The last line: what the server did in its whole life."""
    return (
        f"stopped: {stats.accepted:,} connections, {stats.messages:,} messages, {show.size(stats.bytes_in)} in,"
        f" {show.size(stats.bytes_out)} out, slowest job {show.duration(slowest_job(stats))}"
    )


def slowest_job(stats: PoolStats) -> float:
    """Return the time of the slowest job so far, of any worker."""
    return max(worker.most_elapsed for worker in stats.workers)


def watch(pool: TstPool, console: Console, seconds: float | None) -> None:
    """Print a line each second until ``seconds`` have passed; for ever if None."""
    before, looked = pool.stats(), time.monotonic()
    end = math.inf if seconds is None else looked + seconds
    line = 0
    while looked < end:
        time.sleep(min(1.0, end - looked))
        now, stats = time.monotonic(), pool.stats()
        if line % HEADING_EVERY == 0:
            console.print(HEADING, style="bold", soft_wrap=True)
        console.print(status_line(before, stats, now - looked), soft_wrap=True)
        before, looked, line = stats, now, line + 1


def run(options: argparse.Namespace) -> int:
    """Serve until Ctrl-C, SIGTERM or ``--seconds``, and return the exit code."""
    console = show.make_console()
    pool = TstPool(Echo(), workers=options.workers, trigger=options.trigger)
    try:
        host, port = pool.listen(options.host, 0 if options.host.startswith("unix:") else options.port)
    except OSError as error:
        print(f"tstpool: {error}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    pool.start()
    try:
        address = f"{host}:{port}" if port else host
        console.print(show.title(pool, f"echo on {address}"), soft_wrap=True)
        watch(pool, console, options.seconds)
    except KeyboardInterrupt:
        pass
    finally:
        ended = pool.stop(drain=DRAIN)
    console.print(summary(pool.stats()), soft_wrap=True)  # afterwards: what was queued has been sent meanwhile
    return 0 if ended else 1
