"""Runs of several processes, one of which dies, is stuck or sees other files; and of other numbers of them when the run
goes on. Rows of docs/reliability.md, in small."""

import errno

import pytest
from rank_rows import LIMIT_SECONDS, RANK_ROWS, RankLab


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = RankLab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "trial"),
    [
        *(pytest.param(row, 0, marks=pytest.mark.fault_row) for row in ("dead-rank", "stuck", "elastic")),
        ("dead-rank", 3),
        ("healthy", 0),
        *(pytest.param("listings", trial, marks=[pytest.mark.fault_row] * (trial == 0)) for trial in range(5)),
    ],
)
def test_a_trial(lab, row, trial):
    assert RANK_ROWS[row](lab, trial) == ""


@pytest.mark.slow
@pytest.mark.parametrize("failing", [pytest.param(0, marks=pytest.mark.fault_row), 1])
def test_an_error_of_one_process_ends_all(lab, failing):
    """Within the 30 s in which a dead one is found; the others do not wait for it as long as jax would."""
    run_dir = lab.new()
    fault = {"fail": {"point": "evaluation", "at": 2, "errno": errno.EIO}}
    results = lab.train_together(run_dir, [], {failing: fault})
    assert results[failing]["status"] == 5, results[failing]["log"]
    assert results[1 - failing]["status"] not in (0, 5), results[1 - failing]["log"]
    assert abs(results[0]["ended"] - results[1]["ended"]) < LIMIT_SECONDS
    assert lab.goes_on(run_dir) == ""
