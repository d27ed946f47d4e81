"""Cases for pytest-benchmark: how long a server takes for a fixed number of messages. ``pytest benchmarks`` runs them.

The times in pytest-benchmark's table are those of the whole generator: it starts, connects, waits for the last replies.
Beside them, in extra_info, stand the rates that the generator itself measured, from the first message to the last.

Both differ from day to day, from machine to machine; the ratio to the C loop's rate differs much less, and ``python -m
benchmarks.check`` compares that of the same cases with a baseline. To compare servers: ``python -m benchmarks``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# pytest may run from anywhere, and `benchmarks` is a package only with the repository on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.build import program
from benchmarks.check import CASES
from benchmarks.measure import Server, choose_cores, in_child, polling, running
from benchmarks.peers import BY_NAME
from benchmarks.workloads import BY_NAME as WORKLOADS

# About a fifth of a second.
MESSAGES = {
    "echo-64B-c1": 5_000,
    "echo-64B-c50": 30_000,
    "framed-64B-c50-d16": 300_000,
    "framed-64B-c50-d128": 1_500_000,
    "framed-16K-c50": 15_000,
}


@pytest.fixture
def server(peer: str) -> Iterator[Server]:
    if why := BY_NAME[peer].missing():
        pytest.skip(why)
    with running(BY_NAME[peer], choose_cores("split")[0]) as found:
        yield found


@pytest.mark.parametrize(
    ("workload", "peer"), [(workload, peer) for workload, peers in CASES.items() for peer in peers]
)
def test_messages(benchmark: Any, workload: str, peer: str, server: Server) -> None:
    known, cores = WORKLOADS[workload], choose_cores("split")[1]
    command = [str(program("loadgen")), "-p", str(server.port), "-w", "0", "-t", "60", "-n", str(MESSAGES[workload])]
    command += ["-c", str(known.connections), "-d", str(known.depth), "-s", str(known.size)]
    command += ["--framing", known.framing, *polling(known, cores)]

    rates = []

    def run() -> None:
        done = subprocess.run(command, stdout=subprocess.PIPE, preexec_fn=in_child(cores))
        result = json.loads(done.stdout)
        assert result["ok"], result["error"]
        rates.append(result["messages_per_s"])

    benchmark.group = workload
    benchmark.name = peer
    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
    benchmark.extra_info["messages_per_s"] = rates[1:]  # without the round that warmed up
