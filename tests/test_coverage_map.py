"""tests/coverage_reasons.py speaks of lines that are there, and tests/COVERAGE.md has a reason for each missed one."""

from collections import Counter

from coverage_map import (
    FEW,
    LEAST,
    PAGE,
    ROOT,
    add_counts,
    function_of,
    origins,
    render,
    report,
    totals,
    unexplained,
)
from coverage_reasons import REASONS


def test_each_reason_is_about_lines_that_are_still_there():
    """A line is known by its text and its function, so that it may move."""
    for places in REASONS.values():
        for place, texts in places.items():
            path, _, function = place.partition(" ")
            source = (ROOT / path).read_text().splitlines()
            same = [i for i, line in enumerate(source, 1) if line.strip() in texts]
            found = Counter(source[i - 1].strip() for i in same if function_of(source, i) == function)
            gone = {text for text, n in Counter(texts).items() if found[text] < n}
            assert not gone, f"tests/coverage_reasons.py: {place}"


def test_the_page_has_the_reasons():
    """Also when they were changed and `make cov` was not run since."""
    complete = render({name: {"lines": 1, "missed": []} for name in ("a.pxd", "b.py")})
    assert reasons_of(PAGE.read_text()) == reasons_of(complete), "run: make cov && python tests/coverage_map.py"


def reasons_of(page):
    """What stands below the table: also the lines without a reason, if there are any."""
    return page.partition("## Not executed")[2]


def test_a_missed_line_without_a_reason_stands_on_the_page():
    found = {"a.pxd": {"lines": 9, "missed": [[1, "f", "return 0"]]}}
    assert render(found).endswith("- **Without a reason**: `a.pxd`, `f`: `return 0`\n")


def test_too_few_executed_lines_and_too_many_without_a_reason_are_a_failure(capsys):
    """A few may be missed by chance; the Cython files must reach the percentage by themselves."""

    def judge(cython_missed, python_missed=0):
        found = {name: {"lines": 400, "missed": [[i, "f", f"line {i}"] for i in range(1, missed + 1)]}
                 for name, missed in (("a.pxd", cython_missed), ("b.py", python_missed))}  # fmt: skip
        good = report(found)
        said = capsys.readouterr().out
        assert (f"less than {LEAST} %" in said or f"more than {FEW} lines" in said) is not good
        return good

    assert judge(FEW)
    assert not judge(FEW + 1)
    assert not judge(FEW, 1)


def test_less_than_the_least_is_a_failure_though_all_have_reasons(monkeypatch):
    def missed(n):
        return {"a.pxd": {"lines": 100, "missed": [[1, "f", "x"]] * n}, "b.py": {"lines": 1000, "missed": []}}

    monkeypatch.setattr("coverage_map.REASONS", {"why": {"a.pxd f": ["x"] * 100}})
    assert report(missed(100 - LEAST))
    assert not report(missed(100 - LEAST + 1))


def test_the_function_of_a_line():
    source = [
        "import x",
        "cdef inline int first(int a,",
        "                      int b) noexcept nogil:",
        "    return a",
        "cdef class Thing(Other):",
        "    @property",
        "    def second(self):",
        "        if x:",
        "            return first(1, 2)",
        "    cdef void third(self):",
        "        cdef int n = f(1)",
    ]
    names = [function_of(source, i) for i in range(1, len(source) + 1)]
    assert names == ["", *["first"] * 3, *["Thing"] * 2, *["Thing.second"] * 3, *["Thing.third"] * 2]


def test_c_lines_are_counted_for_the_lines_that_they_are_made_of(tmp_path):
    """What Cython adds on its own is nobody's: behind a function, and at its exit."""
    c_file = tmp_path / "x.c"
    c_file.write_text(
        '  /* "tstpool/_x.pxd":3\n * text\n*/\n  one;\n  two;\n  /* "tstpool/_y.pxd":8\n*/\n  three;\n'
        "  /* function exit code */\n  four;\n}\nfive;\n"
    )
    x, y = ("tstpool/_x.pxd", 3), ("tstpool/_y.pxd", 8)
    assert origins(c_file) == [x] * 5 + [y] * 3 + [None] * 4
    counts = {"tstpool/_x.pxd": Counter({3: 1}), "tstpool/_y.pxd": Counter()}
    add_counts(counts, origins(c_file), [{"line_number": i, "count": i % 8} for i in range(1, 13)])
    assert counts == {"tstpool/_x.pxd": Counter({3: 6}), "tstpool/_y.pxd": Counter({8: 7})}


def test_a_line_without_a_reason_is_found_also_when_its_twin_has_one(monkeypatch):
    monkeypatch.setattr("coverage_map.REASONS", {"why": {"a.pxd f": ["return 0"]}})
    found = {"a.pxd": {"lines": 9, "missed": [[1, "f", "return 0"], [5, "f", "return 0"], [7, "g", "return 0"]]}}
    assert unexplained(found) == [("a.pxd", 5, "f", "return 0"), ("a.pxd", 7, "g", "return 0")]


def test_cython_files_are_measured_apart_from_python_files():
    assert totals({"a.pxd": {}, "b.pyx": {}, "c.py": {}}) == [
        ("all of the Cython files", ["a.pxd", "b.pyx"]),
        ("all of the package", ["a.pxd", "b.pyx", "c.py"]),
    ]
