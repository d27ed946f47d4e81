"""Figures for people: the table on the terminal, the chart, and RESULTS.md. All three from the same results.json."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from . import peers, workloads
from .machine import QUIET, one_line
from .results import Figures, disturbed

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
CHARTED = 4  # workloads in the chart: more than fit a glance help nobody


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


def _by_rate(rows: dict[str, Figures]) -> list[tuple[str, Figures]]:
    return sorted(rows.items(), key=lambda item: -item[1].get("messages_per_s", 0))


def warnings(document: dict[str, Any]) -> list[str]:
    """What a reader must know before believing the figures."""
    found = []
    samples = document["samples"]
    if count := disturbed(samples):
        found.append(
            f"{count} of {len(samples)} measurements ran while something else used more than {QUIET:.0%} of the "
            "machine: do not believe the figures; measure again when it is quiet."
        )
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
    return found


def method(document: dict[str, Any]) -> str:
    settings = document["settings"]
    where = (
        "each server process, with all its threads, pinned to one core and the generator to another"
        if settings["cores"] == "split"
        else "server and generator free to use all cores"
    )
    return (
        f"Closed-loop load over loopback, every byte verified; {where}; {settings['rounds']} round(s) of "
        f"{settings['seconds']:g} s (after {settings['warm_up']:g} s of warm-up), servers taking turns within a round, "
        "a fresh process each time; ratios within a round, their median, lowest and highest"
    )


# ---- terminal ----------------------------------------------------------------------------------------------------


def _note(workload: str) -> str:
    return workloads.BY_NAME[workload].note if workload in workloads.BY_NAME else ""


def show(document: dict[str, Any], console: Console) -> None:
    for workload, rows in document["summary"].items():
        columns = _columns(workload)
        shown = [i for i, (_, always) in enumerate(columns) if always or console.width >= 120]
        table = Table(title=_workload_title(workload), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for i in shown:
            table.add_column(columns[i][0], justify="right" if i else "left", no_wrap=i > 0)
        for peer, figures in _by_rate(rows):
            cells = _row(workload, peer, figures)
            table.add_row(*(cells[i] for i in shown), style="bold" if "tstpool" in _title(peer) else None)
        console.print(table)
        if note := _note(workload):
            console.print(note, style="dim", highlight=False)
    console.print(one_line(document["machine"]), style="dim")
    console.print(method(document) + ".", style="dim")
    for warning in warnings(document):
        console.print("! " + warning, style="yellow", markup=False)


# ---- chart -------------------------------------------------------------------------------------------------------


def _bars(axes: Any, rows: list[tuple[str, Figures]]) -> None:
    rows = [(peer, figures) for peer, figures in rows if figures.get("rate_ratio")]
    middle = [figures["rate_ratio"][0] for _, figures in rows]
    below = [figures["rate_ratio"][0] - figures["rate_ratio"][1] for _, figures in rows]
    above = [figures["rate_ratio"][2] - figures["rate_ratio"][0] for _, figures in rows]
    colours = [
        "#c2410c" if p.startswith("tstpool") else "#64748b" if p.startswith("c-") else "#93b5cf" for p, _ in rows
    ]
    places = range(len(rows))
    axes.barh(places, middle, color=colours, xerr=[below, above], error_kw={"ecolor": "#222", "capsize": 3, "lw": 1})
    axes.set_yticks(places, [_title(peer) for peer, _ in rows])
    axes.invert_yaxis()
    blank = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    for place, (_, figures) in zip(places, rows, strict=True):
        # Beside the whisker, so that neither hides the other.
        text = f"{figures['rate_ratio'][0]:.2f}   {figures['messages_per_s']:,}/s"
        axes.annotate(
            text,
            (figures["rate_ratio"][2], place),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            bbox=blank,
        )
    axes.axvline(1.0, color="#222", lw=0.8, ls=":")
    axes.spines[["top", "right"]].set_visible(False)


def draw(document: dict[str, Any], path: Path) -> bool:
    """The chart as a picture; False where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    charted = list(document["summary"].items())[:CHARTED]
    height = sum(0.32 * len(rows) + 0.75 for _, rows in charted) + 1.5
    ratios = [len(rows) + 1 for _, rows in charted]
    figure, all_axes = pyplot.subplots(
        len(charted), 1, figsize=(9, height), sharex=True, squeeze=False, layout="constrained", height_ratios=ratios
    )
    furthest = 1.0
    for axes, (workload, rows) in zip(all_axes[:, 0], charted, strict=True):
        _bars(axes, _by_rate(rows))
        axes.set_title(_workload_title(workload), loc="left", fontsize=10, fontweight="bold")
        furthest = max([furthest, *(f["rate_ratio"][2] for f in rows.values() if f.get("rate_ratio"))])
    all_axes[-1, 0].set_xlim(0, furthest * 1.25)  # room for the text right of the longest bar
    all_axes[-1, 0].set_xlabel("messages/s relative to the level-triggered C loop; whiskers: lowest and highest round")
    title = f"Echo servers, messages per second: C epoll loop = 1\n{one_line(document['machine'])}"
    figure.suptitle(title, x=0.02, ha="left", fontsize=11)
    about = " ".join([method(document) + ".", *warnings(document)[:1], f"Measured {document['machine']['date']}."])
    figure.supxlabel("\n".join(textwrap.wrap(about, 150)), x=0.02, ha="left", fontsize=7.5, color="#444")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


# ---- RESULTS.md --------------------------------------------------------------------------------------------------


def _markdown_table(workload: str, rows: dict[str, Figures]) -> list[str]:
    columns = _columns(workload)
    lines = ["| " + " | ".join(heading for heading, _ in columns) + " |", "|---" + "|--:" * (len(columns) - 1) + "|"]
    return lines + ["| " + " | ".join(_row(workload, peer, figures)) + " |" for peer, figures in _by_rate(rows)]


def write_markdown(document: dict[str, Any], path: Path, chart: Path | None) -> None:
    machine = document["machine"]
    lines = [
        "# Results",
        "",
        "<!-- Written by `python -m benchmarks --write-results` from results.json: do not edit by hand. -->",
        "",
        f"**Machine.** {one_line(machine)}; {machine['compiler']}; uvloop {machine['uvloop']}, "
        f"tstpool {machine['tstpool']} (commit {machine['commit']}); measured {machine['date']}.",
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
    for workload, rows in document["summary"].items():
        note = [_note(workload), ""] if _note(workload) else []
        lines += [f"## {_workload_title(workload)}", "", *note, *_markdown_table(workload, rows), ""]
    path.write_text("\n".join(lines).rstrip() + "\n")
