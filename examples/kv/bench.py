"""Measures tstkv beside a real redis-server with redis-benchmark, and writes RESULTS.md.

    python examples/kv/bench.py [--rounds 7] [--requests 2000000]

The method: both servers run at the same time, each pinned to the same core, and the generator to another; only one of
them is loaded at a time. A round is one run of redis-benchmark against each, in turn, and who is first alternates. What
is given is the median over the rounds, and the ratio of the medians. Nothing is written to disk by either.

redis-benchmark is one thread that does about as much work for a request as a server does: where it is busier than the
server, the rate is its own. So the server's CPU time for a request is given too.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # the benchmarks of the repository know the machine

from benchmarks.machine import CpuTimes, describe, one_line, wait_until_quiet  # noqa: E402

TESTS = "ping,set,get"
WORKLOADS = {
    "-P 16 -c 50": ["-P", "16", "-c", "50"],
    "-P 64 -c 50": ["-P", "64", "-c", "50"],
    "-P 1 -c 50": ["-P", "1", "-c", "50"],
}
PR_SET_PDEATHSIG = 1
libc = ctypes.CDLL(None)


@dataclass
class Server:
    name: str
    version: str
    port: int
    process: subprocess.Popen[str]


@dataclass
class Figures:
    """What the rounds gave for one server and one kind of request."""

    rates: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)  # microseconds of the server for one request

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


def pinned(cores: set[int]) -> Callable[[], None]:
    """For a child: it stays on these cores and dies with us."""

    def prepare() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.sched_setaffinity(0, cores)

    return prepare


def start(command: list[str], cores: set[int], stdout: int, where: Path | str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, text=True, stdin=subprocess.DEVNULL, stdout=stdout, cwd=where, preexec_fn=pinned(cores)
    )


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    with process:
        try:
            yield process
        finally:
            process.terminate()


@contextmanager
def tstkv(cores: set[int]) -> Iterator[Server]:
    command = [sys.executable, "-m", "tstkv", "--port", "0"]
    with ended(start(command, cores, subprocess.PIPE, HERE)) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"tstkv (\S+) listens on \S+ port (\d+)\n", line)
        if found is None:
            sys.exit(f"tstkv did not start; is it built? (see README.md): {line!r}")
        yield Server("tstkv", found[1], int(found[2]), process)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def process_that_answers(port: int) -> int | None:
    """The id of the redis-server's process on that port."""
    told = subprocess.run(["redis-cli", "-p", str(port), "info", "server"], capture_output=True, text=True).stdout
    found = re.search(r"^process_id:(\d+)", told, re.MULTILINE)
    return int(found[1]) if found else None


@contextmanager
def redis(cores: set[int], port: int) -> Iterator[Server]:
    """What another redis-server says on that port is not taken for ours: its keys are not for us to write."""
    version = subprocess.run(["redis-server", "--version"], capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory() as where:
        command = ["redis-server", "--port", str(port), "--save", "", "--appendonly", "no", "--dir", where]
        with ended(start(command, cores, subprocess.DEVNULL, where)) as process:
            deadline = time.monotonic() + 10
            while process_that_answers(port) != process.pid:
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"redis-server does not answer on port {port}")
                time.sleep(0.05)
            found = re.search(r"v=(\S+)", version)
            yield Server("redis-server", found[1] if found else "?", port, process)


