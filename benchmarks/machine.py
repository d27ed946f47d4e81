"""What the machine is, and whether it is quiet enough to measure on."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import build, peers

QUIET = 0.05  # more than this share of the machine busy with something else, and figures are not to be trusted


@dataclass(frozen=True)
class CpuTimes:
    """Seconds since boot, summed over all cores."""

    busy: float
    steal: float  # wanted by this virtual machine, given to another
    total: float

    @classmethod
    def now(cls) -> CpuTimes:
        with open("/proc/stat") as stat:
            ticks = [int(word) for word in stat.readline().split()[1:9]]
        user, nice, system, idle, iowait, irq, softirq, steal = (t / os.sysconf("SC_CLK_TCK") for t in ticks)
        busy = user + nice + system + irq + softirq
        return cls(busy, steal, busy + idle + iowait + steal)


def busy_share(seconds: float) -> float:
    """How much of all cores was busy during the next `seconds`."""
    before = CpuTimes.now()
    time.sleep(seconds)
    after = CpuTimes.now()
    return (after.busy + after.steal - before.busy - before.steal) / max(after.total - before.total, 1e-9)


def wait_until_quiet(patience: float) -> float:
    """Waits at most `patience` seconds for the machine to be quiet; returns how busy it was last."""
    deadline = time.monotonic() + patience
    while (busy := busy_share(1.0)) > QUIET and time.monotonic() < deadline:
        pass
    return busy


def _cpu_model() -> str:
    with open("/proc/cpuinfo") as info:
        for line in info:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _version(module: str) -> str:
    """As the peers' processes see it: installed, or built in the repository."""
    command = [sys.executable, "-c", f"import {module}; print({module}.__version__)"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    return done.stdout.strip() or "not available"


def _servers() -> dict[str, str]:
    """Versions of the other servers' libraries, of those that are there."""
    found = {}
    for name in ("aiofastnet", "gevent", "twisted", "trio"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _free_threaded() -> str:
    """The version of the other interpreter; empty where none is named."""
    if not os.environ.get(peers.FREE_THREADED_VARIABLE):
        return ""
    command = [peers.FREE_THREADED_PYTHON, "-c", "import platform; print(platform.python_version())"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _commit() -> str:
    here = Path(__file__).parent
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def describe() -> dict[str, Any]:
    """The facts without which a figure says nothing."""
    compiler = subprocess.run([*build.compiler(), "--version"], capture_output=True, text=True).stdout
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "virtual": "hypervisor" in Path("/proc/cpuinfo").read_text(),
        "kernel": platform.release().partition("-")[0],  # what follows is the distributor's
        "python": platform.python_version() + (" free-threaded" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""),
        "free_threaded": _free_threaded(),
        "implementation": sys.implementation.name,
        "compiler": compiler.partition("\n")[0],
        "tstpool": _version("tstpool"),
        "uvloop": _version("uvloop"),
        "servers": _servers(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def one_line(machine: dict[str, Any]) -> str:
    kind = "virtual machine, " if machine["virtual"] else ""
    return f"{machine['cpu']}, {kind}{machine['cores']} cores, Linux {machine['kernel']}, CPython {machine['python']}"
