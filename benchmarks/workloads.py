"""The workloads, as data. A new one is a line here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from .peers import EVERYWHERE, PEERS, REFERENCE, Peer


@dataclass(frozen=True)
class Column:
    key: str
    heading: str
    format: str


@dataclass(frozen=True)
class Workload:
    name: str  # stands in results.json; never reuse one for something else
    title: str
    connections: int = 50
    depth: int = 1  # messages in flight on each connection
    size: int = 64  # bytes, without the length prefix
    framing: str = "none"  # or "length4": 4 bytes, big-endian, before each message
    spin: bool = False  # the generator polls instead of sleeping: see c/loadgen.c
    driver: str = "loadgen"  # what applies the load: see DRIVERS in measure.py
    peers: tuple[str, ...] = ()  # whom it is for; empty: all that serve the framing
    besides: tuple[str, ...] = ()  # who else, if all that serve the framing
    reference: str = REFERENCE  # whom ratios are taken to
    cores: str = ""  # "shared": the server may use several cores, whatever --cores says
    charted: bool = False  # in the picture: few, or nobody looks
    note: str = ""  # what is to be known before reading the figures
    columns: tuple[Column, ...] = ()  # of what drivers.py measured; empty: the columns that all others have
    longer: float = 1.0  # times --seconds
    sets: tuple[str, ...] = ("full",)  # which selections it is in: "quick", "default", "floors", "full"

    def able(self) -> list[Peer]:
        """Whom it can be measured with."""
        if self.peers:
            return [peer for peer in PEERS if peer.name in self.peers]
        return [peer for peer in PEERS if self.framing in peer.framings or peer.name in self.besides]


DEFAULT = ("default", "floors", "full")
FLOORS = ("floors", "full")  # what floors.py needs beside those

framed = partial(Workload, framing="length4")

POLLS = (
    "tstpool polls for up to 20 us before it sleeps (busy_poll, its default), and takes up to its whole core for "
    "that; the C loop and the others sleep at once: compare CPU us/msg"
)

ECHO = (
    # The first one is the headline: the chart and the README quote it.
    Workload("echo-64B-c50", "64 B, 50 connections, one in flight", charted=True, sets=EVERYWHERE),
    Workload("echo-64B-c50-d16", "64 B, 50 connections, 16 in flight", depth=16),
    Workload("echo-16K-c50", "16 KiB, 50 connections, one in flight", size=16 * 1024),
    Workload(
        "echo-64B-c1",
        "64 B, 1 connection, one in flight",
        connections=1,
        spin=True,
        besides=("tstpool-no-poll",),
        note=f"{POLLS}, and the row with busy_poll=0. The generator polls, too.",
        sets=DEFAULT,
    ),
    Workload("echo-64B-c500", "64 B, 500 connections, one in flight", connections=500),
    Workload("echo-64B-c1000", "64 B, 1,000 connections, one in flight", connections=1000, sets=FLOORS),
    Workload("echo-64B-c5000", "64 B, 5,000 connections, one in flight", connections=5000),
    Workload("echo-64B-c50-d128", "64 B, 50 connections, 128 in flight", depth=128),
    Workload("echo-1K-c50", "1 KiB, 50 connections, one in flight", size=1024),
    Workload("echo-100K-c50", "100 KiB, 50 connections, one in flight", size=100 * 1024),
    Workload("echo-1M-c50", "1 MiB, 50 connections, one in flight", size=1024 * 1024),
)

FRAMED = (
    framed("framed-64B-c50-d16", "framed 64 B, 50 connections, 16 in flight", depth=16, charted=True, sets=EVERYWHERE),
    framed("framed-64B-c50-d128", "framed 64 B, 50 connections, 128 in flight", depth=128, charted=True, sets=DEFAULT),
    framed(
        "framed-16K-c50", "framed 16 KiB, 50 connections, one in flight", size=16 * 1024, charted=True, sets=DEFAULT
    ),
    framed("framed-64B-c50", "framed 64 B, 50 connections, one in flight"),
    framed("framed-1M-c50", "framed 1 MiB, 50 connections, one in flight", size=1024 * 1024, sets=FLOORS),
)

WORKERS = ("c-level", "tstpool-workers-1", "tstpool-workers-8")
WORK = ("work-1", "work-8", "work-8-1", "work-8-2")

SPECIAL = (
    Workload(
        "cpu-64B-c50",
        "64 B, 50 connections, one in flight: CPU per message over a longer time",
        peers=("tstpool", "uvloop"),
        reference="uvloop",
        note="The kernel accounts in ticks of 10 ms, few of which fall into a server's own code: it takes many.",
        longer=10.0,
        sets=FLOORS,
    ),
    Workload(
        "broadcast-64B-c5000",
        "64 B from an outside thread to 5,000 connections",
        connections=5000,
        driver="broadcast_load",
        peers=("broadcast-c", "broadcast-tstpool", "broadcast-uvloop", "broadcast-asyncio"),
        reference="broadcast-c",
        note="A message is one copy at one client; latency is the time until all 5,000 clients have theirs.",
        sets=DEFAULT,
    ),
    framed(
        "slow-mix-c46",
        "64 B, 46 connections, while the handlers of 4 others sleep for a second each",
        connections=46,
        driver="slow_mix",
        peers=("sleep-0", "sleep-4"),
        reference="sleep-0",
        note="The figures are those of the 46; the ratio is to the same server without sleepers. workers=8.",
        sets=DEFAULT,
    ),
    framed(
        "all-asleep-1000",
        "all 8 workers asleep for a second, 1,000 messages waiting",
        driver="asleep",
        peers=("sleep-8",),
        note="CPU while all sleep; messages served before the first has woken up; when all 1,000 were served.",
        columns=(
            Column("cpu_share", "CPU, of a core", "{:.2%}"),
            Column("served_early", "served meanwhile", "{:,.0f}"),
            Column("served", "served in all", "{:,.0f}"),
            Column("seconds_until_served", "all served after, s", "{:.2f}"),
        ),
        sets=FLOORS,
    ),
    Workload(
        "idle-c10000",
        "10,000 connections that have been used once and say nothing",
        connections=10000,
        driver="idle",
        peers=("c-level", "tstpool", "tstpool-nogil", "uvloop", "uvloop-streams", "asyncio", "asyncio-streams"),
        note="CPU over 5 s; resident memory, of which the kernel's socket buffers are no part.",
        columns=(
            Column("cpu_share", "CPU, of a core", "{:.2%}"),
            Column("bytes_per_connection", "bytes/connection", "{:,.0f}"),
        ),
        sets=FLOORS,
    ),
    *(
        Workload(
            f"workers-c{count}",
            f"64 B, {count:,} connection{'s' * (count > 1)}, one in flight: 8 workers or 1",
            connections=count,
            spin=count == 1,
            peers=WORKERS,
            note=f"{POLLS}. The generator polls, too." if count == 1 else "",
            sets=FLOORS if count == 50 else ("full",),
        )
        for count in (1, 50, 1000)
    ),
    *(
        Workload(
            f"work-50us-c{count}",
            f"50 us of Python for each message, {count:,} connection{'s' * (count > 1)}",
            connections=count,
            peers=WORK,
            reference="work-8",
            cores="shared",
            note="Server and generator free to use all cores.",
            sets=FLOORS if count == 50 else ("full",),
        )
        for count in (1, 50, 1000)
    ),
    # Last: it leaves tens of thousands of ports that rest, each for up to a second (see c/connect_rate.c).
    Workload(
        "connect-c50",
        "connect, 64 B there and back, close: 50 clients",
        driver="connect_rate",
        peers=("c-level", "tstpool", "tstpool-nogil", "uvloop", "uvloop-streams", "asyncio", "socketserver"),
        note="A message is a connection; its latency runs from connect() to the reply.",
        sets=DEFAULT,
    ),
)

WORKLOADS = ECHO + FRAMED + SPECIAL
BY_NAME = {workload.name: workload for workload in WORKLOADS}
