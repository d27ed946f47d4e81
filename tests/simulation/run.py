"""Runs seeds of the simulation (README.md).

python tests/simulation/run.py [--seeds 0:20000]     every seed of the range; exits with 1 when one fails
python tests/simulation/run.py --seed 7 --trace      replays one, with every call and event on standard error
"""

from __future__ import annotations

import argparse
import collections
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import _simulation

FAILURES_SHOWN = 20


def main() -> int | bool:
    parser = argparse.ArgumentParser(description="Runs seeds of the simulation.")
    parser.add_argument("--seeds", default="0:20000", metavar="A:B", help="from A up to, not including, B")
    parser.add_argument("--seed", type=int, help="this one only")
    parser.add_argument("--first", action="store_true", help="stop at the first that fails")
    parser.add_argument("--trace", action="store_true", help="print what happens")
    options = parser.parse_args()
    if options.seed is not None:
        failure, trace, switches = _simulation.run(options.seed, options.trace)
        print(f"seed {options.seed}: {failure or 'holds'} ({switches} switches, trace {trace:016x})")
        return failure is not None
    begin, end = map(int, options.seeds.split(":"))
    began = time.monotonic()
    kinds: dict[str, list[int]] = collections.defaultdict(list)
    for seed in range(begin, end):
        failure = _simulation.run(seed)[0]
        if failure is not None:
            if options.first:
                print(f"seed {seed}: {failure}")
                return True
            kinds[re.sub(r"\d+", "N", failure)].append(seed)
    for failure, seeds in sorted(kinds.items(), key=lambda kind: -len(kind[1])):
        print(f"{len(seeds)} x {failure}: {' '.join(map(str, seeds[:FAILURES_SHOWN]))}")
    print(f"{end - begin} seeds, {sum(map(len, kinds.values()))} failed, {time.monotonic() - began:.1f} s")
    return bool(kinds)


if __name__ == "__main__":
    sys.exit(main())
