"""Compiles the C programs into benchmarks/build/. By itself: ``python -m benchmarks.build`` prints where they are."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SOURCES = Path(__file__).parent / "c"
BUILD = Path(__file__).parent / "build"
FLAGS = ["-O2", "-std=c11", "-Wall", "-Wextra", "-Werror"]


def program(name: str) -> Path:
    """The compiled `name`.c, compiled now if its source is newer."""
    source, target = SOURCES / f"{name}.c", BUILD / name
    if target.exists() and target.stat().st_mtime > source.stat().st_mtime:
        return target
    BUILD.mkdir(exist_ok=True)
    # Under a name of its own first: another process may be running, or building, the same program.
    fresh = BUILD / f"{name}.{os.getpid()}"
    try:
        subprocess.run([os.environ.get("CC", "cc"), *FLAGS, "-o", str(fresh), str(source)], check=True)
        fresh.replace(target)
    finally:
        fresh.unlink(missing_ok=True)
    return target


if __name__ == "__main__":
    for found in sorted(SOURCES.glob("*.c")):
        print(program(found.stem))
