"""``python -m benchmarks``: measures tstpool beside what people would take instead, and reports. See --help."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
except ImportError:
    sys.exit(
        "The benchmarks need rich, matplotlib and uvloop: pip install 'tstpool[bench]' (or: pip install -e '.[bench]')"
    )

from . import calls, counting, network, pairs, peers, report, results, workloads
from .build import BUILD, SOURCES, program
from .machine import QUIET, describe, wait_until_quiet
from .measure import Failure, choose_cores, measure
from .peers import FREE_THREADED_VARIABLE, Peer
from .workloads import Workload

HERE = Path(__file__).parent
LONGEST = 600.0  # seconds: what the generators take
CALLS_SECONDS = 2.0  # for each server whose system calls are counted


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__.partition(" See")[0],
        epilog=f"{FREE_THREADED_VARIABLE}=PYTHON names an interpreter without a GIL that has tstpool, too: for servers "
        "that show what two shards of Python code are worth.",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="set", action="store_const", const="quick", help="two workloads: a minute")
    size.add_argument(
        "--full", dest="set", action="store_const", const="full", help="everything: an hour and a quarter"
    )
    size.add_argument(
        "--floors",
        dest="set",
        action="store_const",
        const="floors",
        help="what floors.py is about, and every server at 64 B: half an hour; what --write-results measures",
    )
    known = f"peers: {', '.join(peers.BY_NAME)}; workloads: {', '.join(workloads.BY_NAME)}"
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[], help=f"these peers, these workloads ({known})")
    parser.add_argument("--rounds", type=int, help="default 5 (--quick: 3)")
    parser.add_argument("--seconds", type=float, help="per measurement, default 0.7 (--full: 2)")
    parser.add_argument("--warm-up", type=float, default=0.3, metavar="SECONDS", help="not counted, default 0.3")
    parser.add_argument(
        "--patience", type=float, default=10.0, metavar="SECONDS", help="with a busy machine, before it begins anyway"
    )
    parser.add_argument(
        "--cores", choices=("split", "shared"), default="split", help="split: one for the server, one for the generator"
    )
    parser.add_argument(
        "--limits",
        action="store_true",
        help="system calls by name, too (needs strace), and what statistics cost; --floors and --full have this anyway",
    )
    parser.add_argument(
        "--pairs",
        action="store_true",
        help="what floors compare in many short turns, too; --floors and --full have this anyway, but not with --only",
    )
    parser.add_argument("--report", type=Path, metavar="JSON", help="measure nothing, report these results")
    parser.add_argument("--write-results", action="store_true", help="write into benchmarks/ instead: to be committed")
    parser.add_argument(
        "--output",
        type=Path,
        default=BUILD,
        metavar="DIRECTORY",
        help="for RESULTS.md, results.json and results.png; default benchmarks/build",
    )
    parser.add_argument("--force", action="store_true", help="--write-results even if the machine was not quiet")
    options = parser.parse_args()
    options.set = options.set or ("floors" if options.write_results else "default")
    options.limits = options.limits or options.set in ("floors", "full")
    options.pairs = options.pairs or (options.set in ("floors", "full") and not options.only)
    if options.rounds is None:
        options.rounds = 3 if options.set == "quick" else 5
    if options.seconds is None:
        options.seconds = 2.0 if options.set == "full" else 0.7
    for name in options.only:
        if name not in peers.BY_NAME and name not in workloads.BY_NAME:
            parser.error(f"no peer or workload is called {name!r} ({known})")
    if options.rounds < 1 or not 0 < options.seconds <= LONGEST or not 0 <= options.warm_up <= 60:
        parser.error("--rounds must be 1 or more, --seconds above 0 and at most 600, --warm-up from 0 to 60")
    return options


Plan = list[tuple[Workload, list[Peer]]]


def selection(options: argparse.Namespace) -> Plan:
    """What to measure: the chosen set, or what was named. The one that ratios are taken to is always there."""
    named = set(options.only)
    by_workload = not named.isdisjoint(workloads.BY_NAME)
    by_peer = not named.isdisjoint(peers.BY_NAME)
    plan = []
    for workload in workloads.WORKLOADS:
        if workload.name not in named if by_workload else options.set not in workload.sets:
            continue
        able = workload.able()
        if by_peer:
            chosen = [peer for peer in able if peer.name in named]
        elif by_workload or workload.peers:
            chosen = able
        else:
            chosen = [peer for peer in able if options.set in peer.sets]
        reference = peers.BY_NAME[workload.reference]
        if chosen:
            plan.append((workload, chosen if reference in chosen or workload.columns else [reference, *chosen]))
    return plan


def schedule(plan: Plan, rounds: int) -> Iterator[tuple[Workload, int, Peer]]:
    """Peers take turns, in each round in another order, the same in each run: nobody always follows the same
    neighbour's heat."""
    for workload, chosen in plan:
        for number in range(rounds):
            for peer in random.Random(number).sample(chosen, len(chosen)):
                yield workload, number, peer


