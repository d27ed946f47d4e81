"""Figures for people: the table on the terminal, the chart, and RESULTS.md. All three from the same results.json."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from . import counting, peers, workloads
from .floors import Finding, findings
from .machine import QUIET, one_line
from .network import OUTSIDE
from .results import Figures, disturbed, pair_rounds, side_by_side, trustworthy, turns

# Heading, and whether a narrow terminal shows it.
COLUMNS = (
    ("server", True),
    ("messages/s", True),
    ("ratio to C", True),
    ("spread", True),
    ("p50 us", False),
    ("p99 us", True),
    ("p99.9 us", False),
    ("max us", False),
    ("CPU us/msg", True),
    ("of it user", False),
    ("busy", False),
)


def _title(peer: str) -> str:
    return peers.BY_NAME[peer].title if peer in peers.BY_NAME else peer


def _workload_title(name: str) -> str:
    return workloads.BY_NAME[name].title if name in workloads.BY_NAME else name


def _columns(workload: str) -> tuple[tuple[str, bool], ...]:
    """Headings, and whether a narrow terminal shows them."""
    known = workloads.BY_NAME.get(workload)
    if known and known.columns:
        return (COLUMNS[0], *((column.heading, True) for column in known.columns))
    ratio_to = "ratio" if known and known.reference != peers.REFERENCE else "ratio to C"
    return tuple((ratio_to if heading == "ratio to C" else heading, always) for heading, always in COLUMNS)


def _row(workload: str, peer: str, figures: Figures) -> list[str]:
    if not figures["rounds"]:
        return [_title(peer), "failed"] + [""] * (len(_columns(workload)) - 2)
    if "values" in figures:
        columns = workloads.BY_NAME[workload].columns
        return [_title(peer), *(column.format.format(figures["values"][column.key][0]) for column in columns)]
    latency, ratio = figures["latency_us"], figures["rate_ratio"]
    user = figures["user_us_per_message"]
    return [
        _title(peer),
        f"{figures['messages_per_s']:,}",
        f"{ratio[0]:.2f}" if ratio else "",
        f"{ratio[1]:.2f}-{ratio[2]:.2f}" if ratio else "",
        *(f"{latency[key]:,.0f}" for key in ("p50", "p99", "p999", "max")),
        f"{figures['cpu_us_per_message']:.2f}",
        f"{user:.2f}" if user is not None else "",
        f"{figures['server_busy']:.0%}",
    ]


def _speed(figures: Figures) -> tuple[float, float]:
    """What rows and bars are sorted by. Ratios are taken within a round: rates beside each other may say otherwise, but
    mix in how fast the machine was at the time."""
    ratio = figures.get("rate_ratio")
    return (ratio[0] if ratio else 0.0, figures.get("messages_per_s", 0.0))


def _fastest_first(rows: dict[str, Figures]) -> list[tuple[str, Figures]]:
    known = list(peers.BY_NAME)
    in_order = sorted(rows.items(), key=lambda row: known.index(row[0]) if row[0] in known else len(known))
    return sorted(in_order, key=lambda row: _speed(row[1]), reverse=True)


def warnings(document: dict[str, Any]) -> list[str]:
    """What a reader must know before believing the figures."""
    samples = document["samples"]
    found = _disturbances(samples, "measurements", "few enough for the medians to have dropped them.")
    found += _disturbances(turns(document), "turns side by side", "they do not count.")
    steal = sum(s.get("steal", 0) for s in samples) / max(len(samples), 1)
    if steal > 0.02:
        found.append(f"The hypervisor withheld {steal:.0%} of the machine's time on average.")
    found += [f"{_title(peer)} was not measured: {why}" for peer, why in document["skipped"].items()]
    for workload, rows in document["summary"].items():
        for peer, figures in rows.items():
            if figures["errors"]:
                all_rounds = figures["rounds"] + len(figures["errors"])
                failed = f"{len(figures['errors'])} of {all_rounds} rounds failed: {figures['errors'][0]}"
                found.append(f"{_title(peer)}, {_workload_title(workload)}: {failed}")
    return found + _failed_turns(document)


def _disturbances(samples: list[dict[str, Any]], kind: str, harmless: str) -> list[str]:
    """How many of them were disturbed, if any were."""
    if not (count := disturbed(samples)):
        return []
    so = harmless if trustworthy(samples) else "do not believe the figures; measure again when it is quiet."
    return [
        f"{count} of {len(samples)} {kind} ran while something else used more than {QUIET:.0%} of the machine, or its "
        f"host withheld as much: {so}"
    ]


def _failed_turns(document: dict[str, Any]) -> list[str]:
    failed: dict[tuple[str, str], list[str]] = {}
    for one in document.get("pair_errors", ()):
        failed.setdefault((one["peer"], one["workload"]), []).append(one["error"])
    rounds, _ = pair_rounds(document)
    return [
        f"{_title(peer)}, {_workload_title(workload)}: {len(errors)} of {rounds} turns side by side failed: {errors[0]}"
        for (peer, workload), errors in failed.items()
    ]


def method(document: dict[str, Any]) -> str:
    settings = document["settings"]
    where = (
        "each server process, with all its threads, pinned to one core and the generator to another"
        if settings["cores"] == "split"
        else "server and generator free to use all cores"
    )
    network = settings.get("network", OUTSIDE)
    return (
        f"Closed-loop load over loopback, in {network}, every byte verified; {where}; {settings['rounds']} round(s) of "
        f"{settings['seconds']:g} s (after {settings['warm_up']:g} s of warm-up), servers taking turns, each round "
        "in another order, a fresh process each time; ratios within a round, their median, lowest and highest; "
        "latencies: percentiles are medians over the rounds, the maximum is that of all rounds"
    )


# ---- floors ------------------------------------------------------------------------------------------------------

FLOOR_COLUMNS = ("workload", "server", "figure", "beside", "wanted", "measured", "between", "met")


def _floor_row(found: Finding) -> list[str]:
    floor = found.floor
    beside = [found.against] if found.against else floor.against
    wanted = f"{floor.wanted:g}" if floor.against else floor.format.format(floor.wanted)
    measured = [floor.format.format(figure) for figure in found.measured]
    return [
        _workload_title(floor.workload),
        _title(floor.peer),
        floor.quantity.title,
        " or ".join(map(_title, beside)),
        f"{floor.comparison} {wanted}",
        measured[0] if measured else "missing",
        " - ".join(measured[1:]),
        found.missing or ("yes" if found.met else "**no**"),
    ]


def _floor_counts(found: list[Finding]) -> str:
    missing = sum(bool(one.missing) for one in found)
    met = sum(one.met for one in found)
    return f"Of {len(found)} floors {met} are met, {len(found) - met - missing} are not, {missing} were not measured."


# ---- terminal ----------------------------------------------------------------------------------------------------


def _notes(document: dict[str, Any], workload: str) -> list[str]:
    """What is to be known before reading the workload's table."""
    known = workloads.BY_NAME.get(workload)
    return [note for note in (known.note if known else "", _slow_when_fresh(document, workload)) if note]


