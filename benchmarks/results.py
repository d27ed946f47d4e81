"""From samples to figures. results.json holds both, so that a report can be made again, or made better, later.

A ratio is taken within one round: the peer's figure over the reference's, a few seconds apart, so a machine that was
slower in one round than in the next cancels out. The figure is the median of the rounds' ratios; the spread is the
lowest and the highest of them. Percentiles of latencies are medians over the rounds too; the longest latency is the
longest of all rounds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from . import workloads
from .machine import QUIET
from .peers import REFERENCE

Sample = dict[str, Any]  # what the generator printed, and: workload, peer, round, others, steal; or: error
Figures = dict[str, Any]
LEAST_STARTS = 6  # with fewer no bounds hold 95 times of 100, the lowest and the highest neither


def select(samples: Iterable[Sample], workload: str, peer: str) -> dict[int, Sample]:
    """The good samples of one peer, by round."""
    return {s["round"]: s for s in samples if (s["workload"], s["peer"]) == (workload, peer) and "error" not in s}


def reference_of(workload: str) -> str:
    return workloads.BY_NAME[workload].reference if workload in workloads.BY_NAME else REFERENCE


def spread(values: Iterable[float]) -> list[float]:
    """[median, lowest, highest]"""
    values = list(values)
    return [round(x, 4) for x in (median(values), min(values), max(values))]


def value(sample: Sample, key: str, sub: str = "") -> float:
    return float(sample[key][sub] if sub else sample[key])


def ratio(mine: dict[int, Sample], reference: dict[int, Sample], key: str, sub: str = "") -> list[float] | None:
    """The spread of the rounds that both have."""
    rounds = [value(mine[r], key, sub) / value(reference[r], key, sub) for r in mine if r in reference]
    return spread(rounds) if rounds else None


Interval = tuple[float, float, float]  # what was found, and the bounds of what it may be


def _between(values: list[float], reach: float) -> Interval:
    """The median, and the values that stand `reach` places before and after it. 0 and infinity: there are too few."""
    ordered = sorted(values)
    low = math.floor((len(ordered) - 1) / 2 - reach)
    return (median(ordered), ordered[low], ordered[-1 - low]) if low >= 0 else (median(ordered), 0.0, math.inf)


def interval(values: list[float]) -> Interval:
    """The median, and those of the values between which that of ever more of them would lie, 95 times of 100: by the
    binomial law, whose normal approximation never promises too much here. The values must be independent."""
    return _between(values, 1.96 * math.sqrt(len(values)) / 2)


def change(now: list[float], then: list[float]) -> Interval:
    """How many times as large the values are now: the median of all quotients, and the bounds between which that of
    ever more values would lie, 99 times of 100. They are those of the rank-sum test."""
    quotients = [a / b for a in now for b in then]
    return _between(quotients, 2.576 * math.sqrt(len(quotients) * (len(now) + len(then) + 1) / 12))


def by_start(document: dict[str, Any], workload: str, mine: str, other: str, name: str) -> list[float]:
    """The ratios that pairs.py has measured: for each start of the servers the median of its rounds, as these are not
    independent. (Older documents do not say which rounds belong together: there each counts for itself.) A round in
    which the turn of one of the two failed or was disturbed does not count."""
    lines = {line["peer"]: line for line in document.get("pairs", ()) if line["workload"] == workload}
    if mine not in lines or other not in lines:
        return []
    found: dict[int, list[float]] = {}
    both = zip(_quiet_turns(lines[mine], name), _quiet_turns(lines[other], name), strict=False)
    for number, (a, b) in enumerate(both):
        if a and b:
            found.setdefault(number // lines[mine].get("rounds_per_start", 1), []).append(a / b)
    return [median(rounds) for rounds in found.values()]


def _quiet_turns(line: dict[str, Any], name: str) -> list[float | None]:
    """The figure of each round; None where the turn failed, or something else used the machine meanwhile."""
    unknown = [0.0] * len(line[name])  # in older documents
    turns = zip(line[name], line.get("others", unknown), line.get("steal", unknown), strict=True)
    return [
        figure if figure is not None and is_quiet({"others": others, "steal": steal}) else None
        for figure, others, steal in turns
    ]


def paired(
    document: dict[str, Any], workload: str, mine: str, other: str, key: str, sub: str = ""
) -> tuple[float, ...]:
    """The ratio that pairs.py has measured, with its interval; empty if it was measured in too few starts."""
    starts = by_start(document, workload, mine, other, f"{key}.{sub}" if sub else key)
    return interval(starts) if len(starts) >= LEAST_STARTS else ()


def pair_rounds(document: dict[str, Any]) -> tuple[int, int]:
    """How many rounds pairs.py took (0: the document has none), and how many of them for each start of the servers (1
    in older documents, which do not say)."""
    lines = document.get("pairs", ())
    rounds = max((len(line["messages_per_s"]) for line in lines), default=0)
    return rounds, max((line.get("rounds_per_start", 1) for line in lines), default=1)


def turns(document: dict[str, Any]) -> list[Sample]:
    """How much others took during each turn of pairs.py that did not fail; none in older documents."""
    return [
        {"others": others, "steal": steal}
        for line in document.get("pairs", ())
        for others, steal in zip(line.get("others", ()), line.get("steal", ()), strict=True)
        if others is not None
    ]


def side_by_side(document: dict[str, Any], workload: str, peer: str, figures: Figures) -> Figures:
    """The figures with rate and ratio as pairs.py has measured them, if it has."""
    ratio_there = paired(document, workload, peer, reference_of(workload), "messages_per_s")
    if not ratio_there:
        return figures
    lines = [line for line in document["pairs"] if (line["workload"], line["peer"]) == (workload, peer)]
    rate = median(rate for rate in _quiet_turns(lines[0], "messages_per_s") if rate)
    return figures | {"rate_ratio": list(ratio_there), "messages_per_s": rate}


def split_us(samples: Iterable[Sample]) -> dict[str, float | None]:
    """CPU per message in user mode and in the kernel. Over all rounds together: the split, the kernel's own, is too
    coarse for one."""
    samples = list(samples)
    user, system = (sum(s["server"][key] for s in samples) for key in ("user_ticks", "system_ticks"))
    each = sum(s["server"]["cpu_s"] for s in samples) * 1e6 / sum(s["messages"] for s in samples)
    return {
        f"{mode}_us_per_message": round(each * ticks / (user + system), 4) if user + system else None
        for mode, ticks in (("user", user), ("kernel", system))
    }


def _figures(samples: list[Sample], workload: str, peer: str) -> Figures:
    mine = select(samples, workload, peer)
    errors = [s["error"] for s in samples if (s["workload"], s["peer"]) == (workload, peer) and "error" in s]
    if not mine:
        return {"rounds": 0, "errors": errors}
    good = list(mine.values())
    figures = {"rounds": len(good), "errors": errors, "disturbed": disturbed(good)}
    if "values" in good[0]:
        return figures | {"values": {key: spread(s["values"][key] for s in good) for key in good[0]["values"]}}
    return figures | _traffic(mine, select(samples, workload, reference_of(workload)))


def _traffic(mine: dict[int, Sample], reference: dict[int, Sample]) -> Figures:
    good = list(mine.values())
    latencies = {key: [s["latency_us"][key] for s in good] for key in good[0]["latency_us"]}
    return {
        "messages_per_s": round(median(s["messages_per_s"] for s in good)),
        "rate_ratio": ratio(mine, reference, "messages_per_s"),
        "latency_us": {key: round((max if key == "max" else median)(x), 1) for key, x in latencies.items()},
        "p99_ratio": ratio(mine, reference, "latency_us", "p99"),
        "cpu_us_per_message": round(median(s["server"]["cpu_us_per_message"] for s in good), 4),
        **split_us(good),
        "cpu_ratio": ratio(mine, reference, "server", "cpu_us_per_message"),
        "server_busy": round(median(s["server"]["busy"] for s in good), 3),
        "generator_busy": round(median(s["generator"]["busy"] for s in good), 3),
    }


def summarise(samples: list[Sample]) -> dict[str, dict[str, Figures]]:
    """workload -> peer -> figures, in the order of the first round."""
    names = dict.fromkeys((s["workload"], s["peer"]) for s in samples)
    summary: dict[str, dict[str, Figures]] = {}
    for workload, peer in names:
        summary.setdefault(workload, {})[peer] = _figures(samples, workload, peer)
    return summary


def is_quiet(sample: Sample) -> bool:
    """Nothing else used the machine meanwhile, be it here or, of a virtual machine's host, another guest."""
    return bool(max(sample.get("others", 0), sample.get("steal", 0)) <= QUIET)


def disturbed(samples: list[Sample]) -> int:
    """How many samples were taken while others used the machine."""
    return sum(not is_quiet(sample) for sample in samples)


def trustworthy(samples: list[Sample]) -> bool:
    """Few enough disturbed samples for medians to have dropped them."""
    return disturbed(samples) * 5 <= len(samples)


def save(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    long = [key for key in ("pairs", "samples") if key in document]
    text = json.dumps(document | {key: f"@{key}" for key in long}, indent=1)
    for key in long:
        lines = ",\n  ".join(json.dumps(line) for line in document[key])  # a line each: diffs can be read
        text = text.replace(f'"@{key}"', f"[\n  {lines}\n ]")
    path.write_text(text + "\n")


def load(path: Path) -> dict[str, Any]:
    """With a summary made anew: that in the file may be of an older kind."""
    document: dict[str, Any] = json.loads(path.read_text())
    return document | {"summary": summarise(document["samples"])}
