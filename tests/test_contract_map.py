"""tests/CONTRACT.md says which tests prove which promise, and says it rightly."""

from contract_map import PAGE, ROWS, find_tests, render, rows_of


def test_every_row_has_a_test():
    assert {row for row, tests in find_tests().items() if not tests} == set()


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == render(), "run: python tests/contract_map.py"


def test_all_rows_are_there():
    assert list(ROWS) == [f"S{i}" for i in range(1, 41)] + [f"defect {i}" for i in range(1, 11)]


def test_rows_are_read_off_docstrings():
    text = "S3, S8 and S10-S12; defects 6 and 9, Defect 10; DS4, S3x are none."
    assert list(rows_of(text)) == ["S3", "S8", "S10", "S11", "S12", "defect 6", "defect 9", "defect 10"]
