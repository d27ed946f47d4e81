"""Ratios that a restless machine cannot spoil: short measurements, side by side, many times.

Rounds of whole seconds, with fresh servers in between, are what a user sees, but on a virtual machine whose neighbours
come and go their ratios spread by a third. Here all servers that a floor or a part of the chart compares run at once,
all but one of them asleep, and take turns of a quarter of a second, in each round in another order. The ratio is taken
within a round, from turns that are three seconds apart at most.

Where a process happens to have its memory is worth a few per cent, too, and stays as it is for all rounds of a start:
so servers are started anew many times, each start counts once, with the median of its rounds, and the figure is the
median of the starts, between the bounds within which that of ever more starts would lie, 95 times of 100. (Three starts
of twelve rounds would take a minute and a half less; but three figures have no such bounds.)

A turn during which something else used the machine does not count. The kernel's accounts have ticks of 10 ms, of which
a turn has sixty on two cores: that drops a quiet turn now and then, too.
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

STARTS = 9  # of the servers
ROUNDS = 4  # for each start
TURN_SECONDS, WARM_UP_SECONDS = 0.25, 0.05
KEPT = ("messages_per_s", "latency_us.p99", "others", "steal")  # of each turn


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


def turns(
    workload: Workload, chosen: list[Peer], cores: str, starts: int
) -> Iterator[tuple[int, str, dict[str, Any] | Failure]]:
    """Round, server, and what its turn gave, or why it failed. A server that does not start fails in all rounds of that
    start; the others go on."""
    server_cores, generator_cores = choose_cores(workload.cores or cores)
    for start in range(starts):
        numbers = range(start * ROUNDS, (start + 1) * ROUNDS)
        with contextlib.ExitStack() as stack:
            loads = []
            for peer in random.Random(start).sample(chosen, len(chosen)):
                try:
                    server = stack.enter_context(running(peer, server_cores))
                except Failure as failure:
                    yield from ((number, peer.name, failure) for number in numbers)
                else:
                    loads.append(Load(peer, workload, server, TURN_SECONDS, WARM_UP_SECONDS, generator_cores))
            for number in numbers:
                for load in random.Random(number).sample(loads, len(loads)):
                    yield number, load.peer.name, _turn(load)


def _turn(load: Load) -> dict[str, Any] | Failure:
    """A Failure is the server's: what only slows it down makes a turn disturbed, and sample() lets that pass."""
    try:
        return sample(load)
    except Failure as failure:
        return failure


Lines = list[dict[str, Any]]


def take(workload: Workload, chosen: list[Peer], cores: str, starts: int = STARTS) -> tuple[Lines, Lines]:
    """A line for each server, with its figures by round: what results.by_start() reads. And one for each turn that
    failed."""
    lines: dict[str, dict[str, Any]] = {
        peer.name: {"workload": workload.name, "peer": peer.name, "rounds_per_start": ROUNDS}
        | {name: [None] * (starts * ROUNDS) for name in KEPT}
        for peer in chosen
    }
    errors = []
    for number, peer, result in turns(workload, chosen, cores, starts):
        if isinstance(result, Failure):
            errors.append({"workload": workload.name, "peer": peer, "round": number, "error": str(result)})
            continue
        figures = (result["messages_per_s"], result["latency_us"]["p99"], result["others"], result["steal"])
        for name, figure in zip(KEPT, figures, strict=True):
            lines[peer][name][number] = figure
    return list(lines.values()), errors


def measure(skipped: dict[str, str], cores: str, progress: Callable[[str], None]) -> dict[str, Lines]:
    """For the document."""
    pairs, errors = [], []
    for workload, chosen in plan(skipped):
        progress(workload.title)
        lines, failed = take(workload, chosen, cores)
        pairs += lines
        errors += failed
    return {"pairs": pairs, "pair_errors": errors}
