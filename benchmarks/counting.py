"""What the engine's statistics cost a message: its own functions for them, compiled alone (_counting.pyx) and timed.

The engine cannot be built without them to be compared with, and 1 % of a message is less than two builds differ by
chance. So this is an upper bound: each message is received alone and is a job of its own, whereas quick handlers are
timed in groups and messages that come together are counted at once; and both readings of the clock are held against
the statistics, although others need them, too.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from subprocess import CalledProcessError
from typing import Any

from .build import extension
from .workloads import BY_NAME as WORKLOADS

HERE = Path(__file__).parent
PEERS = ("tstpool", "tstpool-nogil")
MESSAGES, PASSES = 200_000, 15
CLOCK_SOURCE = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")


def measure() -> dict[str, Any]:
    """For the document; or why there is nothing."""
    try:
        module = extension("_counting", HERE)
    except (ImportError, CalledProcessError) as error:
        return {"missing": str(error)}
    ticks = trusts_ticks()
    passes = [module.nanoseconds(MESSAGES, ticks) for _ in range(PASSES)]
    return {"nanoseconds": round(median(passes), 2), "lowest": round(min(passes), 2), "highest": round(max(passes), 2)}


def trusts_ticks() -> bool:
    """As the engine decides it: the kernel takes its time from the processor's counter."""
    try:
        return CLOCK_SOURCE.read_text().strip() in ("tsc", "arch_sys_counter")
    except OSError:
        return False


def missing(document: dict[str, Any]) -> str:
    found = document.get("statistics", {"missing": "statistics: not measured"})
    return str(found.get("missing", ""))


def is_worst_case(workload: str) -> bool:
    """Messages that come alone, and cost nothing else that is worth mentioning."""
    known = WORKLOADS.get(workload)
    return bool(known and known.driver == "loadgen" and known.depth == 1 and known.size == 64)


def share(document: dict[str, Any], workload: str, peer: str) -> float:
    """Of the CPU time that a message took there."""
    each = document["summary"][workload][peer]["cpu_us_per_message"]
    return float(document["statistics"]["nanoseconds"]) / 1000 / float(each)
