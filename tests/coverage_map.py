"""Which lines of the package no test executes, and why: reads what `make cov` has counted, and makes tests/COVERAGE.md.

Cython files are counted by gcc: the coverage build has a counter for each piece of code, whichever thread runs it, with
the GIL or without. Cython's comments in the C file say which line of which file each piece is made of. (With #line
directives gcov could say so itself, but they let Cython's own code seem to be the lines behind.) A function of a header
is compiled into each module that uses it; its line is executed if it is in any of them. Python files are counted by
`coverage`, also in the processes that tests start.

`make cov` fails below LEAST percent, of the Cython files or of all, and when more than FEW lines are not executed that
REASONS (in coverage_reasons.py) does not name: which threads meet is chance, and a few lines may be missed that were
never missed before. After it has run, `python tests/coverage_map.py` writes the page; tests/test_coverage_map.py wants
the page that is committed to have a reason for every line.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from coverage_reasons import REASONS

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
PAGE = TESTS / "COVERAGE.md"
COUNTS = ROOT / "build" / "coverage.json"  # what `make cov` leaves for the page
LEAST = 95
FEW = 10

MARK = re.compile(r'\s*/\* "(tstpool/\S+)":(\d+)$')  # what follows is made of this line
FUNCTION = re.compile(r"( *)(?:async def|def|class|cdef class) +(\w+)|( *)(?:cdef|cpdef) [^(=]*?(\w+)\(")
INLINE = re.compile(r" *cdef inline [^(=]*\(")


def function_of(source, number):
    """The qualified name of the function or class that line `number` (from 1) of these lines is in; "" for none."""
    names = []
    level = indentation(source[number - 1])
    if FUNCTION.match(source[number - 1]):
        level += 1  # the line that begins a function is its own
    for line in reversed(source[:number]):
        found = FUNCTION.match(line)
        if found and indentation(line) < level:
            names.insert(0, found[2] or found[4])
            level = indentation(line)
    return ".".join(names)


def indentation(line):
    return len(line) - len(line.lstrip(" "))


def cython_counts(tree):
    """{file: {line: how often it was executed}} of the package's Cython files, all modules together."""
    counts = {path: Counter() for path in files(tree, "*.pyx", "*.px[di]")}
    for data in sorted(tree.glob("build/coverage/**/*.gcda")):
        command = ["gcov", "--json-format", "--stdout", str(data)]
        report = json.loads(subprocess.run(command, cwd=tree, check=True, capture_output=True).stdout)
        for entry in report["files"]:
            if entry["file"].startswith("build/"):  # and not a header of Python
                add_counts(counts, origins(tree / entry["file"]), entry["lines"])
    for path, lines in counts.items():
        for number, line in enumerate((tree / path).read_text().splitlines(), 1):
            if INLINE.match(line):
                lines[number] += 0  # gcc compiles none that nobody calls
    return counts


def origins(c_file):
    """For each line of a C file that Cython made: the (file, line) that it is made of, or None."""
    origin, found = None, []
    for line in c_file.read_text().splitlines():
        mark = MARK.match(line)
        if mark:
            origin = mark[1], int(mark[2])
        elif line.startswith("}") or "/* function exit code */" in line:
            origin = None
        found.append(origin)
    return found


def add_counts(counts, made_of, c_lines):
    """Adds what gcov counted for lines of one C file; what was executed most often says how often their origin was."""
    most = Counter()
    for line in c_lines:
        origin = made_of[line["line_number"] - 1]
        if origin:
            most[origin] = max(most[origin], line["count"])
    for (path, number), count in most.items():
        counts[path][number] += count


def python_counts(tree):
    """The same for Python files, by `coverage`; a line is executed once or never."""
    coverage = [sys.executable, "-m", "coverage"]
    subprocess.run([*coverage, "combine", "--quiet"], cwd=tree, check=True)
    subprocess.run([*coverage, "json", "--quiet", "-o", "coverage.json"], cwd=tree, check=True)
    report = json.loads((tree / "coverage.json").read_text())["files"]
    return {
        path: Counter(
            dict.fromkeys(report[path]["executed_lines"], 1) | dict.fromkeys(report[path]["missing_lines"], 0)
        )
        for path in files(tree, "*.py")
    }


