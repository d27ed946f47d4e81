"""One measurement: start a server, let the generator at it, stop the server.

The method, the same for every server. The server process with all its threads is pinned to one core and the generator
to another, so "messages/s" is what one core's worth of server does, and a thread that hops between cores is not
mistaken for a slow server. A server that could use several cores at once gains nothing from that here; `cores="shared"`
lifts it, for all servers alike. Each measurement has a fresh server process.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from .build import program
from .machine import CpuTimes
from .peers import REPOSITORY, Peer
from .workloads import Workload

START_SECONDS = 15.0
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class Failure(Exception):
    """A measurement that gave no figure, and why."""


def choose_cores(mode: str) -> tuple[set[int], set[int]]:
    """Which cores the server and the generator may use. The last core for the server: interrupts prefer the first."""
    available = sorted(os.sched_getaffinity(0))
    if mode == "shared" or len(available) < 2:
        return set(available), set(available)
    return {available[-1]}, {available[0]}


def _in_child(cores: set[int]) -> Callable[[], None]:
    """What a child does before it becomes the program. It dies with the runner, however that dies."""

    def prepare() -> None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.sched_setaffinity(0, cores)
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    return prepare


def _read_port(process: subprocess.Popen[bytes], errors: Any) -> int:
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], START_SECONDS)
    line = process.stdout.readline() if ready else b""
    if line.strip().isdigit():
        return int(line)
    errors.seek(0)
    last = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
    raise Failure(f"the server did not start: {last or f'it printed {line!r} as its port'}")


@contextlib.contextmanager
def running(peer: Peer, cores: set[int]) -> Iterator[tuple[int, int]]:
    """The server as a process; gives its process id and port."""
    command = peer.command()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            preexec_fn=_in_child(cores),
        )
        with process:
            try:
                yield process.pid, _read_port(process, errors)
            finally:
                process.kill()


def generate(
    workload: Workload, port: int, pid: int, seconds: float, warm_up: float, cores: set[int]
) -> dict[str, Any]:
    """Runs the generator; gives what it printed."""
    command = [str(program("loadgen")), "-p", str(port), "--pid", str(pid), "--framing", workload.framing]
    command += ["-c", str(workload.connections), "-d", str(workload.depth), "-s", str(workload.size)]
    command += ["-t", str(seconds), "-w", str(warm_up)]
    if workload.spin and len(cores) < len(os.sched_getaffinity(0)):  # on the server's own core it would be in the way
        command.append("--spin")
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=_in_child(cores))
    try:
        result: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise Failure(f"the generator ended with {done.returncode}: {done.stderr.strip()}") from None
    if not result["ok"]:
        raise Failure(result["error"])
    return result


def _cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _our_cpu_seconds() -> float:
    """The runner and the generators that have ended."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    return total


def measure(peer: Peer, workload: Workload, seconds: float, warm_up: float, cores: str) -> dict[str, Any]:
    """One sample, with how much of the machine others took meanwhile. Raises Failure."""
    server_cores, generator_cores = choose_cores(cores)
    with running(peer, server_cores) as (pid, port):
        time.sleep(0.05)  # a Python server prints its port just before it begins to wait
        before, ours = CpuTimes.now(), _cpu_seconds(pid) + _our_cpu_seconds()
        result = generate(workload, port, pid, seconds, warm_up, generator_cores)
        after, ours = CpuTimes.now(), _cpu_seconds(pid) + _our_cpu_seconds() - ours
    total = after.total - before.total
    result["others"] = round(max(0.0, after.busy - before.busy - ours) / total, 4)
    result["steal"] = round((after.steal - before.steal) / total, 4)
    return result
