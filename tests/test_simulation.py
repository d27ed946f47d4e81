"""The simulation of the engine over a fake kernel (tests/simulation): what must hold does, a seed replays exactly, and
its way to the kernel leaves out none of the engine's calls."""

import re
import sys
from pathlib import Path

import pytest
from helpers import scaled

HERE = Path(__file__).parent
sys.path.append(str(HERE / "simulation"))
simulation = pytest.importorskip("_simulation", reason="not built for this flavour")

# Names that are types or constants, or that neither block nor touch the kernel.
HARMLESS = {"tst_bug", "tst_pause", "tst_rarely", "tst_usually"}


def test_what_must_hold_does_with_any_schedule_and_any_fault():
    """B01, B02, B03, B04, B05, B06, B07, B08, B09, B10, B11, B12, B17, B24, B27, B34: README.md there says what is
    looked at. `make simulate` runs ten times as many seeds; run.py --seed N --trace shows one."""
    assert {seed: failure for seed in range(scaled(2000, 100)) if (failure := simulation.run(seed)[0])} == {}


def test_a_seed_replays_exactly():
    first = [simulation.run(seed) for seed in range(100)]
    assert [simulation.run(seed) for seed in reversed(range(100))] == first[::-1]
    assert len({trace for _, trace, _ in first}) == 100


def test_every_fault_that_mutate_plants_has_its_place():
    import mutate

    places = {
        name: (HERE.parent / "tstpool" / f"{header}.pxd").read_text().count(there)
        for name, (header, there, _) in mutate.FAULTS.items()
    }
    assert {name: times for name, times in places.items() if times != 1} == {}


def test_every_function_that_the_engine_takes_from_c_goes_through_the_table():
    declared = set()
    for line in (HERE.parent / "tstpool" / "_libc.pxd").read_text().splitlines():
        found = re.match(r"    (?:[a-z_0-9]+ )+\*?(\w+)(?: \"(\w+)\")?\(", line)
        if found and "static" not in line:
            declared.add(found[2] or found[1])
    rerouted = set(re.findall(r"^#define (\w+)\(", (HERE / "simulation" / "reroute.h").read_text(), re.MULTILINE))
    assert "epoll_wait" in declared and "__atomic_load_n" in declared
    assert declared - rerouted - HARMLESS == set()
