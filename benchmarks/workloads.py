"""The workloads, as data. A new one is a line here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial


@dataclass(frozen=True)
class Workload:
    name: str  # stands in results.json; never reuse one for something else
    title: str
    connections: int = 50
    depth: int = 1  # messages in flight on each connection
    size: int = 64  # bytes, without the length prefix
    framing: str = "none"  # or "length4": 4 bytes, big-endian, before each message
    spin: bool = False  # the generator polls instead of sleeping: see c/loadgen.c
    sets: tuple[str, ...] = ("full",)  # which selections it is in: "quick", "default", "full"


EVERYWHERE = ("quick", "default", "full")
DEFAULT = ("default", "full")

framed = partial(Workload, framing="length4")

# The first one is the headline: the chart and the README quote it.
WORKLOADS = (
    Workload("echo-64B-c50", "64 B, 50 connections, one in flight", sets=EVERYWHERE),
    Workload("echo-64B-c50-d16", "64 B, 50 connections, 16 in flight", depth=16, sets=DEFAULT),
    Workload("echo-16K-c50", "16 KiB, 50 connections, one in flight", size=16 * 1024, sets=DEFAULT),
    Workload("echo-64B-c1", "64 B, 1 connection, one in flight", connections=1, spin=True, sets=DEFAULT),
    Workload("echo-64B-c500", "64 B, 500 connections, one in flight", connections=500),
    Workload("echo-64B-c5000", "64 B, 5,000 connections, one in flight", connections=5000),
    Workload("echo-64B-c50-d128", "64 B, 50 connections, 128 in flight", depth=128),
    Workload("echo-1K-c50", "1 KiB, 50 connections, one in flight", size=1024),
    Workload("echo-100K-c50", "100 KiB, 50 connections, one in flight", size=100 * 1024),
    Workload("echo-1M-c50", "1 MiB, 50 connections, one in flight", size=1024 * 1024),
    framed("framed-64B-c50-d16", "framed 64 B, 50 connections, 16 in flight", depth=16, sets=DEFAULT),
    framed("framed-64B-c50-d128", "framed 64 B, 50 connections, 128 in flight", depth=128, sets=DEFAULT),
    framed("framed-16K-c50", "framed 16 KiB, 50 connections, one in flight", size=16 * 1024, sets=DEFAULT),
    framed("framed-64B-c50", "framed 64 B, 50 connections, one in flight"),
    framed("framed-1M-c50", "framed 1 MiB, 50 connections, one in flight", size=1024 * 1024),
)
BY_NAME = {workload.name: workload for workload in WORKLOADS}
