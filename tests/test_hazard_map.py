"""tests/HAZARDS.md says which tests show which case, and says it rightly."""

import hazard_map
from hazard_map import CASES, IN_PART, PAGE, cases_of, find_cases, render, state_of


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == render(), "run: python tests/hazard_map.py"


def test_all_cases_are_there():
    assert list(CASES) == [f"B{i:02}" for i in range(1, 66)]


def test_what_is_shown_in_part_is_a_case_that_some_test_names():
    found = find_cases()
    assert {case for case in IN_PART if not found.get(case)} == set()


def test_cases_are_read_off_docstrings():
    text = "B17, B23: the last thing; AB12, B1 and B123 are none."
    assert cases_of(text) == ["B17", "B23"]


def test_the_state_of_a_case(monkeypatch):
    monkeypatch.setattr(hazard_map, "IN_PART", {"B02": "the rest"})
    some = [("test_x.py", "test_y")]
    assert [state_of("B01", some), state_of("B01", []), state_of("B02", some)] == [
        "yes",
        "not yet",
        "in part: the rest",
    ]
