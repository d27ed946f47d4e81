"""What tstpool shall reach, as data: a floor is a line here. What a run says about each is `findings`.

A ratio is the median of those within each round, as everywhere (results.py): of the many short ones of pairs.py where
a run has them, start by start. Where it is to several servers, the one that does best beside ours counts.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from . import counting
from .peers import BY_NAME, REFERENCE
from .results import paired, ratio, select, split_us, spread, value

Document = dict[str, Any]


@dataclass(frozen=True)
class Quantity:
    title: str
    key: str  # where it is in a sample
    sub: str = ""
    format: str = "{:.3f}"  # of the figure itself; ratios have three digits


RATE = Quantity("messages/s", "messages_per_s")
P99 = Quantity("p99", "latency_us", "p99", "{:,.0f} us")
P999 = Quantity("p99.9", "latency_us", "p999", "{:,.0f} us")
CPU_SHARE = Quantity("CPU, of a core", "values", "cpu_share", "{:.2%}")
SERVED = Quantity("messages served", "values", "served", "{:,.0f}")
MEMORY = Quantity("bytes/connection", "values", "bytes_per_connection", "{:,.0f}")
# These two are no figure of one round.
OWN_CODE = Quantity("user CPU per message", "user_us_per_message")
STATISTICS = Quantity("statistics, of its CPU", "statistics", format="{:.1%}")

AT_LEAST, AT_MOST, BELOW = ">=", "<=", "<"
COMPARE: dict[str, Callable[[float, float], bool]] = {AT_LEAST: operator.ge, AT_MOST: operator.le, BELOW: operator.lt}


@dataclass(frozen=True)
class Floor:
    workload: str
    peer: str
    quantity: Quantity
    comparison: str
    wanted: float
    against: tuple[str, ...] = ()  # whom the ratio is to; empty: it is the figure itself
    gil: bool = False  # meant for a Python that has one

    @property
    def paired(self) -> bool:
        """What pairs.py measures."""
        return bool(self.against) and self.quantity in (RATE, P99)

    @property
    def format(self) -> str:
        return "{:.3f}" if self.against else self.quantity.format

    def met_by(self, measured: float) -> bool:
        return COMPARE[self.comparison](measured, self.wanted)


C_LOOP = (REFERENCE,)
UVLOOP = ("uvloop",)
TUNED = ("uvloop-tuned", "uvloop-tuned-buffered")  # cut by hand, as fast as Python code gets
ONE_WORKER = ("tstpool-workers-1",)
with_gil = partial(Floor, gil=True)

# One line for each figure: a weaker floor beside a stricter one would be counted, and met, for nothing.
FLOORS = (
    Floor("echo-64B-c50", "tstpool-nogil", RATE, AT_LEAST, 0.98, C_LOOP),
    Floor("echo-64B-c50", "tstpool", RATE, AT_LEAST, 0.95, C_LOOP),
    Floor("cpu-64B-c50", "tstpool", OWN_CODE, AT_MOST, 0.5, UVLOOP),
    Floor("echo-64B-c50", "tstpool", RATE, AT_LEAST, 1.03, UVLOOP),
    Floor("echo-64B-c50", "tstpool", RATE, AT_LEAST, 1.03, ("uvloop-aiofastnet",)),
    Floor("echo-64B-c1", "tstpool", RATE, AT_LEAST, 0.97, C_LOOP),
    Floor("echo-64B-c1", "tstpool", P99, AT_MOST, 1.1, C_LOOP),
    Floor("echo-64B-c1000", "tstpool", RATE, AT_LEAST, 0.97, C_LOOP),
    Floor("echo-64B-c1000", "tstpool", P99, AT_MOST, 1.1, C_LOOP),
    Floor("framed-64B-c50-d16", "tstpool-framed", RATE, AT_LEAST, 1.5, TUNED),
    Floor("framed-64B-c50-d16", "tstpool-nogil-framed", RATE, AT_LEAST, 1.0, C_LOOP),
    Floor("framed-64B-c50-d128", "tstpool-framed", RATE, AT_LEAST, 3.5, TUNED),
    Floor("framed-64B-c50-d128", "tstpool-nogil-framed", RATE, AT_LEAST, 0.8, C_LOOP),
    Floor("framed-16K-c50", "tstpool-framed", RATE, AT_LEAST, 1.3, TUNED),
    Floor("framed-16K-c50", "tstpool-framed", RATE, AT_LEAST, 0.9, C_LOOP),
    Floor("framed-1M-c50", "tstpool-framed", RATE, AT_LEAST, 1.2, TUNED),
    with_gil("workers-c50", "tstpool-workers-8", RATE, AT_LEAST, 0.97, ONE_WORKER),
    with_gil("workers-c50", "tstpool-workers-8", P99, AT_MOST, 1.2, ONE_WORKER),
    Floor("work-50us-c50", "work-8-2", RATE, AT_LEAST, 1.65, ("work-8-1",)),
    with_gil("work-50us-c50", "work-8", RATE, AT_LEAST, 0.95, ("work-1",)),
    Floor("slow-mix-c46", "sleep-4", P99, AT_MOST, 1500),
    Floor("slow-mix-c46", "sleep-4", P999, AT_MOST, 5000),
    Floor("slow-mix-c46", "sleep-4", RATE, AT_LEAST, 0.9, ("sleep-0",)),
    Floor("all-asleep-1000", "sleep-8", CPU_SHARE, BELOW, 0.03),
    Floor("all-asleep-1000", "sleep-8", SERVED, AT_LEAST, 1000),
    Floor("idle-c10000", "tstpool", CPU_SHARE, BELOW, 0.003),
    Floor("idle-c10000", "tstpool", MEMORY, AT_MOST, 700),
    Floor("broadcast-64B-c5000", "broadcast-tstpool", RATE, AT_LEAST, 1.5, ("broadcast-uvloop",)),
    Floor("echo-64B-c50", "tstpool", STATISTICS, AT_MOST, 0.03),
    Floor("echo-64B-c50", "tstpool-nogil", STATISTICS, AT_MOST, 0.03),
)


@dataclass(frozen=True)
class Finding:
    floor: Floor
    against: str = ""  # which of those it may be
    measured: tuple[float, ...] = ()  # median, lowest, highest; one figure if it is of all rounds together
    missing: str = ""  # why there is none

    @property
    def met(self) -> bool:
        return bool(self.measured) and self.floor.met_by(self.measured[0])


def findings(document: Document) -> list[Finding]:
    """One for each floor, also for those that the run says nothing about."""
    return [_finding(floor, document) for floor in FLOORS]


def _finding(floor: Floor, document: Document) -> Finding:
    if why := _missing(floor, document):
        return Finding(floor, missing=why)
    found = {peer: _measured(floor, document, peer) for peer in floor.against or ("",)}
    if not all(found.values()):
        return Finding(floor, missing="no round in which both were measured")
    hardest = (min if floor.comparison == AT_LEAST else max)(found, key=lambda peer: found[peer][0])
    return Finding(floor, hardest, found[hardest])


def _missing(floor: Floor, document: Document) -> str:
    """Why nothing can be said; empty if something can."""
    if floor.gil and "free-threaded" in document["machine"]["python"]:
        return "meant for a Python with a GIL"
    rows = document["summary"].get(floor.workload, {})
    for peer in (floor.peer, *floor.against):
        if why := document["skipped"].get(peer):
            return f"{BY_NAME[peer].title}: {why}"
        if peer not in rows:
            return f"{BY_NAME[peer].title}: not measured"
        if not rows[peer]["rounds"]:
            return f"{BY_NAME[peer].title}: {rows[peer]['errors'][0]}"
    if floor.quantity is STATISTICS and (why := counting.missing(document)):
        return why
    if floor.quantity is OWN_CODE and not all(_own_code(floor, document, p) for p in (floor.peer, *floor.against)):
        return "too short for the kernel's accounts"
    return ""


def _measured(floor: Floor, document: Document, against: str) -> tuple[float, ...]:
    """The figure, or its ratio to that of `against`."""
    if floor.quantity is STATISTICS:
        return (counting.share(document, floor.workload, floor.peer),)
    if floor.quantity is OWN_CODE:
        return (_own_code(floor, document, floor.peer) / _own_code(floor, document, against),)
    mine = select(document["samples"], floor.workload, floor.peer)
    key, sub = floor.quantity.key, floor.quantity.sub
    if floor.paired and (measured := paired(document, floor.workload, floor.peer, against, key, sub)):
        return measured
    if not against:
        return tuple(spread(value(sample, key, sub) for sample in mine.values()))
    return tuple(ratio(mine, select(document["samples"], floor.workload, against), key, sub) or ())


def _own_code(floor: Floor, document: Document, peer: str) -> Any:
    return split_us(select(document["samples"], floor.workload, peer).values())[OWN_CODE.key]
