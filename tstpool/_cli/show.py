"""How the commands look: numbers a person can read, tables, and the one place that knows about terminals."""

import os
import platform
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

import tstpool
from tstpool import PoolStats, TstPool
from tstpool._cli.services import Books
from tstpool._cli.wire import Tally

PIPE_WIDTH = 120  # columns where there is no terminal to ask


def make_console() -> Console:
    """Return the console for standard output; what is piped is neither coloured nor folded."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PIPE_WIDTH)


def duration(seconds: float | None) -> str:
    """Three digits and a unit: ``0.31 ms``, ``12.4 ms``, ``1.20 s``."""
    if seconds is None:
        return ""
    value, unit = (seconds, "s") if seconds >= 1 else (seconds * 1000, "ms")
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def size(count: float) -> str:
    """Bytes in the unit that suits: ``640 B``, ``12.3 kB``, ``1.20 GB``."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.{1 if count < 100 else 0}f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def short(count: float) -> str:
    """A count in at most five characters: ``999``, ``12.3k``, ``1.2M``."""
    if count < 1000:
        return f"{count:.0f}"
    return f"{count / 1000:.1f}k" if count < 999_950 else f"{count / 1e6:.1f}M"


def title(pool: TstPool, what: str) -> Text:
    """The first line of a command: what runs, and on what."""
    python = f"Python {platform.python_version()}{sys.abiflags}"
    setting = f", {python}, {pool.workers} workers, trigger {pool.trigger}: "
    return Text.assemble((f"tstpool {tstpool.__version__}", "bold"), setting, what)


def make_table() -> Table:
    """Return an empty table as slim as ours have to be: eight columns in 80 characters."""
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)


def clients_table(tallies: Sequence[Tally]) -> Table:
    """One row a kind of client: what it has done, and whether it was right."""
    table = make_table()
    table.add_column("Kind of client")
    for heading in ("Sockets", "Messages", "Bytes", "p50", "p99", "Slowest"):
        table.add_column(heading, justify="right")
    table.add_column("Checked")
    for tally in tallies:
        table.add_row(
            tally.kind,
            f"{tally.connections:,}",
            f"{tally.messages:,}",
            size(tally.bytes),
            duration(tally.median),
            duration(tally.percentile_99),
            duration(tally.slowest),
            verdict(tally),
        )
    return table


def verdict(tally: Tally) -> Text:
    if tally.failures:
        return Text("wrong", "bold red")
    return Text("OK", "green") if tally.finished else Text("so far", "dim")


def progress(tallies: Sequence[Tally], elapsed: float, seconds: float) -> RenderableType:
    """What is seen while clients talk."""
    bar = ProgressBar(total=seconds, completed=min(elapsed, seconds), width=60)
    state = f"{elapsed:.0f} of {seconds:g} s" if elapsed < seconds else "the last ones say goodbye"
    line = Table.grid(padding=(0, 1))
    line.add_row(bar, state)
    return Group(line, "", clients_table(tallies))


def workers_table(stats: PoolStats) -> Table:
    """One row a worker: how the jobs were spread."""
    table = make_table()
    table.add_column("Worker")
    for heading in ("Jobs", "Mean job", "Slowest job", "In handlers"):
        table.add_column(heading, justify="right")
    needed = [worker for worker in stats.workers if worker.exec_count]
    for worker in needed:
        table.add_row(
            f"tstpool-{worker.thread_no}",
            f"{worker.exec_count:,}",
            duration(worker.average),
            duration(worker.most_elapsed),
            duration(worker.sum_time),
        )
    if len(needed) < len(stats.workers):
        table.add_row(f"{len(stats.workers) - len(needed)} more", "0")
    return table


def balance(stats: PoolStats, books: Books) -> str:
    """Say in one line how many connections began and how many ended."""
    return (
        f"accepted {stats.accepted} + added {stats.added} = closed {stats.closed} + open {stats.connections};"
        f" on_connect {books.arrived.total()} = on_disconnect {books.left}, {books.reset} of them resets"
    )


def report(console: Console, tallies: Sequence[Tally], stats: PoolStats, books: Books, failures: Sequence[str]) -> None:
    """Print what was served, and the verdict."""
    console.print()
    console.print(clients_table(tallies))
    cores = len(os.sched_getaffinity(0))
    console.print(
        f"p50, p99, slowest: round trips, as clients saw them; {len(tallies) + 1} processes shared {cores} cores"
    )
    console.print()
    console.print(workers_table(stats))
    console.print()
    console.print(balance(stats, books), soft_wrap=True)
    console.print()
    if failures:
        console.print("WRONG:", style="bold red")
        for failure in failures:
            console.print(f"  {failure}", markup=False, soft_wrap=True)
        return
    messages, received = sum(tally.messages for tally in tallies), sum(tally.bytes for tally in tallies)
    console.print(f"OK: {messages:,} messages, {size(received)}, every byte as it should be.", style="bold green")
