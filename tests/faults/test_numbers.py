"""Wrong numbers change no state, jumps and copies that differ are found: rows of docs/reliability.md, in small."""

import pytest
from number_rows import NUMBER_ROWS, NumberLab


@pytest.fixture(scope="module")
def lab():
    return NumberLab()


@pytest.mark.parametrize(("row", "count"), [("bad-step", 16), ("spike", 10), ("replica-flip", 10)])
def test_a_row_in_small(lab, row, count):
    assert [problem for trial in range(count) if (problem := NUMBER_ROWS[row](lab, trial))] == []
