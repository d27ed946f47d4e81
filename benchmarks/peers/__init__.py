"""The servers that are compared. A new one is a module here (or C source in ../c) and a line in PEERS.

Each is a small program, written as its own users would write it, that listens on 127.0.0.1, prints its port as the
first line, and serves until it is killed. ``python -m benchmarks.peers.asyncio_protocol uvloop`` starts one by hand.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..build import program

REPOSITORY = Path(__file__).resolve().parents[2]


def _c(*arguments: str) -> Callable[[], list[str]]:
    return lambda: [str(program("epoll_echo")), *arguments]


def _python(module: str, *arguments: str) -> Callable[[], list[str]]:
    return lambda: [sys.executable, "-m", f"benchmarks.peers.{module}", *arguments]


@dataclass(frozen=True)
class Peer:
    name: str  # stands in results.json and is what --only selects
    title: str
    command: Callable[[], list[str]]  # builds it if need be
    needs: str = ""  # the import without which it cannot run
    framings: tuple[str, ...] = ("none",)  # the workloads it serves honestly

    def missing(self) -> str:
        """Why it cannot run here; empty if it can."""
        if not self.needs:
            return ""
        # In a process of its own: what a peer imports shall not be in the runner.
        check = [sys.executable, "-c", self.needs]
        done = subprocess.run(check, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
        return "" if done.returncode == 0 else done.stderr.strip().rpartition("\n")[2]


REFERENCE = "c-level"  # what ratios are taken to

TSTPOOL = "from tstpool import TstPool"
# Compiles the handlers too, before any clock runs.
NOGIL = "from benchmarks.build import extension; extension('_nogil')"
UVLOOP = "import uvloop"

RAW = (
    # An echo of bytes is right for every framing; it is then a bound that parses nothing.
    Peer("c-level", "C epoll, level-triggered", _c(), framings=("none", "length4")),
    Peer("c-oneshot", "C epoll, oneshot", _c("--oneshot"), framings=("none", "length4")),
    Peer("tstpool", "tstpool, handler object", _python("tstpool_handler"), TSTPOOL),
    Peer("tstpool-function", "tstpool, plain function", _python("tstpool_function"), TSTPOOL),
    Peer("tstpool-nogil", "tstpool, nogil handler", _python("tstpool_nogil"), NOGIL),
    Peer("uvloop", "uvloop Protocol", _python("asyncio_protocol", "uvloop"), UVLOOP),
    Peer("asyncio", "asyncio Protocol", _python("asyncio_protocol", "asyncio")),
    Peer("socketserver", "ThreadingTCPServer", _python("socketserver_threads")),
)

framed = partial(Peer, framings=("length4",))
FRAMED = (
    framed("tstpool-framed", "tstpool, handler object", _python("tstpool_framed"), TSTPOOL),
    framed("tstpool-nogil-framed", "tstpool, nogil handler", _python("tstpool_nogil", "framed"), NOGIL),
    framed("uvloop-tuned", "uvloop, tuned Protocol", _python("framed_tuned", "uvloop"), UVLOOP),
    framed("uvloop-tuned-buffered", "uvloop, tuned BufferedProtocol", _python("framed_buffered", "uvloop"), UVLOOP),
    framed("uvloop-naive", "uvloop, plain Protocol", _python("framed_naive", "uvloop"), UVLOOP),
    framed("uvloop-streams-framed", "uvloop streams", _python("framed_streams", "uvloop"), UVLOOP),
    framed("asyncio-naive", "asyncio, plain Protocol", _python("framed_naive", "asyncio")),
)

PEERS = RAW + FRAMED
BY_NAME = {peer.name: peer for peer in PEERS}