APART = 1.5  # times as fast side by side as in the table: that wants to be explained


def _slow_when_fresh(document: dict[str, Any], workload: str) -> str:
    """Why table and chart contradict each other about some servers: see peers/_loops.py."""
    found = []
    for peer, figures in document["summary"][workload].items():
        here, there = (each.get("rate_ratio") for each in (figures, side_by_side(document, workload, peer, figures)))
        if here and there and peer in peers.BY_NAME and peers.BY_NAME[peer].new_blocks and there[0] > APART * here[0]:
            found.append(f"{_title(peer)} {_ratio_text(here[0])} here, {_ratio_text(there[0])} there")
    if not found:
        return ""
    return (
        "Side by side (in the chart and beside the floors) ratios are higher than in this table for servers that "
        f"receive into a new block of 256 KiB each time: {'; '.join(found)}. Here each round has a fresh process, in "
        "which the C library takes such a block from the kernel and gives it back, for each message: most of its CPU "
        "time. There clients come anew each turn, and once the first have left, such a block lies on the heap. Either "
        "is what a user may see; benchmarks/peers/_loops.py says more."
    )


def _show_floors(document: dict[str, Any], console: Console) -> None:
    """Those that the run says something about, by the short names."""
    found = findings(document)
    table = Table(title=_floor_counts(found), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("workload", "server", "figure", "beside", "wanted", "measured", "met"):
        table.add_column(heading)
    for one in found:
        if not one.missing:
            names = [one.floor.workload, one.floor.peer, one.floor.quantity.title, one.against]
            figures = [*_floor_row(one)[4:6], "yes" if one.met else "no"]
            table.add_row(*names, *figures, style=None if one.met else "bold red")
    console.print(table)


def show(document: dict[str, Any], console: Console) -> None:
    for workload, rows in document["summary"].items():
        columns = _columns(workload)
        shown = [i for i, (_, always) in enumerate(columns) if always or console.width >= 120]
        table = Table(title=_workload_title(workload), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for i in shown:
            table.add_column(columns[i][0], justify="right" if i else "left", no_wrap=i > 0)
        for peer, figures in _fastest_first(rows):
            cells = _row(workload, peer, figures)
            table.add_row(*(cells[i] for i in shown), style="bold" if "tstpool" in _title(peer) else None)
        console.print(table)
        for note in _notes(document, workload):
            console.print(note, style="dim", highlight=False)
    _show_floors(document, console)
    console.print(one_line(document["machine"]), style="dim")
    console.print(method(document) + ".", style="dim")
    for warning in warnings(document):
        console.print("! " + warning, style="yellow", markup=False)


# ---- chart -------------------------------------------------------------------------------------------------------

OURS, UVLOOP, OTHERS, GREY = "#c2410c", "#3b76af", "#9db7cc", "#555"


def _charted(document: dict[str, Any]) -> list[tuple[str, list[tuple[str, Figures]]]]:
    """The headline and the framed workloads, with the servers of the shorter selections, fastest first. The reference
    has no bar: it is the line at 1."""
    panels = []
    for workload, rows in document["summary"].items():
        known = workloads.BY_NAME.get(workload)
        if known is None or not known.charted:
            continue
        bars = [
            (peer, side_by_side(document, workload, peer, figures))
            for peer, figures in rows.items()
            if peer != known.reference and figures.get("rate_ratio") and "default" in peers.BY_NAME[peer].sets
        ]
        if bars and known.reference in rows:
            panels.append((workload, _fastest_first(dict(bars))))
    return panels


def _colour(peer: str) -> str:
    return OURS if peer.startswith("tstpool") else UVLOOP if peer.startswith("uvloop") else OTHERS


def _ratio_text(ratio: float) -> str:
    """Two digits that say something: 0.92, 0.047, 0.0069."""
    return f"{ratio:.2f}" if ratio >= 0.095 else f"{ratio:.2g}"


def _short(rate: float) -> str:
    """Three digits: 17.9M, 127k, 23.1k."""
    scaled, unit = (rate / 1e6, "M") if rate >= 999_500 else (rate / 1e3, "k")
    return (
        f"{scaled:.0f}{unit}"
        if scaled >= 99.95
        else f"{scaled:.1f}{unit}"
        if scaled >= 9.995
        else f"{scaled:.2f}{unit}"
    )


def _write(axes: Any, where: tuple[float, float], away: tuple[float, float], text: str, **style: Any) -> None:
    """Text at `where` (of the axes, 0 to 1; down: a bar's place), `away` from there in points."""
    down = "data" if "va" in style else "axes fraction"
    axes.annotate(text, where, away, xycoords=("axes fraction", down), textcoords="offset points", **style)


def _panel(axes: Any, workload: str, bars: list[tuple[str, Figures]], reference: Figures) -> None:
    spreads = [figures["rate_ratio"] for _, figures in bars]
    places = range(len(bars))
    axes.barh(
        places,
        [middle for middle, _, _ in spreads],
        height=0.7,
        color=[_colour(peer) for peer, _ in bars],
        xerr=[[middle - low for middle, low, _ in spreads], [high - middle for middle, _, high in spreads]],
        error_kw={"ecolor": "#222", "capsize": 2.5, "lw": 0.9},
    )
    axes.axvline(1.0, color="#222", lw=0.9, ls=(0, (2, 2)), zorder=0)
    axes.set_yticks(places, [_title(peer) for peer, _ in bars])
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.tick_params(axis="x", labelbottom=True, labelsize=9)
    axes.invert_yaxis()
    # Figures in columns right of the axes, where no bar and no whisker can come.
    columns = ((40, "ratio"), (86, "msg/s"))
    for place, (peer, figures) in zip(places, bars, strict=True):
        bold = "bold" if peer.startswith("tstpool") else "normal"
        texts = (_ratio_text(figures["rate_ratio"][0]), _short(figures["messages_per_s"]))
        for (right, _), text in zip(columns, texts, strict=True):
            _write(axes, (1, place), (right, 0), text, ha="right", va="center", fontsize=9, fontweight=bold)
    for right, heading in columns:
        _write(axes, (1, 1), (right, 5), heading, ha="right", fontsize=8, color=GREY)
    left = -144  # where the names of the servers begin
    _write(axes, (0, 1), (left, 19), _workload_title(workload), fontsize=10, fontweight="bold")
    parsing = " (which does not parse)" if workloads.BY_NAME[workload].framing != "none" else ""
    about = f"1 = C epoll loop{parsing}: {_short(reference['messages_per_s'])}/s"
    _write(axes, (0, 1), (left, 5), about, fontsize=8.5, color=GREY)
    axes.spines[["top", "right"]].set_visible(False)


def _about_bars(document: dict[str, Any]) -> list[str]:
    rounds, each = pair_rounds(document)
    if not rounds:
        return ["Bars: median of the rounds; whiskers: lowest and highest round.", method(document) + "."]
    counted, unit = (f"{rounds} rounds", "rounds") if each == 1 else (f"{rounds // each} starts", "starts")
    of_each = "" if each == 1 else f"; of each start the median of {each} rounds"
    return [
        f"Bars: median of {counted} of the servers, which all run and take turns of a quarter of a second{of_each}; "
        f"whiskers: where the median of ever more {unit} would lie, 95 times of 100. msg/s: of these turns, not of the "
        "tables. Closed-loop load over loopback, every byte verified; each server process, with all its threads, "
        "pinned to one core and the generator to another.",
    ]


def draw(document: dict[str, Any], path: Path) -> bool:
    """The chart as a picture; False where matplotlib is missing or there is nothing to draw."""
    panels = _charted(document)
    try:
        import matplotlib
    except ImportError:
        return False
    if not panels:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(2, len(panels))
    lines = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [max(len(bars) for _, bars in line) + 2.2 for line in lines]
    figure, grid = pyplot.subplots(
        len(lines),
        columns,
        figsize=(5.6 * columns, 0.27 * sum(heights) + 1.5),
        sharex=True,
        squeeze=False,
        height_ratios=heights,
    )
    figure.set_layout_engine("constrained", wspace=0.03)
    for axes, (workload, bars) in zip(grid.flat, panels, strict=False):
        reference = workloads.BY_NAME[workload].reference
        figures = side_by_side(document, workload, reference, document["summary"][workload][reference])
        _panel(axes, workload, bars, figures)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    furthest = max(figures["rate_ratio"][2] for _, bars in panels for _, figures in bars)
    grid[0, 0].set_xlim(0, max(1.05, furthest * 1.02))
    title = f"Messages per second relative to a C epoll loop on the same core\n{one_line(document['machine'])}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11.5)
    about = " ".join(
        [
            *_about_bars(document),
            *(warning.rstrip(".") + "." for warning in warnings(document)[:1]),
            f"Measured {document['machine']['date']}.",
        ]
    )
    figure.supxlabel("\n".join(textwrap.wrap(about, 88 * columns)), x=0.01, ha="left", fontsize=8, color=GREY)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True


# ---- RESULTS.md --------------------------------------------------------------------------------------------------


def _markdown_table(workload: str, rows: dict[str, Figures]) -> list[str]:
    columns = _columns(workload)
    lines = ["| " + " | ".join(heading for heading, _ in columns) + " |", "|---" + "|--:" * (len(columns) - 1) + "|"]
    return lines + ["| " + " | ".join(_row(workload, peer, figures)) + " |" for peer, figures in _fastest_first(rows)]


def _table(headings: Iterable[str], rows: list[list[str]], names: int) -> list[str]:
    """The first `names` columns hold words, the others figures."""
    headings = list(headings)
    rules = "|---" * names + "|--:" * (len(headings) - names) + "|"
    return [f"| {' | '.join(headings)} |", rules, *(f"| {' | '.join(row)} |" for row in rows), ""]


def _between(document: dict[str, Any]) -> str:
    """What the column of that name says."""
    rounds, each = pair_rounds(document)
    if not rounds:
        return "*Between*: the lowest and the highest of the rounds."
    if each == 1:
        turns_taken = f"{rounds} times. *Between* there is where the median of ever more rounds would lie, 95 times of "
        turns_taken += "100, if they were independent"
    else:
        turns_taken = f"{rounds} times, {each} of them after each of {rounds // each} starts. The figure is the median "
        turns_taken += "of the starts' medians; *between* there is where that of ever more starts would lie, 95 times "
        turns_taken += "of 100"
    return (
        "The chart and the ratios of messages/s and of p99, but that of the broadcast and those of the sleepers, are "
        "from rounds of their own: all servers that are compared run at once, all but one asleep, and take turns of a "
        f"quarter of a second, {turns_taken}; elsewhere it is the lowest and the highest of the rounds. The rates in "
        "the chart are of those turns, those in the tables below of other runs, for which the machine may have been "
        "slower or faster: compare rates within one of the two only."
    )


def _floors(document: dict[str, Any]) -> list[str]:
    found = findings(document)
    return [
        "## What was to be reached",
        "",
        f"{_floor_counts(found)} A figure beside another server's is a ratio, the median of those within each round; "
        "beside the servers tuned by hand it is the one to the best of them. User-mode CPU is compared over all rounds "
        f"together. {_between(document)}",
        "",
        *_table(FLOOR_COLUMNS, [_floor_row(one) for one in found], 5),
    ]


def _cpu_table(document: dict[str, Any]) -> list[str]:
    """How much of what a message costs tstpool is not tstpool's: a table of the charted workloads."""
    rows = []
    for workload, servers in document["summary"].items():
        known = workloads.BY_NAME.get(workload)
        least = known and known.charted and servers.get(known.reference, {}).get("kernel_us_per_message")
        for peer, figures in _fastest_first(servers) if least else ():
            user, kernel = figures.get("user_us_per_message"), figures.get("kernel_us_per_message")
            if kernel is None or (peer != known.reference and not peer.startswith("tstpool")):
                continue
            cells = (f"{user:.2f}", f"{kernel:.2f}", f"{kernel / (user + kernel):.0%}", f"{kernel / least:.2f}")
            rows.append([_workload_title(workload), _title(peer), *cells])
    if not rows:
        return []
    headings = ("workload", "server", "own us/msg", "kernel us/msg", "kernel's share", "kernel, beside the C loop's")
    return [
        "CPU time per message: the server's own code, and the kernel's, which receives, sends and wakes for it. The C "
        "loop has next to no code of its own: what the kernel takes there is what the system calls cost. Where a "
        "server's kernel time is like the C loop's, only its own code could be faster.",
        "",
        *_table(headings, rows, 2),
    ]


SHOWN = frozenset(("epoll_wait", "epoll_pwait", "epoll_ctl", "futex"))  # also where they are rare
PER_CONNECTION = 5  # what is called less often than so many times for each connection belongs to connecting and closing


def _calls_columns(counts: list[dict[str, Any]]) -> list[str]:
    columns = set()
    for one in counts:
        least = PER_CONNECTION * workloads.BY_NAME[one["workload"]].connections
        columns |= {name for name, calls in one["calls"].items() if calls >= least or name in SHOWN}
    return sorted(columns)


def _calls_row(one: dict[str, Any], columns: list[str]) -> list[str]:
    calls = [one["calls"].get(name, 0) for name in columns]
    in_all = sum(one["calls"].values())
    each = [number / one["messages"] for number in (*calls, in_all - sum(calls), in_all)]
    return [
        _workload_title(one["workload"]),
        _title(one["peer"]),
        *(_ratio_text(number) if number else "" for number in each),
    ]


def _calls_table(document: dict[str, Any]) -> list[str]:
    found = document.get("calls", {"missing": "this run was not asked to"})
    if "missing" in found:
        return [f"System calls were not counted: {found['missing']}.", ""]
    good = [one for one in found["counts"] if "calls" in one and one["workload"] in workloads.BY_NAME]
    columns = _calls_columns(good)
    rows = [_calls_row(one, columns) for one in good]
    failed = dict.fromkeys(f"{_title(one['peer'])}: {one['error']}." for one in found["counts"] if "error" in one)
    return [
        f"System calls for each message, counted by {found['tool']} in runs of their own, whose speed says nothing. "
        "Under strace a server is so slow that nearly all connections are ready each time it waits, so it waits more "
        "rarely than otherwise. *Others* are those of connecting and closing, and a part of each `epoll_ctl` is that, "
        "too. A `futex` call hands work to another thread, or wakes the one that looks for stuck handlers: how many "
        "there are depends on the time, not on the messages.",
        "",
        *_table(("workload", "server", *columns, "others", "all"), rows, 2),
        *(line for text in failed for line in (text, "")),
    ]


def _statistics_table(document: dict[str, Any]) -> list[str]:
    """For messages that come alone: there statistics cost most."""
    if why := counting.missing(document):
        return [f"What statistics cost is not known: {why}.", ""]
    found = document["statistics"]
    rows = [
        [_workload_title(workload), _title(peer), f"{counting.share(document, workload, peer):.1%}"]
        for workload, servers in document["summary"].items()
        for peer in counting.PEERS
        if counting.is_worst_case(workload) and servers.get(peer, {}).get("rounds")
    ]
    return [
        f"Statistics: counting and timing one message that comes alone takes {found['nanoseconds']:.0f} ns "
        f"({found['lowest']:.0f}-{found['highest']:.0f}), the engine's own functions run by themselves. Of the CPU "
        "time of a message that is at most:",
        "",
        *_table(("workload", "server", "share"), rows, 2),
    ]


def _limits(document: dict[str, Any]) -> list[str]:
    return [
        "## What limits it",
        "",
        *_cpu_table(document),
        *_calls_table(document),
        *_statistics_table(document),
    ]


def _other_interpreter(machine: dict[str, Any]) -> str:
    version = machine.get("free_threaded")
    return f"; servers that are called free-threaded: CPython {version}" if version else ""


def write_markdown(document: dict[str, Any], path: Path, chart: Path | None) -> None:
    machine = document["machine"]
    servers = "".join(f"{name} {version}, " for name, version in machine.get("servers", {}).items())
    lines = [
        "# Results",
        "",
        "<!-- Written by `python -m benchmarks --write-results` from results.json: do not edit by hand. -->",
        "",
        f"**Machine.** {one_line(machine)}; {machine['compiler']}; uvloop {machine['uvloop']}, {servers}"
        f"tstpool {machine['tstpool']} (commit {machine['commit']}){_other_interpreter(machine)}; measured "
        f"{machine['date']}.",
        "",
        f"**Method.** {method(document)}. CPU is the server process's, all threads, from the kernel's accounts. *Busy* "
        "is its share of one core: below about 95 % the generator or the wake-ups were the limit, not the server; "
        "compare CPU per message there. The user share is the kernel's estimate, over all rounds together. Latency "
        "counts from when a message fell due.",
        "",
        *(f"> {warning}\n" for warning in warnings(document)),
    ]
    if chart:
        lines += [f"![Messages per second relative to the C loop]({os.path.relpath(chart, path.parent)})", ""]
    lines += _floors(document) + _limits(document)
    for workload, rows in document["summary"].items():
        notes = [line for note in _notes(document, workload) for line in (note, "")]
        lines += [f"## {_workload_title(workload)}", "", *notes, *_markdown_table(workload, rows), ""]
    path.write_text("\n".join(lines).rstrip() + "\n")
