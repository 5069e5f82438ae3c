"""Rows of runs of several processes, one of which dies, is stuck or sees other files, or which are others when the run
goes on: each a trial by its number, which says what went wrong, or nothing."""

import json
import random
import shutil
import signal
from functools import cached_property
from pathlib import Path
from typing import Any

import damage
from local import reserved_port
from training import TrainingLab, metrics, start_worker, stop_worker, xla_flags

from sft_jax.processes import BEAT_SECONDS, MISSED_BEATS

LIMIT_SECONDS = BEAT_SECONDS * (MISSED_BEATS + 1) + 5
NUM_DEVICES = 8
WATCH = ["--config.watch.stall_seconds=3.0", "--config.watch.stall_factor=5.0"]
TOLERANCE = 1e-5


class RankLab(TrainingLab):
    """Runs of one to four processes, of eight devices together or, by a process alone, of as many as it is told."""

    @cached_property
    def workers(self) -> list[Any]:
        return [start_worker(NUM_DEVICES) for _ in range(4)]

    def train_together(
        self,
        run_dir: Path,
        args: list[str],
        faults: dict[int, Any],
        num_processes: int = 2,
        num_devices: int = NUM_DEVICES,
    ) -> list[dict[str, Any]]:
        """How each process ended. Those with faults are waited for last, and not long."""
        logs = [run_dir.with_suffix(f".{index}.log") for index in range(num_processes)]
        ended = dict[int, dict[str, Any]]()
        with reserved_port() as port:
            for index, log in enumerate(logs):
                env = {
                    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(num_processes),
                    "JAX_PROCESS_ID": str(index), "XLA_FLAGS": xla_flags(num_devices // num_processes),
                }  # fmt: skip
                joined = [f"--config.run.distributed={str(num_processes > 1).lower()}"]
                together = [*args, *joined, "--config.checkpoint.export=false"]
                self.begin(self.workers[index], run_dir, log, together, faults.get(index, {}), env)
            for index in sorted(range(num_processes), key=lambda index: index in faults):
                limit = 25.0 if index in faults and len(ended) else 120.0
                ended[index] = self.end(self.workers[index], logs[index], limit)
        return [ended[index] for index in range(num_processes)]

    def finished_by(self, num_processes: int) -> Path:
        """A run that nothing has disturbed."""
        run_dir = self.scratch / f"by-{num_processes}"
        if not run_dir.exists():
            for result in self.train_together(run_dir, [], {}, num_processes):
                assert result["status"] == 0, result["log"]
        return run_dir

    @cached_property
    def hundred(self) -> dict[tuple[int, str], float]:
        """Of 100 steps by one process with eight devices."""
        return values(self.go_on(self.scratch / "hundred", 1, NUM_DEVICES))

    def go_on(
        self, run_dir: Path, num_processes: int, num_devices: int, until: int | None = None, microbatches: int = 2
    ) -> Path:
        """A run of 100 steps by so many, to its end, or for about so many steps."""
        args = ["--config.schedule.num_steps=100", "--config.evaluation.every_steps=0"]
        args += ["--config.checkpoint.every_steps=0", f"--config.mesh.fsdp={min(2, num_devices)}"]
        args += [f"--config.batch.grad_accum_steps={microbatches}"]
        stop = {"point": "data", "at": until, "number": signal.SIGTERM, "log": "/dev/null"}
        faults = {0: {"send": stop}} if until else {}
        for result in self.train_together(run_dir, args, faults, num_processes, num_devices):
            assert result["status"] == (75 if until else 0), result["log"][-2000:]
        return run_dir

    def goes_on(self, run_dir: Path, num_processes: int = 2) -> str:
        results = self.train_together(run_dir, [], {}, num_processes)
        if any(result["status"] for result in results):
            return f"did not go on: {results[0]['log'][-1500:]}"
        return "" if metrics(run_dir) == metrics(self.finished_by(num_processes)) else "goes on as another run"

    def close(self) -> None:
        super().close()
        if "workers" in vars(self):
            for worker in self.workers:
                stop_worker(worker)


def values(run_dir: Path) -> dict[tuple[int, str], float]:
    """By step and name, what says how the run went, and which rows it has read."""
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    names = ("loss", "weight_sum", "padding_fraction")
    return {(record["step"], name): record[name] for record in records if "loss" in record for name in names}


def dead_rank(lab: RankLab, trial: int) -> str:
    """One process of two, or of four, is killed or stopped; the others end, and name it."""
    rng = random.Random(f"{lab.seed} {trial}")
    num_processes, number = (2, 4)[trial % 2], (signal.SIGKILL, signal.SIGSTOP)[trial // 2 % 2]
    dead = rng.randrange(num_processes)
    run_dir = lab.new()
    sent = run_dir.with_suffix(".sent")
    point = rng.choice(["step", "data", "evaluation", "save"])
    fault = {"point": point, "at": rng.randint(2, 3), "number": number, "log": str(sent)}
    results = lab.train_together(run_dir, [], {dead: {"send": fault}}, num_processes)
    for index, result in enumerate(results):
        if index != dead:
            seconds = result["ended"] - float(sent.read_text())
            said = f"process {dead} has been silent" in result["log"]
            if result["status"] == 0 or seconds > LIMIT_SECONDS or (dead and not said):
                return (
                    f"{fault} of {dead}: {index} ended with {result['status']} after {seconds:.1f} s: "
                    + (result["log"][-1500:])
                )
    return (problem := lab.goes_on(run_dir, num_processes)) and f"{fault} of {dead}: {problem}"


def stuck(lab: RankLab, trial: int) -> str:
    """One process stays in one place for ever: the watchdogs of all find it, and name it."""
    rng = random.Random(f"{lab.seed} {trial}")
    stuck = rng.randrange(2)
    run_dir = lab.new()
    sent = run_dir.with_suffix(".sent")
    fault = {"point": "data", "at": rng.randint(6, 11), "number": signal.SIGCONT, "log": str(sent)}
    fault["stall"] = rng.choice(["python", "c"])
    results = lab.train_together(run_dir, WATCH, {stuck: {"send": fault}})
    for index, result in enumerate(results):
        if result["status"] != 6 or f"Stuck: process {stuck} is at step" not in result["log"]:
            return f"{fault} of {stuck}: {index} ended with {result['status']}: {result['log'][-1500:]}"
        if "watchdog.py" not in result["log"]:
            return f"{fault} of {stuck}: {index} has no stacks"
    return (problem := lab.goes_on(run_dir)) and f"{fault} of {stuck}: {problem}"


def healthy(lab: RankLab, trial: int) -> str:
    """500 steps by two processes, with evaluations and saves, watched as closely: nothing is found."""
    run_dir = lab.new()
    args = [
        *WATCH,
        "--config.schedule.num_steps=500",
        "--config.checkpoint.every_steps=50",
        f"--config.run.seed={trial}",
    ]
    for index, result in enumerate(lab.train_together(run_dir, args, {})):
        if result["status"]:
            return f"{index} ended with {result['status']}: {result['log'][-1500:]}"
    return "" if (500, "loss") in metrics(run_dir) else "did not train to the end"


def _lose_newest(checkpoints: Path, newest: Path, rng: random.Random) -> None:
    shutil.rmtree(newest)


def _damage_newest(checkpoints: Path, newest: Path, rng: random.Random) -> None:
    damage.damage_some_file(newest, rng)


def _lose_all(checkpoints: Path, newest: Path, rng: random.Random) -> None:
    shutil.rmtree(checkpoints)


def _add_stray(checkpoints: Path, newest: Path, rng: random.Random) -> None:
    (checkpoints / "100000").mkdir()


def _add_copy(checkpoints: Path, newest: Path, rng: random.Random) -> None:
    shutil.copytree(newest, checkpoints / "11")


_OTHER_VIEWS = (_lose_newest, _damage_newest, _lose_all, _add_stray, _add_copy)


def listings(lab: RankLab, trial: int) -> str:
    """One of two processes sees other checkpoints than the other: both go on as one run, or both stop."""
    rng, change = random.Random(f"{lab.seed} {trial}"), _OTHER_VIEWS[trial % len(_OTHER_VIEWS)]
    who = trial // len(_OTHER_VIEWS) % 2
    run_dir = Path(shutil.copytree(lab.finished_by(2), lab.new()))
    steps = sorted((path for path in (run_dir / "checkpoints").iterdir()), key=lambda path: int(path.name))
    shutil.rmtree(steps.pop())  # the last one: the run has something left to do
    view = Path(shutil.copytree(run_dir, lab.new()))
    change(view / "checkpoints", view / "checkpoints" / steps[-1].name, rng)
    results = lab.train_together(run_dir, [], {who: {"see": {"run_dir": str(view)}}})
    where = f"{change.__name__} of {who}"
    statuses = [result["status"] for result in results]
    if statuses == [0, 0]:
        return "" if metrics(run_dir) == metrics(lab.finished_by(2)) else f"{where}: goes on as another run"
    if statuses == [5, 5]:
        return (problem := lab.goes_on(run_dir)) and f"{where}: stopped, {problem}"
    return f"{where}: statuses {statuses}: " + " / ".join(result["log"][-1000:] for result in results)


def elastic(lab: RankLab, trial: int) -> str:
    """Some 25 steps each by 1 process with 8 devices, 2 with 4, 4 with 2, 1 with 1, each with other microbatches: the
    rows and losses of one run."""
    run_dir = lab.new()
    for num_processes, num_devices, until, microbatches in (
        (1, 8, 25, 2),
        (2, 8, 25, 1),
        (4, 8, 25, 2),
        (1, 1, None, 4),
    ):
        lab.go_on(run_dir, num_processes, num_devices, until, microbatches)
    ours, theirs = values(run_dir), lab.hundred
    if ours.keys() != theirs.keys() or (100, "loss") not in ours:
        return f"other steps: {sorted(ours.keys() ^ theirs.keys())[:3]}"
    far = {
        key: (value, theirs[key])
        for key, value in ours.items()
        if abs(value - theirs[key]) > (0 if key[1] == "weight_sum" else TOLERANCE * abs(theirs[key]))
    }
    return "" if not far else f"{len(far)} differ, among them {dict(list(far.items())[:3])}"


RANK_ROWS = {"dead-rank": dead_rank, "stuck": stuck, "healthy": healthy, "listings": listings, "elastic": elastic}
