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
LEAST_PAIRS = 10


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


def interval(values: list[float]) -> tuple[float, float, float]:
    """The median, and those of the values between which that of ever more of them would lie, 95 times of 100 (the
    binomial law, whose normal approximation does from ten values on)."""
    ordered, n = sorted(values), len(values)
    reach = 1.96 * math.sqrt(n) / 2
    low, high = max(0, math.floor(n / 2 - reach)), min(n - 1, math.ceil(n / 2 + reach))
    return median(ordered), ordered[low], ordered[high]


def paired(
    document: dict[str, Any], workload: str, mine: str, other: str, key: str, sub: str = ""
) -> tuple[float, ...]:
    """The ratio that pairs.py has measured, with its interval; empty if it has too few rounds of it."""
    name = f"{key}.{sub}" if sub else key
    lines = {line["peer"]: line[name] for line in document.get("pairs", ()) if line["workload"] == workload}
    rounds = [a / b for a, b in zip(lines.get(mine, ()), lines.get(other, ()), strict=False) if a and b]
    return interval(rounds) if len(rounds) >= LEAST_PAIRS else ()


def pair_rounds(document: dict[str, Any]) -> int:
    """How many rounds pairs.py took; 0: the document has none."""
    return max((len(line["messages_per_s"]) for line in document.get("pairs", ())), default=0)


def side_by_side(document: dict[str, Any], workload: str, peer: str, figures: Figures) -> Figures:
    """The figures with rate and ratio as pairs.py has measured them, if it has."""
    ratio_there = paired(document, workload, peer, reference_of(workload), "messages_per_s")
    if not ratio_there:
        return figures
    lines = [line for line in document["pairs"] if (line["workload"], line["peer"]) == (workload, peer)]
    rate = median(rate for rate in lines[0]["messages_per_s"] if rate)
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
    figures = {"rounds": len(good), "errors": errors, "disturbed": sum(s["others"] > QUIET for s in good)}
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


def disturbed(samples: list[Sample]) -> int:
    """How many samples were taken while others used the machine."""
    return sum(s.get("others", 0) > QUIET for s in samples)


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
