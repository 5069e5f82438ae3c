"""Rows of many saves, by processes of their own: each a trial by its number, which says what went wrong, or nothing."""

import json
import os
import shutil
import subprocess
import sys

from rows import HERE, Lab

SAVES_PER_TRIAL = 50
MOST_COPIES, MOST_GROWTH = 1.3, 0.05


def flaky(lab: Lab, trial: int) -> str:
    """Fifty saves, where one attempt in ten meets EIO at some change of the disk: all are committed, and are whole."""
    run_dir = lab.copy()
    rng = lab.rng(trial)
    request = {"seed": rng.randrange(1 << 30), "saves": SAVES_PER_TRIAL, "changes": lab.num_changes}
    result = lab.ask_disk({"run_dir": str(run_dir), "step": 6} | request)
    shutil.rmtree(run_dir)
    right = result.get("committed") == SAVES_PER_TRIAL and result["refused"] > 0 and not result["bad"]
    return "" if right else f"{result}"


def memory(lab: Lab, trial: int, megabytes: int = 128, saves: int = 200) -> str:
    """What a process holds more than before while it saves a state, and whether it holds ever more."""
    done = subprocess.run(
        [sys.executable, HERE / "memory_worker.py", str(lab.scratch / f"memory-{trial}"), str(megabytes), str(saves)],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
    )  # fmt: skip
    if done.returncode:
        return done.stderr[-2000:]
    said = json.loads(done.stdout)
    print(f"memory: {said}")
    right = said["copies"] <= MOST_COPIES and said["growth"] <= MOST_GROWTH
    return "" if right else f"{said}"


SAVE_ROWS = {"flaky": flaky, "memory": memory}
