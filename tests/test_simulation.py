"""The simulation of the engine over a fake kernel (tests/simulation): a seed replays exactly, and its way to the kernel
leaves out none of the engine's calls."""

import re
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.append(str(HERE / "simulation"))
simulation = pytest.importorskip("_simulation", reason="not built for this flavour")

# Names that are types or constants, or that neither block nor touch the kernel.
HARMLESS = {"tst_bug", "tst_pause", "tst_rarely"}


def test_a_seed_replays_exactly():
    first = [simulation.run(seed) for seed in range(100)]
    assert [simulation.run(seed) for seed in reversed(range(100))] == first[::-1]
    assert len({trace for _, trace, _ in first}) == 100


def test_every_function_that_the_engine_takes_from_c_goes_through_the_table():
    declared = set()
    for line in (HERE.parent / "tstpool" / "_libc.pxd").read_text().splitlines():
        found = re.match(r"    (?:[a-z_0-9]+ )+\*?(\w+)(?: \"(\w+)\")?\(", line)
        if found and "static" not in line:
            declared.add(found[2] or found[1])
    rerouted = set(re.findall(r"^#define (\w+)\(", (HERE / "simulation" / "reroute.h").read_text(), re.MULTILINE))
    assert "epoll_wait" in declared and "__atomic_load_n" in declared
    assert declared - rerouted - HARMLESS == set()
