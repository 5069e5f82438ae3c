"""Rows of runs that are killed, and go on: each a trial by its number, which says what went wrong, or nothing."""

import os
import random
import signal

from training import BATCH_SIZE, NUM_STEPS, SAVE_EVERY, TrainingLab, metrics, newest_step

_POINTS = ("restore", "compile", "step", "data", "evaluation", "save", "hashing", "export")


def kill(lab: TrainingLab, trial: int) -> str:
    """SIGKILL up to three times, at random points of a run or a random time after; then it ends, bit-equal."""
    rng = random.Random(f"{lab.seed} {trial}")
    run_dir, lost = lab.new(), []
    for _ in range(rng.randint(1, 3)):
        fault = {"point": rng.choice(_POINTS), "at": rng.randint(1, 3), "number": signal.SIGKILL, "log": os.devnull}
        fault["delay"] = rng.choice([0.0, rng.uniform(0.01, 0.5)])
        steps = run_dir.with_suffix(".steps")
        steps.write_text("")
        before = newest_step(run_dir) or 0
        result = lab.train(run_dir, faults={"send": fault, "count_steps": {"log": str(steps)}})
        if result["status"] not in (0, -signal.SIGKILL):
            return f"{fault}: status {result['status']}: {result['log'][-2000:]}"
        done = before + len(steps.read_text().splitlines())
        lost.append(done - (newest_step(run_dir) or 0))
        if lost[-1] > SAVE_EVERY + 1:
            return f"{fault}: {lost[-1]} steps are lost"
    result = lab.train(run_dir)
    if result["status"]:
        return f"{fault}: did not go on: {result['log'][-2000:]}"
    return (problem := lab.differences(run_dir)) and f"{fault}, lost {lost}: {problem}"


def rewind(lab: TrainingLab, trial: int) -> str:
    """A step jumps: the run goes back and passes over its batch, and does the same if it is killed on the way."""
    rng = random.Random(f"{lab.seed} {trial}")
    at = rng.randint(SAVE_EVERY + 2, NUM_STEPS - 2)
    args = ["--config.spikes.window=4", "--config.spikes.threshold=1000.0", "--config.spikes.rewind=true"]
    jump = {"jump": {"at": at, "batch_size": BATCH_SIZE}}
    runs = [lab.new(), lab.new()]
    # The call of the step after the jump finds it; those after that are of the run that has gone back.
    stop = {"point": "step", "at": at + 1 + rng.randint(1, 3), "number": signal.SIGKILL, "log": os.devnull}
    results = [
        lab.train(runs[0], args, jump),
        lab.train(runs[1], args, {"send": stop} | jump),
        lab.train(runs[1], args, jump),
    ]
    where = f"jump at {at}, killed at step call {stop['at']}"
    if (statuses := [result["status"] for result in results]) != [0, -signal.SIGKILL, 0]:
        return f"{where}: statuses {statuses}: {results[-1]['log'][-2000:]}"
    one, other = map(metrics, runs)
    trained = sorted(step for step, name in one if name == "loss")
    if trained != [step for step in range(1, NUM_STEPS + 1) if step != at]:
        return f"{where}: trained on {trained}"
    if "has jumped: back to step" not in results[0]["log"]:
        return f"{where}: was not said"
    return "" if one == other else f"{where}: the run that was killed is another"


def rerun(lab: TrainingLab, trial: int) -> str:
    """The same run three times, 1,000 steps each."""
    args = [
        "--config.schedule.num_steps=1000",
        "--config.checkpoint.every_steps=0",
        "--config.evaluation.every_steps=0",
    ]
    runs = [lab.new(), lab.new(), lab.new()]
    for run_dir in runs:
        if (result := lab.train(run_dir, args))["status"]:
            return result["log"][-1500:]
    first, *others = map(metrics, runs)
    return "" if (1000, "loss") in first and all(one == first for one in others) else "the runs differ"


def mixed(lab: TrainingLab, trial: int) -> str:
    """Thirty ends of one run of 300 steps, by SIGKILL and SIGTERM at random points: it ends as if there were none."""
    rng = random.Random(f"{lab.seed} {trial}")
    args = ["--config.schedule.num_steps=300"]
    oracle, run_dir = lab.scratch / "of-300", lab.new()
    if not oracle.exists() and (result := lab.train(oracle, args))["status"]:
        return result["log"][-2000:]
    steps = run_dir.with_suffix(".steps")
    steps.write_text("")
    ends = []
    while len(ends) < 30:
        number = rng.choice([signal.SIGKILL, signal.SIGTERM])
        fault = {"point": rng.choice(_POINTS[:-1]), "at": rng.randint(1, 9), "number": number, "log": os.devnull}
        fault["delay"] = rng.choice([0.0, rng.uniform(0.01, 0.5)])
        result = lab.train(run_dir, args, {"send": fault, "count_steps": {"log": str(steps)}})
        if result["status"] == 0:
            break  # over before it was hit
        ends.append(result["status"])
        if result["status"] not in (75, -signal.SIGKILL):
            return f"{fault}: status {result['status']}: {result['log'][-2000:]}"
    result = lab.train(run_dir, args, {"count_steps": {"log": str(steps)}})
    done = len(steps.read_text().splitlines())
    print(
        f"mixed: {len(ends)} ends, {ends.count(75)} of them by SIGTERM; goodput {300 / done:.0%}: {done} steps for 300"
    )
    if result["status"]:
        return f"did not go on: {result['log'][-2000:]}"
    if len(ends) < 30:
        return f"over after {len(ends)} ends"
    return "" if metrics(run_dir) == metrics(oracle) else "ends as another run"


KILL_ROWS = {"mixed": mixed, "rerun": rerun, "kill": kill, "rewind": rewind}