def minutes(plan: list[tuple[Workload, int, Peer]], options: argparse.Namespace) -> float:
    """What the measurements will take: half a second goes into starting a server."""
    seconds: float = sum(options.seconds * workload.longer + options.warm_up + 0.5 for workload, _, _ in plan)
    return seconds / 60


def leave_out(plan: Plan, console: Console) -> tuple[Plan, dict[str, str]]:
    """The plan without the peers that cannot run here, and why they can't."""
    everybody = dict.fromkeys(peer for _, chosen in plan for peer in chosen)
    skipped = {peer.name: why for peer in everybody if (why := peer.missing())}
    for name, why in skipped.items():
        console.print(f"! {peers.BY_NAME[name].title} ({name}) is left out: {why}", style="yellow", markup=False)
    remaining = [(workload, [p for p in chosen if p.name not in skipped]) for workload, chosen in plan]
    return [(workload, chosen) for workload, chosen in remaining if chosen], skipped


def look_at_limits(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """What disturbs, or needs no quiet machine. First of all: should it fail, nothing else is lost with it."""
    console.print("Counting system calls, and what counting itself takes: a minute.")
    counted = calls.measure(min(3 * options.seconds, CALLS_SECONDS), calls.selection())
    return {"calls": counted, "statistics": counting.measure()}


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    where = network.enter()
    chosen, skipped = leave_out(selection(options), console)
    for workload, _ in chosen:  # compiled before the clock runs
        if (SOURCES / f"{workload.driver}.c").exists():
            program(workload.driver)
    limits = look_at_limits(options, console) if options.limits else {}
    plan = list(schedule(chosen, options.rounds))
    console.print(f"{len(plan)} measurements, about {minutes(plan, options):.1f} minutes.")
    if (busy := wait_until_quiet(options.patience)) > QUIET:
        console.print(
            f"! {busy:.0%} of the machine is busy with something else: do not believe these figures", style="yellow"
        )
    server, generator = choose_cores(options.cores)
    if options.cores == "split" and server == generator:
        console.print("! there is only one core: server and generator share it", style="yellow")
    samples = list(take(plan, options, console))
    side_by_side: dict[str, Any] = {}
    if options.pairs:
        console.print("What floors and the chart compare, once more in short turns side by side: eleven minutes.")
        side_by_side = pairs.measure(skipped, options.cores, lambda title: console.print(f"  {title}", style="dim"))
    settings = {key: getattr(options, key) for key in ("rounds", "seconds", "warm_up", "cores")} | {"network": where}
    return {
        "machine": describe(),
        "settings": settings,
        "skipped": skipped,
        "summary": results.summarise(samples),
        **limits,
        **side_by_side,
        "samples": samples,
    }


def take(
    plan: list[tuple[Workload, int, Peer]], options: argparse.Namespace, console: Console
) -> Iterator[dict[str, Any]]:
    """The samples, with progress shown. A server that fails is a sample with an error, and the others go on."""
    columns = (MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    # One refresh a second: the runner shares a core with the generator.
    with Progress(*columns, console=console, refresh_per_second=1, transient=True) as progress:
        task = progress.add_task("", total=len(plan))
        for workload, number, peer in plan:
            progress.update(task, description=f"{workload.title}: {peer.title}")
            sample: dict[str, Any] = {"workload": workload.name, "peer": peer.name, "round": number}
            seconds = min(options.seconds * workload.longer, LONGEST)
            try:
                sample |= measure(peer, workload, seconds, options.warm_up, options.cores)
            except Failure as failure:
                sample["error"] = str(failure)
                console.print(
                    f"! {workload.title}, {peer.title}, round {number + 1}: {failure}", style="red", markup=False
                )
            yield sample
            progress.advance(task)


def main() -> int:
    options = arguments()
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    document = results.load(options.report) if options.report else run(options, console)
    quiet = results.trustworthy(document["samples"]) and results.trustworthy(results.turns(document))
    publish = options.write_results and (options.force or quiet)
    output = HERE if publish else options.output
    table, figures, chart = output / "RESULTS.md", output / "results.json", output / "results.png"
    results.save(figures, document)  # first of all: whatever goes wrong below, the figures are kept
    report.show(document, console)
    drawn = report.draw(document, chart)
    report.write_markdown(document, table, chart if drawn else None)
    if not drawn:
        console.print(
            "! no chart: matplotlib is not installed, or no workload of the chart was measured", style="yellow"
        )
    written = [table, figures, *([chart] if drawn else [])]
    console.print("Written: " + ", ".join(map(str, written)), soft_wrap=True, highlight=False)
    if options.write_results and not publish:
        console.print("! benchmarks/RESULTS.md was not written: the machine was not quiet (--force)", style="red")
        return 1
    return 1 if document.get("pair_errors") or any("error" in sample for sample in document["samples"]) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
