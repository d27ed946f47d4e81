"""Checks the models of the hand-over with spin: that they hold, and that they can fail.

    python tests/model/run.py [--full] [NAME ...]        needs spin and a C compiler; is twice as fast with tcc

Each of MODELS is searched exhaustively and must be without an error. Each fault (`BUG_` in the models) must be found in
the run that FAULTS gives. --full searches larger ones too: 10 minutes and 6 GB. Exits with 1 when one is not as it
must be.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SECONDS = 300  # for one search; the longest takes 10 s, with --full 120 s

MODELS = [
    "connection LEVEL OPS=1",
    "connection LEVEL OPS=1 ROOM=2 FLUSH_ROUNDS=2",
    "connection LEVEL NEW",
    "connection LEVEL FOREVER",
    "connection ONESHOT OPS=1",
    "connection ONESHOT NEW",
    "connection ONESHOT FOREVER",
    "connection EDGE OPS=1",
    "connection EDGE NEW",
    "connection EDGE FOREVER",
    "handover WORKERS=2",
    "handover WORKERS=3 EVENTS=2",
    "handover WORKERS=2 COMPILED",
    "park WORKERS=3",
    "park WORKERS=3 IDLE",
    "park WORKERS=3 STOP STUCK=0",
    "park SHARDS=2 WORKERS=2",
    "sleeping",
]
LARGE_MODELS = [
    "connection LEVEL",
    "connection LEVEL ROOM=2 FLUSH_ROUNDS=2",
    "connection ONESHOT",
    "connection EDGE",
    "handover WORKERS=3",
    "park WORKERS=4 IDLE",
    "park SHARDS=2 WORKERS=2 STOP STUCK=0",
]
# Too large to search whole: a random part of it, in which the fault shows at once.
SAMPLED = "park SETTLED SHARDS=3 WORKERS=3 STUCK=2"
FAULTS = {
    "connection": {
        "ACQUIRE_DOES_NOT_LOOK": "LEVEL OPS=1",
        "CONNECT_FORGETS": "LEVEL NEW",
        "EDGE_IS_NOT_REMEMBERED": "EDGE OPS=1",
        "EDGE_OUT_IS_KEPT": "EDGE OPS=1",
        "FINISHED_WITHOUT_CAS": "LEVEL OPS=1",
        "FREE_IN_THE_STACK": "LEVEL OPS=1",
        "FREE_LOOKS_ONCE": "LEVEL OPS=1",
        "GENERATION_READ_AGAIN": "LEVEL OPS=1",
        "MOD_DOES_NOT_LOOK": "EDGE OPS=1",
        "NO_DETACH": "LEVEL OPS=1 FOREVER",
        "NO_SECOND_LOOK_AT_THE_QUEUE": "LEVEL OPS=1",
        "RELEASE_BEFORE_THE_LOCK": "LEVEL OPS=1",
        "RELEASE_IGNORES_PENDING": "LEVEL OPS=1",
        "RELIEF_IS_NOT_TOLD": "LEVEL OPS=1",
        "REQUEST_FORGETS_THE_OWNER": "LEVEL OPS=1 ROOM=2 FLUSH_ROUNDS=2",
        "REQUEST_FORGETS_RELIEF": "LEVEL ROOM=2 FLUSH_ROUNDS=2",
        "SENT_BY_ANOTHER": "LEVEL OPS=1",
        "SILENCE_WITHOUT_A_LOOK": "LEVEL OPS=1",
        "TRUST_ANY_OWNER": "LEVEL OPS=1 FOREVER",
        "USUAL_RELEASE_AFTER_THE_LOCK": "LEVEL OPS=1",
        "TWO_FLUSHERS": "LEVEL OPS=1",
        "WRITABLE_FORGETS_THE_EDGE": "EDGE OPS=1",
    },
    "handover": {
        "BATCH_NOT_COUNTED": "WORKERS=2",
        "EVENTS_NOT_TAKEN": "WORKERS=2 EVENTS=2 COMPILED",
        "FINISHED_WITHOUT_CAS": "WORKERS=2",
        "LEFT_TO_NOBODY": "WORKERS=2 EVENTS=2 COMPILED",
        "NO_LOOK_AFTER_THE_MOVE": "WORKERS=2",
        "PASSED_ON_WHILE_RUNNING": "WORKERS=2 EVENTS=2 COMPILED",
        "RUN_WITHOUT_CAS": "WORKERS=2",
    },
    "park": {
        "IDLE_STANDBY_TAKES_THE_SIGNAL": "WORKERS=4 IDLE EVENTS=1",
        "LOOKER_LEAVES_WITHOUT_A_WORD": SAMPLED.removeprefix("park "),
        "NOBODY_IS_TOLD_TO_WATCH": "WORKERS=3",
        "NO_LOOK_BEFORE_SLEEP": "WORKERS=3",
        "NO_LOOK_ELSEWHERE_BEFORE_SLEEP": "SHARDS=2 WORKERS=2",
        "ONE_CONDITION": "WORKERS=3",
        "WATCHER_NOT_TOLD": "STOP STUCK=0",
    },
    "sleeping": {
        "LOOKS_BEFORE_IT_SAYS_SO": "",
        "LOOKS_BEFORE_THE_PUSH": "",
        "NO_LOOK_BEFORE_SLEEP": "",
        "WAKES_WITHOUT_AN_EXCHANGE": "",
    },
}
# Searched from the other end, where they show sooner: seconds instead of a dozen of them.
BACKWARDS = {
    "EDGE_IS_NOT_REMEMBERED": "-DT_REVERSE",
    "RELEASE_BEFORE_THE_LOCK": "-DREVERSE",
    "REQUEST_FORGETS_RELIEF": "-DREVERSE",
    "WRITABLE_FORGETS_THE_EDGE": "-DT_REVERSE",
}


def search(model: str, fault: str = "") -> tuple[bool, str]:
    """Whether spin finds an error, and its figures."""
    name, *defines = model.split()
    sampled = model == SAMPLED
    if fault:
        defines.append(f"BUG_{fault}")
    large = model in LARGE_MODELS
    # Most are searched before an optimiser is through, or even gcc without one.
    compiler = ["cc", "-O2"] if large else ["tcc"] if shutil.which("tcc") else ["cc", "-O0"]
    flags = ["-DBITSTATE", "-DT_RAND", "-DP_RAND"] if sampled else ["-DCOLLAPSE"] if large else []
    flags += [BACKWARDS[fault]] if fault in BACKWARDS else []
    with tempfile.TemporaryDirectory() as work:
        source = [*(f"-D{define}" for define in defines), str(HERE / f"{name}.pml")]
        subprocess.run(["spin", "-a", *source], cwd=work, check=True, capture_output=True)
        subprocess.run(
            [*compiler, "-w", "-DSAFETY", "-DVECTORSZ=2048", *flags, "-o", "pan", "pan.c"], cwd=work, check=True
        )
        limits = ["-m3000", "-w28", "-RS1"] if sampled else ["-m200000", "-w24"]
        done = subprocess.run(["./pan", *limits], cwd=work, capture_output=True, text=True, timeout=SECONDS)
    errors = re.search(r"errors: (\d+)", done.stdout)
    states = re.search(r"(\d+) states, stored", done.stdout)
    if errors is None or states is None or ("max search depth too small" in done.stdout and not sampled):
        raise RuntimeError(f"{model} {fault}: the search was not exhaustive\n{done.stdout}{done.stderr}")
    return errors[1] != "0", f"{int(states[1]):,} states"


def faults_of(name: str) -> set[str]:
    return set(re.findall(r"BUG_([A-Z_]+)", (HERE / f"{name}.pml").read_text()))


def check_model(model: str) -> bool:
    error, figures = search(model)
    print("ERROR " if error else "holds ", model, "--", figures, flush=True)
    return not error


def check_fault(name: str, fault: str) -> bool:
    found, figures = search(f"{name} {FAULTS[name][fault]}", fault)
    print("found " if found else "MISSED", name, fault, "--", figures, flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="the large ones too")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(FAULTS)} (default: all)")
    arguments = parser.parse_args()
    names = arguments.names or list(FAULTS)
    for name in names:
        if faults_of(name) != set(FAULTS[name]):
            sys.exit(f"{name}.pml has other faults than this file: {faults_of(name) ^ set(FAULTS[name])}")
    models = [model for model in MODELS + LARGE_MODELS * arguments.full if model.split()[0] in names]
    with ThreadPoolExecutor(max_workers=1 if arguments.full else os.cpu_count()) as pool:
        results = [pool.submit(check_model, model) for model in models]
        results += [pool.submit(check_fault, name, fault) for name in names for fault in FAULTS[name]]
        wrong = sum(not result.result() for result in results)
    print(f"{len(results)} searches, {wrong} not as they must be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
