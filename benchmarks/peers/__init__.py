"""The servers that are compared. A new one is a module here (or C source in ../c) and a line in PEERS.

Each is a small program, written as its own users would write it, that listens on 127.0.0.1, prints its port as the
first line, and serves until it is killed. ``python -m benchmarks.peers.asyncio_protocol uvloop`` starts one by hand.

All set TCP_NODELAY, themselves or by default, and have a backlog of 4096. How much they receive at once is what their
library, or its users, take: 256 KiB, as the C loop has, is not faster for all. See _loops.py for what it does to some.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..build import program

REPOSITORY = Path(__file__).resolve().parents[2]
EVERYWHERE = ("quick", "default", "floors", "full")
# The interpreter of servers that are there to show what no GIL is worth, with a tstpool of its own. See --help.
FREE_THREADED_VARIABLE = "TSTPOOL_BENCH_FREE_THREADED"
FREE_THREADED_PYTHON = os.path.abspath(os.environ.get(FREE_THREADED_VARIABLE) or sys.executable)


def _c(name: str, *arguments: str) -> Callable[[], list[str]]:
    return lambda: [str(program(name)), *arguments]


def _python(module: str, *arguments: str, interpreter: str = sys.executable) -> Callable[[], list[str]]:
    return lambda: [interpreter, "-m", f"benchmarks.peers.{module}", *arguments]


@dataclass(frozen=True)
class Peer:
    name: str  # stands in results.json and is what --only selects
    title: str
    command: Callable[[], list[str]]  # builds it if need be
    needs: str = ""  # the import without which it cannot run ...
    interpreter: str = sys.executable  # ... in this Python
    framings: tuple[str, ...] = ("none",)  # the workloads it serves honestly; (): only those that name it
    sets: tuple[str, ...] = EVERYWHERE  # in which selections it is measured by a workload that names nobody
    sleepers: int = 0  # connections beside those measured: their handlers sleep a second for each message
    new_blocks: bool = False  # receives into a new block of 256 KiB each time; see _loops.py for what that costs

    def missing(self) -> str:
        """Why it cannot run here; empty if it can."""
        if not self.needs:
            return ""
        # In a process of its own: what a peer imports shall not be in the runner.
        check = [self.interpreter, "-c", self.needs]
        try:
            done = subprocess.run(check, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
        except OSError as error:
            return str(error)
        return "" if done.returncode == 0 else done.stderr.strip().rpartition("\n")[2]


REFERENCE = "c-level"  # what ratios are taken to, unless the workload says otherwise

TSTPOOL = "from tstpool import TstPool"
# Compiles the handlers too, before any clock runs.
NOGIL = "from benchmarks.build import extension; extension('_nogil')"
NO_GIL = (
    f"{TSTPOOL}; import sys; getattr(sys, '_is_gil_enabled', lambda: True)() and "
    f"sys.exit('needs a free-threaded Python: {FREE_THREADED_VARIABLE} names one')"
)
UVLOOP = "import uvloop"

# An echo of bytes is right for every framing; it is then a bound that parses nothing.
C_LOOP = Peer(REFERENCE, "C epoll, level-triggered", _c("epoll_echo"), framings=("none", "length4"))

RARE = ("floors", "full")
raw = Peer
rare = partial(Peer, sets=RARE)
RAW = (
    C_LOOP,
    rare("c-oneshot", "C epoll, oneshot", _c("epoll_echo", "--oneshot")),
    raw("tstpool", "tstpool, handler object", _python("tstpool_handler"), TSTPOOL),
    rare("tstpool-function", "tstpool, plain function", _python("tstpool_function"), TSTPOOL),
    raw("tstpool-nogil", "tstpool, nogil handler", _python("tstpool_nogil"), NOGIL),
    raw("uvloop", "uvloop Protocol", _python("asyncio_protocol", "uvloop"), UVLOOP),
    rare("uvloop-buffered", "uvloop BufferedProtocol", _python("asyncio_buffered", "uvloop"), UVLOOP),
    rare("uvloop-streams", "uvloop streams", _python("asyncio_streams", "uvloop"), UVLOOP),
    rare(
        "uvloop-aiofastnet",
        "uvloop, aiofastnet Protocol",
        _python("asyncio_protocol", "aiofastnet"),
        "import uvloop, aiofastnet",
        new_blocks=True,
    ),
    raw("asyncio", "asyncio Protocol", _python("asyncio_protocol", "asyncio"), new_blocks=True),
    rare("asyncio-buffered", "asyncio BufferedProtocol", _python("asyncio_buffered", "asyncio")),
    rare("asyncio-streams", "asyncio streams", _python("asyncio_streams", "asyncio"), new_blocks=True),
    rare("gevent", "gevent StreamServer", _python("gevent_server"), "import gevent"),
    rare("twisted", "Twisted Protocol", _python("twisted_protocol"), "import twisted.internet.reactor"),
    rare("trio", "trio streams", _python("trio_streams"), "import trio"),
    raw("socketserver", "ThreadingTCPServer", _python("socketserver_threads")),
)

framed = partial(Peer, framings=("length4",))
FRAMED = (
    framed("tstpool-framed", "tstpool, handler object", _python("tstpool_framed"), TSTPOOL),
    framed("tstpool-lent", "tstpool, copy=False", _python("tstpool_framed", "lend"), TSTPOOL, sets=RARE),
    framed("tstpool-nogil-framed", "tstpool, nogil handler", _python("tstpool_nogil", "framed"), NOGIL),
    framed("uvloop-tuned", "uvloop, tuned Protocol", _python("framed_tuned", "uvloop"), UVLOOP),
    framed("uvloop-handler", "uvloop, tuned, with a handler", _python("framed_handler", "uvloop"), UVLOOP),
    framed("uvloop-tuned-buffered", "uvloop, tuned BufferedProtocol", _python("framed_buffered", "uvloop"), UVLOOP),
    framed("uvloop-naive", "uvloop, plain Protocol", _python("framed_naive", "uvloop"), UVLOOP),
    framed("uvloop-streams-framed", "uvloop streams", _python("framed_streams", "uvloop"), UVLOOP, sets=RARE),
    framed("asyncio-naive", "asyncio, plain Protocol", _python("framed_naive", "asyncio"), new_blocks=True),
)


def _options(*arguments: str, interpreter: str = sys.executable) -> Callable[[], list[str]]:
    return _python("tstpool_options", *arguments, interpreter=interpreter)


def _without_gil(name: str, title: str, *arguments: str) -> Peer:
    command = _options(*arguments, interpreter=FREE_THREADED_PYTHON)
    return Peer(name, title, command, NO_GIL, FREE_THREADED_PYTHON, framings=())


special = partial(Peer, framings=())
SPECIAL = (
    special("broadcast-c", "C: send() in a thread", _c("broadcast")),
    special("broadcast-tstpool", "tstpool, pool.broadcast", _python("broadcast_tstpool"), TSTPOOL),
    special("broadcast-uvloop", "uvloop, call_soon_threadsafe", _python("broadcast_protocol", "uvloop"), UVLOOP),
    special("broadcast-asyncio", "asyncio, call_soon_threadsafe", _python("broadcast_protocol", "asyncio")),
    special("sleep-0", "tstpool, workers=8, nobody sleeps", _options("sleep", "--workers", "8"), TSTPOOL),
    special("sleep-4", "tstpool, workers=8, 4 sleep", _options("sleep", "--workers", "8"), TSTPOOL, sleepers=4),
    # One shard: a worker that has no sleeper in its own shard would stay awake.
    special("sleep-8", "tstpool, workers=8", _options("sleep", "--workers", "8", "--shards", "1"), TSTPOOL),
    special("tstpool-no-poll", "tstpool, busy_poll=0", _options("echo", "--busy-poll", "0"), TSTPOOL),
    special("tstpool-workers-1", "tstpool, workers=1", _options("echo", "--workers", "1"), TSTPOOL),
    special("tstpool-workers-8", "tstpool, workers=8", _options("echo", "--workers", "8"), TSTPOOL),
    special("work-1", "tstpool, workers=1", _options("work", "--workers", "1", "--shards", "1"), TSTPOOL),
    special("work-8", "tstpool, workers=8, shards=1", _options("work", "--workers", "8", "--shards", "1"), TSTPOOL),
    _without_gil("work-8-1", "tstpool, free-threaded, shards=1", "work", "--workers", "8", "--shards", "1"),
    _without_gil("work-8-2", "tstpool, free-threaded, shards=2", "work", "--workers", "8", "--shards", "2"),
)

PEERS = RAW + FRAMED + SPECIAL
BY_NAME = {peer.name: peer for peer in PEERS}
