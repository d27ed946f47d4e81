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
import math
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .build import program
from .machine import QUIET, CpuTimes
from .peers import REPOSITORY, Peer
from .workloads import Workload

START_SECONDS = 15.0
IN_FLIGHT_TOLERANCE = 0.1  # of the number of messages that should be
HEAD_START = 0.3  # until the handlers that shall sleep do
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


def in_child(cores: set[int]) -> Callable[[], None]:
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


@dataclass(frozen=True)
class Server:
    pid: int
    port: int
    control: int  # a descriptor: what is written there is its standard input


@contextlib.contextmanager
def running(peer: Peer, cores: set[int]) -> Iterator[Server]:
    """The server as a process."""
    command = peer.command()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            preexec_fn=in_child(cores),
        )
        with process:
            try:
                assert process.stdin is not None
                port = _read_port(process, errors)
                time.sleep(0.05)  # a Python server prints its port just before it begins to wait
                yield Server(process.pid, port, process.stdin.fileno())
            finally:
                process.kill()


@dataclass(frozen=True)
class Load:
    """What a driver needs to know."""

    peer: Peer
    workload: Workload
    server: Server
    seconds: float
    warm_up: float
    cores: set[int]

    def run(self, command: list[str]) -> dict[str, Any]:
        """Runs a generator on its cores; gives what it printed."""
        with self.start(command) as process:
            return self.result(process)

    def start(self, command: list[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=[self.server.control],
            preexec_fn=in_child(self.cores),
        )

    def result(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        stdout, stderr = process.communicate()
        try:
            result: dict[str, Any] = json.loads(stdout)
        except ValueError:
            raise Failure(f"the generator ended with {process.returncode}: {stderr.strip()}") from None
        if not result["ok"]:
            raise Failure(result["error"])
        return result


def _common(load: Load, name: str) -> list[str]:
    """What all C generators are told."""
    command = [str(program(name)), "-p", str(load.server.port), "--pid", str(load.server.pid)]
    command += ["-c", str(load.workload.connections), "-s", str(load.workload.size)]
    return [*command, "-t", str(load.seconds), "-w", str(load.warm_up)]


def polling(workload: Workload, cores: set[int]) -> list[str]:
    """The option with which the generator polls, where it shall. On the server's own core it would disturb."""
    return ["--spin"] if workload.spin and len(cores) < len(os.sched_getaffinity(0)) else []


def loadgen(load: Load) -> dict[str, Any]:
    workload = load.workload
    command = [*_common(load, "loadgen"), "-d", str(workload.depth), "--framing", workload.framing]
    return load.run([*command, *polling(workload, load.cores)])


def connect_rate(load: Load) -> dict[str, Any]:
    return load.run(_common(load, "connect_rate"))


def broadcast_load(load: Load) -> dict[str, Any]:
    return load.run([*_common(load, "broadcast_load"), "--control", str(load.server.control)])


def slow_mix(load: Load) -> dict[str, Any]:
    """loadgen, while another one keeps the handlers of others asleep: for a message of one byte one sleeps a second."""
    sleepers = load.peer.sleepers
    if sleepers == 0:
        return loadgen(load)
    naps = math.ceil(load.warm_up + load.seconds + HEAD_START)
    command = [str(program("loadgen")), "-p", str(load.server.port), "--framing", "length4", "-s", "1", "-w", "0"]
    command += ["-c", str(sleepers), "-t", str(naps + 0.5)]
    with load.start(command) as process:
        try:
            time.sleep(HEAD_START)
            result = loadgen(load)
            slept = load.result(process)["messages"]
        finally:
            process.kill()
    if slept < sleepers * naps:
        raise Failure(f"{sleepers} sleepers should have slept {sleepers * naps} times, but did {slept} times")
    return result


def _drivers(load: Load, name: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.drivers", name, "--port", str(load.server.port)]
    command += ["--pid", str(load.server.pid), "--connections", str(load.workload.connections)]
    return load.run([*command, *arguments])


def idle(load: Load) -> dict[str, Any]:
    return _drivers(load, "idle", "--seconds", str(min(5.0, 5 * load.seconds)))


def asleep(load: Load) -> dict[str, Any]:
    return _drivers(load, "asleep", "--workers", "8")


# Workload.driver -> what it does.
DRIVERS: dict[str, Callable[[Load], dict[str, Any]]] = {
    function.__name__: function for function in (loadgen, connect_rate, broadcast_load, slow_mix, idle, asleep)
}


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


def check_in_flight(sample: dict[str, Any], expected: int) -> None:
    """Rate times mean latency is what was in flight. If that is not what should have been, some connections waited for
    most of the time while others were served: the figures are those of fewer connections. Raises Failure."""
    if max(sample["others"], sample["steal"]) > QUIET:
        return  # what took the machine may have done that; the sample is known to be disturbed
    latency = sample["latency_us"]["mean"] / 1e6
    found = sample["messages_per_s"] * latency
    # A message that is under way at the beginning or the end counts wholly or not at all: that is one latency.
    if abs(found / expected - 1) > IN_FLIGHT_TOLERANCE + latency / sample["seconds"]:
        raise Failure(f"rate x mean latency says that {found:.0f} messages were in flight, not {expected}")


def sample(load: Load) -> dict[str, Any]:
    """One measurement of a server that runs, with how much of the machine others took meanwhile. Raises Failure."""
    workload, pid = load.workload, load.server.pid
    before, ours = CpuTimes.now(), _cpu_seconds(pid) + _our_cpu_seconds()
    result = DRIVERS[workload.driver](load)
    after, ours = CpuTimes.now(), _cpu_seconds(pid) + _our_cpu_seconds() - ours
    total = after.total - before.total
    result["others"] = round(max(0.0, after.busy - before.busy - ours) / total, 4)
    result["steal"] = round((after.steal - before.steal) / total, 4)
    if "latency_us" in result:
        check_in_flight(result, workload.connections * workload.depth)
    return result


def measure(peer: Peer, workload: Workload, seconds: float, warm_up: float, cores: str) -> dict[str, Any]:
    """A server of its own, and one sample of it. Raises Failure."""
    server_cores, generator_cores = choose_cores(workload.cores or cores)
    with running(peer, server_cores) as server:
        return sample(Load(peer, workload, server, seconds, warm_up, generator_cores))
