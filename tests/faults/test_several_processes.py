"""Runs of several processes, one of which dies, is stuck or sees other files; and of other numbers of them when the run
goes on. Rows of docs/reliability.md, in small."""

import pytest
from rank_rows import RANK_ROWS, RankLab


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = RankLab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "trial"),
    [
        ("dead-rank", 0),
        ("dead-rank", 3),
        ("stuck", 0),
        ("healthy", 0),
        *(("listings", trial) for trial in range(5)),
        ("elastic", 0),
    ],
)
def test_a_trial(lab, row, trial):
    assert RANK_ROWS[row](lab, trial) == ""
