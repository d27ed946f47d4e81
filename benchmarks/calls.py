"""Which system calls a message costs a server: what `strace -c` counts while the load generator talks to it.

Nothing is timed here: under strace each call takes several times as long. The server is then so much slower than its
clients that nearly all of them are ready each time it looks: it waits more rarely than without strace. What it does for
each connection that is ready does not change.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .measure import Failure, Load, choose_cores, in_child, loadgen, running
from .peers import BY_NAME as PEERS
from .peers import REFERENCE, Peer
from .workloads import BY_NAME as WORKLOADS
from .workloads import Workload

RAW = (REFERENCE, "tstpool", "tstpool-nogil", "uvloop")
FRAMED = (REFERENCE, "tstpool-framed", "tstpool-nogil-framed", "uvloop-tuned")
COUNTED = {
    "echo-64B-c50": RAW,
    "framed-64B-c50-d16": FRAMED,
    "framed-64B-c50-d128": FRAMED,
    "framed-16K-c50": FRAMED,
}
ATTACH_SECONDS = 5.0
# A line of strace's table: share, seconds, microseconds per call, calls, errors or nothing, name.
LINE = re.compile(r"^\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(?:\d+\s+)?(\w+)$", re.MULTILINE)


def parse(table: str) -> dict[str, int]:
    """Calls by name, most frequent first, from what `strace -c` writes."""
    found = {name: int(calls) for calls, name in LINE.findall(table) if name != "total"}
    return dict(sorted(found.items(), key=lambda call: -call[1]))


def _is_traced(pid: int) -> bool:
    """All threads of the process."""
    states = (Path(f"/proc/{pid}/task/{task}/status").read_text() for task in os.listdir(f"/proc/{pid}/task"))
    return all(re.search(r"^TracerPid:\s*[1-9]", state, re.MULTILINE) for state in states)


def _wait_until_traced(pid: int, strace: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + ATTACH_SECONDS
    while not _is_traced(pid):
        if strace.poll() is not None or time.monotonic() > deadline:
            strace.kill()
            raise Failure(strace.communicate()[1].strip().rpartition("\n")[2] or "strace did not attach")
        time.sleep(0.01)


@contextlib.contextmanager
def traced(pid: int, cores: set[int], output: Path) -> Iterator[None]:
    """Counts the calls of all threads of the process into `output`, which is complete afterwards."""
    command = ["strace", "-f", "-c", "-qq", "-o", str(output), "-p", str(pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=in_child(cores)) as strace:
        try:
            _wait_until_traced(pid, strace)
            yield
            strace.send_signal(signal.SIGINT)  # it lets the server go, and writes
            strace.wait(ATTACH_SECONDS)
        except subprocess.TimeoutExpired:
            raise Failure("strace did not end") from None
        finally:
            strace.kill()


def count(peer: Peer, workload: Workload, seconds: float) -> dict[str, Any]:
    """How many calls of each name for how many messages, those of connecting included. Raises Failure."""
    server_cores, generator_cores = choose_cores("split")
    with tempfile.TemporaryDirectory() as directory, running(peer, server_cores) as server:
        output = Path(directory) / "calls"
        with traced(server.pid, server_cores, output):
            result = loadgen(Load(peer, workload, server, seconds, 0.0, generator_cores))
        return {"messages": result["messages_in_all"], "calls": parse(output.read_text())}


def missing() -> str:
    """Why nothing can be counted here; empty if it can."""
    return "" if shutil.which("strace") else "strace is not installed"


def _version() -> str:
    first = subprocess.run(["strace", "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
    return "strace " + first.rpartition(" ")[2]


def measure(seconds: float, counted: Iterable[tuple[Workload, Peer]]) -> dict[str, Any]:
    """For the document; or why there is nothing."""
    if why := missing():
        return {"missing": why}
    counts = []
    for workload, peer in counted:
        found: dict[str, Any] = {"workload": workload.name, "peer": peer.name}
        try:
            found |= count(peer, workload, seconds)
        except (Failure, OSError) as failure:  # OSError: the server has gone meanwhile
            found["error"] = str(failure)
        counts.append(found)
    return {"tool": _version(), "counts": counts}


def selection() -> list[tuple[Workload, Peer]]:
    """Whom to count, of those that can run here."""
    able = {name: not PEERS[name].missing() for name in (*RAW, *FRAMED)}
    return [(WORKLOADS[w], PEERS[name]) for w, names in COUNTED.items() for name in names if able[name]]