def files(tree, *patterns):
    found = (path for pattern in patterns for path in (tree / "tstpool").rglob(pattern))
    return sorted(str(path.relative_to(tree)) for path in found)


def collect(tree):
    """{file: {"lines": how many have code, "missed": [[number, function, text], ...]}} of what has run in this tree."""
    found = {}
    for path, counts in {**cython_counts(tree), **python_counts(tree)}.items():
        source = (tree / path).read_text().splitlines()
        missed = [
            [number, function_of(source, number), source[number - 1].strip()]
            for number, count in sorted(counts.items())
            if count == 0
        ]
        if counts:
            found[path] = {"lines": len(counts), "missed": missed}
    return found


def unexplained(found):
    """The missed lines that REASONS does not name: [(file, number, function, text), ...]."""
    left = Counter((place, text) for places in REASONS.values() for place, texts in places.items() for text in texts)
    lines = []
    for path, counts in found.items():
        for number, function, text in counts["missed"]:
            if left[f"{path} {function}", text] > 0:
                left[f"{path} {function}", text] -= 1
            else:
                lines.append((path, number, function, text))
    return lines


def percent(paths, found):
    lines = sum(found[path]["lines"] for path in paths)
    missed = sum(len(found[path]["missed"]) for path in paths)
    return 100 * (lines - missed) / max(lines, 1)


def totals(found):
    """[(what, its files)]: both must reach LEAST."""
    cython = [path for path in found if not path.endswith(".py")]
    return [("all of the Cython files", cython), ("all of the package", list(found))]


def table(found):
    """Rows of (file, lines, missed, percent), the totals last."""
    for name, paths in [(path, [path]) for path in sorted(found)] + totals(found):
        lines, missed = (sum(column) for column in zip(*[measure(found[path]) for path in paths], strict=True))
        yield name, lines, missed, percent(paths, found)


def measure(counts):
    return counts["lines"], len(counts["missed"])


def report(found):
    """Prints the figures and each missed line; True if they are as they must be (see above)."""
    for path in sorted(found):
        for number, function, text in found[path]["missed"]:
            print(f"not executed: {path}:{number} ({function}): {text}")
    print(f"\n{'file':32} {'lines':>6} {'missed':>6}")
    for name, lines, missed, share in table(found):
        print(f"{name:32} {lines:6} {missed:6} {share:6.1f} %")
    new = unexplained(found)
    for path, number, function, text in new:
        print(f"not executed, and tests/coverage_reasons.py does not say why: {path}:{number} ({function}): {text}")
    low = [f"{name}: less than {LEAST} %" for name, paths in totals(found) if percent(paths, found) < LEAST]
    many = [f"more than {FEW} lines are not executed without a reason"] if len(new) > FEW else []
    print("\n".join(low + many))
    return not low and not many


def render(found):
    lines = [
        "# Which lines the tests do not execute, and why",
        "",
        "Made by `make cov && python tests/coverage_map.py`. Lines of Cython files are counted by gcc in a build",
        "without optimisation, on every thread; code under `if TST_DEBUG:` is not in it. What runs in processes that",
        "tests kill is not counted, and some lines below need a coincidence: the figures vary by a few lines.",
        "",
        "| file | lines | not executed | executed |",
        "|---|---:|---:|---:|",
        *(f"| {name} | {lines} | {missed} | {share:.1f} % |" for name, lines, missed, share in table(found)),
        "",
        "## Not executed, or not in each run",
        "",
    ]
    for reason, places in REASONS.items():
        lines += [reason, ""]
        for place, texts in places.items():
            path, _, function = place.partition(" ")
            lines.append(f"- `{path}`, `{function}`: " + ", ".join(f"`{text}`" for text in texts))
        lines.append("")
    for path, _, function, text in unexplained(found):
        lines.append(f"- **Without a reason**: `{path}`, `{function}`: `{text}`")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    if len(sys.argv) == 1:
        PAGE.write_text(render(json.loads(COUNTS.read_text())))
    else:  # .ci/flavour: what was counted in this tree, and where to leave it
        counted = collect(Path(sys.argv[1]).resolve())
        Path(sys.argv[2]).write_text(json.dumps(counted, indent=1))
        sys.exit(0 if report(counted) else 1)
