"""Compiles what is not Python into benchmarks/build/. ``python -m benchmarks.build`` prints where it is."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
SOURCES = HERE / "c"
BUILD = HERE / "build"
FLAGS = ["-O2", "-std=c11", "-Wall", "-Wextra", "-Werror"]


def _current(target: Path, sources: Iterable[Path]) -> bool:
    return target.exists() and all(target.stat().st_mtime > source.stat().st_mtime for source in sources)


def compiler() -> list[str]:
    """The C compiler as a command: CC may have words of its own, as in "ccache gcc"."""
    return shlex.split(os.environ.get("CC", "")) or ["cc"]


def _cc(target: Path, *arguments: str) -> None:
    # Under a name of its own first: another process may be running, or building, the same thing.
    fresh = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        subprocess.run([*compiler(), *arguments, "-o", str(fresh)], check=True)
        fresh.replace(target)
    finally:
        fresh.unlink(missing_ok=True)


def program(name: str) -> Path:
    """The compiled c/`name`.c, compiled now if it or a header is newer."""
    source, target = SOURCES / f"{name}.c", BUILD / name
    if not _current(target, [source, *SOURCES.glob("*.h")]):
        BUILD.mkdir(exist_ok=True)
        _cc(target, *FLAGS, "-pthread", str(source))
    return target


def extension(name: str, where: Path = HERE / "peers") -> ModuleType:
    """The module `where`/`name`.pyx, compiled now if it, or tstpool's headers, are newer. Else ImportError."""
    tstpool = importlib.util.find_spec("tstpool")
    if tstpool is None or tstpool.origin is None:
        raise ImportError("tstpool is not installed, and its headers are needed")
    package = Path(tstpool.origin).parent
    source = where / f"{name}.pyx"
    target = BUILD / (name + str(sysconfig.get_config_var("EXT_SUFFIX")))
    if not _current(target, [source, *package.glob("*.pxd")]):
        BUILD.mkdir(exist_ok=True)
        _compile_extension(source, target, package.parent)
    spec = importlib.util.spec_from_file_location(name, target)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile_extension(source: Path, target: Path, headers: Path) -> None:
    generated = target.with_suffix(f".{os.getpid()}.c")
    # --module-name: the C code shall not believe that it lives in the package beside which its source stands.
    command = [sys.executable, "-m", "cython", "-3", "--module-name", source.stem, "-I", str(headers)]
    try:
        done = subprocess.run([*command, "-o", str(generated), str(source)], capture_output=True, text=True)
        if done.returncode != 0:
            sys.stderr.write(done.stderr)
            raise ImportError(f"{source.name} does not compile against this tstpool (or Cython is missing)")
        _cc(target, "-O3", "-shared", "-fPIC", "-I", sysconfig.get_path("include"), str(generated))
    finally:
        generated.unlink(missing_ok=True)


if __name__ == "__main__":
    for found in sorted(SOURCES.glob("*.c")):
        print(program(found.stem))