def cpu_seconds(pid: int) -> float:
    """User and system time of the process so far, to the nanosecond: /proc/pid/stat counts in ticks."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def measure(server: Server, options: list[str], requests: int, cores: set[int], figures: dict[str, Figures]) -> None:
    """One run of each test against one server."""
    for test in TESTS.split(","):
        command = ["redis-benchmark", "-p", str(server.port), "-t", test, "-n", str(requests), "--csv", *options]
        before = cpu_seconds(server.process.pid)
        done = subprocess.run(command, capture_output=True, text=True, check=True, preexec_fn=pinned(cores))
        used = cpu_seconds(server.process.pid) - before
        rows = list(csv.DictReader(done.stdout.splitlines()))
        for row in rows:  # ping has two rows, of which we know only what they took together
            entry = figures.setdefault(row["test"], Figures())
            entry.rates.append(float(row["rps"]))
            entry.cpu.append(used / (len(rows) * requests) * 1e6)


def table(results: dict[str, dict[str, Figures]]) -> list[str]:
    """results: server -> test -> figures."""
    ours, theirs = results["tstkv"], results["redis-server"]
    lines = ["| | tstkv | redis-server | ratio | least, most in a round | CPU for one, us: tstkv | redis-server |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for test, our in ours.items():
        their = theirs[test]
        ratios = [a / b for a, b in zip(our.rates, their.rates, strict=True)]
        lines.append(
            f"| {test} | {our.rate:,.0f} | {their.rate:,.0f} | **{our.rate / their.rate:.2f}** "
            f"| {min(ratios):.2f}, {max(ratios):.2f} "
            f"| {statistics.median(our.cpu):.3f} | {statistics.median(their.cpu):.3f} |"
        )
    return lines


def page(
    servers: list[Server], all_results: dict[str, dict[str, dict[str, Figures]]], rounds: int, noise: float
) -> str:
    machine = describe()
    versions = " and ".join(f"{server.name} {server.version}" for server in servers)
    lines = [
        "# tstkv beside redis-server",
        "",
        f"Requests per second of {versions}, as redis-benchmark counts them: medians of {rounds} rounds",
        "in one run. The two take turns on one core, the generator has another; neither writes to disk. This page was",
        "made by `bench.py`.",
        "",
        f"{one_line(machine)}; {machine['compiler']}; tstpool {machine['tstpool']}, commit {machine['commit']}, "
        f"{machine['date']}. Others took {noise:.1%} of the machine meanwhile.",
    ]
    for name, results in all_results.items():
        lines += ["", f"## `redis-benchmark -t {TESTS} {name}`", "", *table(results)]
    lines += [
        "",
        "redis-benchmark is one thread and does about as much for a request as a server does. Where a server is faster",
        "than the generator, the rate is the generator's; what tells the servers apart is then the CPU time that each",
        "needs for a request. That of PING is the mean of both kinds. tstkv, as it is started by default, polls for 50",
        "microseconds before it sleeps, and redis-server does not: where it waits for requests, that costs CPU time",
        "and spares the time of waking it.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=2_000_000, help="in each run of -P 16 and more")
    parser.add_argument("--port", type=int, default=0, help="for redis-server; 0: any free one (%(default)s)")
    parser.add_argument("--output", type=Path, default=HERE / "RESULTS.md")
    options = parser.parse_args()
    if missing := [tool for tool in ("redis-server", "redis-benchmark", "redis-cli") if shutil.which(tool) is None]:
        sys.exit(f"not installed: {', '.join(missing)}")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        sys.exit("two cores are needed: one for the servers, one for the generator")
    busy = wait_until_quiet(30)
    print(f"the machine is {busy:.0%} busy with other things")
    results: dict[str, dict[str, dict[str, Figures]]] = {}
    others: list[float] = []
    with ExitStack() as stack:
        theirs = redis({cores[-1]}, options.port or free_port())
        servers = [stack.enter_context(tstkv({cores[-1]})), stack.enter_context(theirs)]
        for name, arguments in WORKLOADS.items():
            results[name] = {server.name: {} for server in servers}
            requests = options.requests if "-P 1 " not in f"{name} " else options.requests // 8
            for number in range(options.rounds):
                for server in servers if number % 2 == 0 else reversed(servers):
                    before, children = CpuTimes.now(), sum(os.times()[:4])
                    ours = sum(cpu_seconds(one.process.pid) for one in servers)
                    measure(server, arguments, requests, {cores[0]}, results[name][server.name])
                    after = CpuTimes.now()
                    ours = sum(cpu_seconds(one.process.pid) for one in servers) - ours + sum(os.times()[:4]) - children
                    others.append(max(0.0, after.busy - before.busy - ours) / (after.total - before.total))
            print("\n".join([name, *table(results[name])]), flush=True)
    options.output.write_text(page(servers, results, options.rounds, statistics.median(others)))
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
