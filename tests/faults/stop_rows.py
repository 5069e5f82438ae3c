"""Rows of runs that are told to stop: each a trial by its number, which says what went wrong, or nothing."""

import random
import shutil
import signal
import time
from pathlib import Path

from training import EVAL_EVERY, FIRST, NUM_STEPS, TrainingLab, newest_step, write_rows

LIMIT_SECONDS = 30.0

_PHASES = ("restore", "compile", "step", "data", "evaluation", "save", "export")


def sigterm(lab: TrainingLab, trial: int) -> str:
    """SIGTERM in each of seven phases of a run that is resumed; every other one gets it twice."""
    phase = _PHASES[trial % len(_PHASES)]
    rng = random.Random(f"{lab.seed} {trial}")
    of_phase = {
        "restore": dict(stall=rng.choice(["python", "c"])),
        "compile": dict(stall="c"),
        "step": dict(at=rng.randint(2, NUM_STEPS - FIRST)),
        "data": dict(at=rng.randint(1, NUM_STEPS - FIRST), stall="python"),
        "evaluation": dict(at=rng.randint(1, NUM_STEPS // EVAL_EVERY), stall="python"),
        "save": dict(at=rng.randint(1, 2), point=rng.choice(["save", "hashing"])),
        "export": dict(stall=rng.choice(["python", "c"])),
    }[phase]
    run_dir = lab.copy_started()
    steps, sent = run_dir.with_suffix(".steps"), run_dir.with_suffix(".sent")
    steps.write_text("")
    fault = {"point": phase, "at": 1, "number": signal.SIGTERM, "log": str(sent)} | of_phase
    fault["again"] = rng.choice([0.0, 0.3, 2.0])
    result = lab.train(run_dir, faults={"send": fault, "count_steps": {"log": str(steps)}})
    done = FIRST + len(steps.read_text().splitlines())
    where = f"{fault}, after {done} steps"
    if result["status"] != 75 or "preempted: " not in result["log"] or not sent.exists():
        return f"{where}: status {result['status']}: {result['log'][-2000:]}"
    if (seconds := result["ended"] - float(sent.read_text().split()[0])) > LIMIT_SECONDS:
        return f"{where}: took {seconds:.1f} s"
    if (newest := newest_step(run_dir)) != done:
        return f"{where}: step {newest} is saved"
    result = lab.train(run_dir)
    if result["status"]:
        return f"{where}: did not go on: {result['log'][-2000:]}"
    return (problem := lab.differences(run_dir)) and f"{where}: {problem}"


def group(lab: TrainingLab, trial: int) -> str:
    """SIGTERM to the run and to the processes that prepare its data, at some moment of their lives."""
    rng = random.Random(f"{lab.seed} {trial}")
    run_dir = lab.new()
    sent, rows = run_dir.with_suffix(".sent"), run_dir.with_suffix(".jsonl")
    write_rows(rows, 5_000)
    faults = {"send_to_all_when_workers_are": dict(number=signal.SIGTERM, log=str(sent), after=rng.uniform(0, 1.0))}
    store = run_dir.with_suffix(".store")
    args = [f"--config.data.train[0].path={rows}", "--config.data.prepare_processes=3"]
    args += [f"--config.data.store_dir={store}", "--config.schedule.num_steps=1"]
    result = lab.train(run_dir, args, faults)
    if result["status"] != 75 or "preempted: " not in result["log"] or not sent.exists():
        return f"{faults}: status {result['status']}: {result['log'][-2000:]}"
    at, *workers = sent.read_text().split()
    if (seconds := result["ended"] - float(at)) > LIMIT_SECONDS:
        return f"{faults}: took {seconds:.1f} s"
    time.sleep(1.0)
    if left := [pid for pid in workers if Path(f"/proc/{pid}").exists()]:
        return f"{faults}: processes {left} are left"
    result = lab.train(run_dir, args)
    shutil.rmtree(store)
    return "" if result["status"] == 0 else f"{faults}: did not go on: {result['log'][-2000:]}"


STOP_ROWS = {"group": group, "sigterm": sigterm}
