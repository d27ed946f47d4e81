"""Has tstpool become slower? ``python -m benchmarks.check`` measures a few workloads again and compares.

What is compared is not time but speed relative to the C loop, measured as pairs.py does it, in short turns side by side
in another order each round: a machine that is slower today does not matter, and what disturbs one turn does not count.
Each start of the servers gives one ratio for each case, the median of its rounds. The change of a case is the median of
all quotients of a ratio now and one of the baseline; with it stand the bounds between which it lies 99 times of 100
(not 95: there are ten cases). A case has become slower when all between these bounds is a loss, and the change is more
than the tolerance.

The baseline is benchmarks/baseline.json; ``--store`` measures and writes it. Ratios depend on the machine and on the
Python as well: the baseline says what it was made with, and a difference is pointed out.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from . import network, pairs
from .build import BUILD, program
from .machine import QUIET, describe, one_line, wait_until_quiet
from .peers import BY_NAME as PEERS
from .peers import REFERENCE
from .results import LEAST_STARTS, by_start, change, disturbed, turns
from .workloads import BY_NAME as WORKLOADS

RAW = (REFERENCE, "tstpool", "tstpool-nogil")
FRAMED = (REFERENCE, "tstpool-framed", "tstpool-nogil-framed")
CASES = {
    "echo-64B-c1": RAW,
    "echo-64B-c50": RAW,
    "framed-64B-c50-d16": FRAMED,
    "framed-64B-c50-d128": FRAMED,
    "framed-16K-c50": FRAMED,
}
BASELINE = Path(__file__).parent / "baseline.json"
MEASURED = BUILD / "check.json"
SLOWER, NO_BASELINE = 1, 2

Document = dict[str, Any]  # machine, turns: how it was measured, and ratios
Ratios = dict[str, list[float]]  # "workload, peer" -> speed relative to the C loop, one for each start


def measure(starts: int) -> Document:
    """What the baseline holds, too."""
    found: Ratios = {}
    where = network.enter()
    print(f"In {where}.")
    for name, names in CASES.items():
        workload = WORKLOADS[name]
        print(f"{workload.title} ...", flush=True)
        program(workload.driver)  # compiled before the clock runs
        chosen = [PEERS[peer] for peer in names if not PEERS[peer].missing()]
        lines, errors = pairs.take(workload, chosen, "split", starts)
        if errors:
            sys.exit(f"{errors[0]['peer']}: {errors[0]['error']}\nSo there is nothing to compare.")
        taken = turns({"pairs": lines})
        if count := disturbed(taken):
            print(f"! {count} of {len(taken)} turns do not count: something else used the machine")
        for peer in names[1:]:
            ratios = by_start({"pairs": lines}, name, peer, REFERENCE, "messages_per_s")
            found[f"{name}, {peer}"] = [round(ratio, 4) for ratio in ratios]
    how = {"starts": starts, "rounds": pairs.ROUNDS, "seconds": pairs.TURN_SECONDS, "network": where}
    return {"machine": describe(), "turns": how, "ratios": found}


def compare(now: Ratios, then: Ratios, tolerance: float) -> bool:
    """Prints a line for each case; True if all were measured and nothing has become slower."""
    good, unseen = True, tolerance
    print(f"{'speed relative to the C loop':45} {'baseline':>9} {'now':>6} {'change':>8}  between")
    for case in dict.fromkeys([*then, *now]):
        before, after = then.get(case, []), now.get(case, [])
        figures = " ".join(
            f"{median(x):{width}.2f}" if x else f"{'-':>{width}}" for x, width in ((before, 9), (after, 6))
        )
        if len(after) < LEAST_STARTS:
            good = False
            print(f"{case:45} {figures}  NOT MEASURED: {len(after)} quiet starts, {LEAST_STARTS} are needed")
        elif len(before) < LEAST_STARTS:
            print(f"{case:45} {figures}  new, not in the baseline")
        else:
            middle, low, high = (quotient - 1 for quotient in change(after, before))
            slower = high < 0 and middle < -tolerance
            good, unseen = good and not slower, max(unseen, high - middle)
            verdict = "  SLOWER" if slower else ""
            print(f"{case:45} {figures} {middle:+8.1%}  {low:+.1%} to {high:+.1%}{verdict}")
    print(f"Losses of less than {unseen:.0%} would not have been noticed in all of the cases.")
    return good


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.check",
        description=__doc__.partition("?")[0] + "? Says so of a case that has lost more than the tolerance, if the "
        "noise lets that be seen: on the machine of RESULTS.md losses of 5 to 12 per cent are, depending on the case, "
        "and a line at the end says which could be seen in this run. Four minutes.",
    )
    parser.add_argument("--store", action="store_true", help="write the baseline instead of comparing with it")
    parser.add_argument(
        "--starts", type=int, default=pairs.STARTS, help="of the servers; more: smaller changes are seen; default 9"
    )
    parser.add_argument("--tolerance", type=float, default=0.05, help="of the ratio; default 0.05")
    parser.add_argument("--baseline", type=Path, default=BASELINE, metavar="JSON")
    parser.add_argument(
        "--measured", type=Path, metavar="JSON", help=f"take this, say {MEASURED}, instead of measuring"
    )
    options = parser.parse_args()
    if options.starts < LEAST_STARTS or not 0 <= options.tolerance < 1:
        parser.error(f"--starts must be {LEAST_STARTS} or more, --tolerance from 0 to below 1")
    return options


def why_useless(baseline: Path) -> str:
    """Why there is nothing to compare with; empty if there is."""
    if not baseline.exists():
        return f"There is no baseline ({baseline})"
    if "turns" not in json.loads(baseline.read_text()):
        return f"The baseline ({baseline}) is from before servers were measured side by side"
    return ""


def take(options: argparse.Namespace) -> Document:
    if options.measured:
        document: Document = json.loads(options.measured.read_text())
        return document
    if (busy := wait_until_quiet(10.0)) > QUIET:
        print(f"! {busy:.0%} of the machine is busy with something else: do not believe what follows")
    document = measure(options.starts)
    MEASURED.parent.mkdir(exist_ok=True)
    write(document, MEASURED)
    return document


def network_of(document: Document) -> str:
    return str(document["turns"].get("network", network.OUTSIDE))


def write(document: Document, path: Path) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"Written: {path}")


def main() -> int:
    options = arguments()
    if not options.store and (why := why_useless(options.baseline)):
        print(f"{why}, so nothing was measured and nothing was compared.")
        print("Make one from a version whose speed is right, on a quiet machine: make bench-check ARGS=--store")
        return NO_BASELINE
    now = take(options)
    if options.store:
        if few := [case for case, ratios in now["ratios"].items() if len(ratios) < LEAST_STARTS]:
            print(f"Nothing was stored: the machine was not quiet for {LEAST_STARTS} starts of {'; '.join(few)}.")
            return NO_BASELINE
        write(now, options.baseline)
        return 0
    then: Document = json.loads(options.baseline.read_text())
    good = compare(now["ratios"], then["ratios"], options.tolerance)
    print(f"baseline: commit {then['machine']['commit']}, {then['machine']['date']}; {one_line(then['machine'])}")
    if one_line(now["machine"]) != one_line(then["machine"]):
        print(f"! this is another machine or Python: {one_line(now['machine'])}")
    if network_of(now).partition(";")[0] != network_of(then).partition(";")[0]:  # behind it: what it would be else
        print(f"! measured in {network_of(now)}, the baseline in {network_of(then)}")
    print("Nothing is seen to have become slower." if good else "Something has become slower, or was not measured.")
    return 0 if good else SLOWER


if __name__ == "__main__":
    sys.exit(main())
