"""`python tests/faults/count.py ROW N`: trials of a row until there are N, appended to results.jsonl as they are made.

An interrupted count goes on where it stopped. Each line: the row, the commit, the seed, the trials `first` to
`first + count`, and what went wrong in them.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "launch"))
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
from kill_rows import KILL_ROWS
from number_rows import NUMBER_ROWS, NumberLab
from rank_rows import RANK_ROWS, RankLab
from rows import ROWS, Lab
from save_rows import SAVE_ROWS
from stop_rows import STOP_ROWS
from training import TrainingLab

RESULTS = Path(__file__).with_name("results.jsonl")
SEED = 6
_CHUNK_SECONDS = 20.0


def count_trials(row: str) -> tuple[int, int]:
    """(trials that were made, those that went wrong)."""
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    mine = [line for line in lines if line["row"] == row]
    return sum(line["count"] for line in mine), sum(len(line["wrong"]) for line in mine)


def describe_commit() -> str:
    """The commit, and `-dirty` where a file but the results is not as it was committed."""

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(RESULTS.parent), *args], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", ":/", f":(exclude){RESULTS.name}")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def main(row: str, wanted: int) -> None:
    commit = describe_commit()
    first, _ = count_trials(row)
    all_rows: dict[str, Any] = {**ROWS, **SAVE_ROWS, **STOP_ROWS, **KILL_ROWS, **NUMBER_ROWS, **RANK_ROWS}
    labs = {Lab: ROWS | SAVE_ROWS, TrainingLab: STOP_ROWS | KILL_ROWS, NumberLab: NUMBER_ROWS, RankLab: RANK_ROWS}
    (lab_of_row,) = (lab for lab, rows in labs.items() if row in rows)
    with tempfile.TemporaryDirectory() as scratch:
        lab: Any = lab_of_row(Path(scratch), SEED)
        try:
            while first < wanted:
                wrong, trial, end = [], first, time.monotonic() + _CHUNK_SECONDS
                while trial < wanted and time.monotonic() < end:
                    if problem := all_rows[row](lab, trial):
                        wrong.append(f"{trial}: {problem.replace(scratch, '')}")
                    trial += 1
                line = dict(row=row, commit=commit, seed=SEED, first=first, count=trial - first, wrong=wrong)
                with RESULTS.open("a") as out:
                    out.write(json.dumps(line) + "\n")
                first = trial
        finally:
            lab.close()
    made, wrong = count_trials(row)
    print(f"{row}: {made - wrong} of {made} right")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
