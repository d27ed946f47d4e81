"""Ratios that a restless machine cannot spoil: short measurements, side by side, many times.

Rounds of whole seconds, with fresh servers in between, are what a user sees, but on a virtual machine whose neighbours
come and go their ratios spread by a third. Here all servers that a floor or a part of the chart compares run at once,
all but one of them asleep, and take turns of a quarter of a second, in each round in another order. The ratio is taken
within a round, from turns that are three seconds apart at most; the figure is the median of all rounds, between the
bounds within which the median of ever more rounds would lie, 95 times of 100. Servers are started anew a few times,
because where a process happens to have its memory is worth a few per cent, too.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

from . import peers, workloads
from .floors import FLOORS
from .measure import Failure, Load, choose_cores, running, sample
from .peers import Peer
from .workloads import Workload

STARTS = 3  # of the servers
ROUNDS = 12  # for each start
TURN_SECONDS, WARM_UP_SECONDS = 0.25, 0.05


def plan(skipped: dict[str, str]) -> list[tuple[Workload, list[Peer]]]:
    """Whom the chart shows and whom each workload's floors compare, without those that cannot run here."""
    found: dict[Workload, dict[str, None]] = {}
    for workload in workloads.WORKLOADS:
        if workload.charted:
            found[workload] = dict.fromkeys(peer.name for peer in workload.able() if "default" in peer.sets)
    for floor in FLOORS:
        workload = workloads.BY_NAME[floor.workload]
        if floor.paired and workload.driver == "loadgen":
            found.setdefault(workload, {}).update(dict.fromkeys((floor.peer, *floor.against)))
    return [(w, [peers.BY_NAME[name] for name in names if name not in skipped]) for w, names in found.items()]


def turns(workload: Workload, chosen: list[Peer], cores: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Round, server, and what its turn gave. Where a turn fails, say because others took the machine, the round goes
    without it."""
    server_cores, generator_cores = choose_cores(workload.cores or cores)
    for start in range(STARTS):
        with contextlib.ExitStack() as stack:
            loads = []
            for peer in random.Random(start).sample(chosen, len(chosen)):
                server = stack.enter_context(running(peer, server_cores))
                loads.append(Load(peer, workload, server, TURN_SECONDS, WARM_UP_SECONDS, generator_cores))
            for number in range(start * ROUNDS, (start + 1) * ROUNDS):
                for load in random.Random(number).sample(loads, len(loads)):
                    with contextlib.suppress(Failure):
                        yield number, load.peer.name, sample(load)


def measure(skipped: dict[str, str], cores: str, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """A line for each server and workload, with its figures by round: what results.paired() reads. A server that does
    not start at all is left out, and its floors are judged by the longer rounds."""
    lines = []
    for workload, chosen in plan(skipped):
        progress(workload.title)
        figures: dict[str, list[list[float | None]]] = {
            peer.name: [[None] * (STARTS * ROUNDS) for _ in range(2)] for peer in chosen
        }
        with contextlib.suppress(Failure):
            for number, peer, result in turns(workload, chosen, cores):
                rates, p99s = figures[peer]
                rates[number], p99s[number] = result["messages_per_s"], result["latency_us"]["p99"]
        lines += [
            {"workload": workload.name, "peer": peer, "messages_per_s": rates, "latency_us.p99": p99s}
            for peer, (rates, p99s) in figures.items()
        ]
    return lines
