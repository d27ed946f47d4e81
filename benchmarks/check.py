"""Has tstpool become slower? ``python -m benchmarks.check`` runs the cases of test_benchmarks.py and compares.

What is compared is not time but speed relative to the C loop, which has run the same case a few seconds before, so that
a machine that is slower today does not matter. Each pass gives one ratio per case. A case has become slower when even
its best pass lies more than the tolerance below the baseline's median.

The baseline is benchmarks/baseline.json; ``--store`` measures and writes it. Ratios depend on the machine and on the
Python as well: the baseline says what it was made with, and a difference is pointed out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from .build import BUILD
from .machine import QUIET, describe, one_line, wait_until_quiet
from .peers import REFERENCE, REPOSITORY

BASELINE = Path(__file__).parent / "baseline.json"
SLOWER, NO_BASELINE = 1, 2

Ratios = dict[str, list[float]]  # "workload, peer" -> speed relative to the C loop, one for each pass


def run_cases(passes: int) -> list[Path]:
    """Runs the cases; gives the files that pytest-benchmark wrote."""
    where = BUILD / "check"
    where.mkdir(parents=True, exist_ok=True)
    files = [where / f"pass-{number + 1}.json" for number in range(passes)]
    for file in files:
        print(f"{file.stem} of {passes} ...", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "--benchmark-disable-gc", f"--benchmark-json={file}"]
        done = subprocess.run([*command, "benchmarks"], cwd=REPOSITORY, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{done.stdout}\nThe cases failed, so there is nothing to compare.")
    return files


def ratios(files: list[Path]) -> Ratios:
    """How many times as fast as the C loop: the peer's rate over its, within each pass."""
    found: Ratios = {}
    for file in files:
        rates: dict[str, dict[str, float]] = {}
        for case in json.loads(file.read_text())["benchmarks"]:
            rates.setdefault(case["group"], {})[case["name"]] = median(case["extra_info"]["messages_per_s"])
        for workload, by_peer in rates.items():
            for peer, rate in by_peer.items():
                if peer != REFERENCE:
                    found.setdefault(f"{workload}, {peer}", []).append(rate / by_peer[REFERENCE])
    return found


def compare(now: Ratios, then: Ratios, tolerance: float) -> bool:
    """Prints a line for each case; True if nothing has become slower."""
    good = True
    print(f"{'speed relative to the C loop':45} {'baseline':>9} {'now':>6} {'change':>8}")
    for case in dict.fromkeys([*then, *now]):
        if case not in now:
            good = False
            print(f"{case:45} {median(then[case]):9.2f} {'-':>6} {'':8}  NOT MEASURED")
        elif case not in then:
            print(f"{case:45} {'-':>9} {median(now[case]):6.2f} {'':8}  new, not in the baseline")
        else:
            before, after = median(then[case]), median(now[case])
            slower = max(now[case]) < before * (1 - tolerance)
            good = good and not slower
            print(f"{case:45} {before:9.2f} {after:6.2f} {after / before - 1:+8.0%}{'  SLOWER' if slower else ''}")
    return good


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check", description=__doc__.partition("?")[0] + "?")
    parser.add_argument("--store", action="store_true", help="write the baseline instead of comparing with it")
    parser.add_argument("--passes", type=int, default=5, help="over all cases; default 5")
    parser.add_argument("--tolerance", type=float, default=0.1, help="of the ratio; default 0.1")
    parser.add_argument("--baseline", type=Path, default=BASELINE, metavar="JSON")
    parser.add_argument("--measured", type=Path, nargs="+", metavar="JSON", help="compare these instead of measuring")
    options = parser.parse_args()
    if options.passes < 1 or not 0 <= options.tolerance < 1:
        parser.error("--passes must be 1 or more, --tolerance from 0 to below 1")
    return options


def main() -> int:
    options = arguments()
    if not options.store and not options.baseline.exists():
        print(f"There is no baseline ({options.baseline}), so nothing was measured and nothing was compared.")
        print("Make one from a version whose speed is right: make bench-check ARGS=--store")
        return NO_BASELINE
    if not options.measured and (busy := wait_until_quiet(10.0)) > QUIET:
        print(f"! {busy:.0%} of the machine is busy with something else: do not believe what follows")
    now = ratios(options.measured or run_cases(options.passes))
    machine = describe()
    if options.store:
        text = json.dumps(
            {"machine": machine, "ratios": {k: [round(x, 4) for x in v] for k, v in now.items()}}, indent=1
        )
        options.baseline.write_text(text + "\n")
        print(f"Written: {options.baseline}")
        return 0
    then: dict[str, Any] = json.loads(options.baseline.read_text())
    good = compare(now, then["ratios"], options.tolerance)
    print(f"baseline: commit {then['machine']['commit']}, {then['machine']['date']}; {one_line(then['machine'])}")
    if one_line(machine) != one_line(then["machine"]):
        print(f"! this is another machine or Python: {one_line(machine)}")
    print("Nothing has become slower." if good else "Something has become slower, or was not measured.")
    return 0 if good else SLOWER


if __name__ == "__main__":
    sys.exit(main())
