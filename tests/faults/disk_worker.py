"""Runs under disk.c: for each line of stdin a process of its own saves a step on a disk that fails, and stdout says
what came of it. The processes are forked before jax has a thread, so that a trial does not wait for imports."""

import ctypes
import errno
import json
import os
import random
import sys
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
from runs import make_state

from sft_jax.checkpoint import manager as manager_module
from sft_jax.checkpoint import storage
from sft_jax.checkpoint.manager import CheckpointManager
from sft_jax.checkpoint.restorable import find_restorable
from sft_jax.checkpoint.retention import Retention
from sft_jax.checkpoint.step_folders import StepFolders
from sft_jax.datatypes import StorageError

DISK = ctypes.CDLL(None)


def save_with_faults(run_dir: Path, step: int, first: int, number: int, what: int) -> dict:
    """Save `step`, and steps after it for as long as the manager wants to try again, as a loop of training does."""
    manager_module.backoff_seconds = storage.backoff_seconds = lambda num_failures: 0.01
    with CheckpointManager(run_dir, Retention(2)) as manager:
        manager.find_restorable()
        meta = lambda: {"data": {"seed": step}}  # noqa: E731
        state = make_state(step)
        DISK.disk_arm(str(run_dir).encode(), first, number, what)
        manager.save(step, state, meta())
        while manager.all_steps()[-1:] != [step]:
            failed = manager._pending is not None and manager._pending[1].done()
            if manager.poll():
                step += 1
                manager.save(step, make_state(step), meta())
            elif failed and not manager._retry_at and manager.all_steps()[-1:] != [step]:
                return {"silent": step}  # a save is over that has failed, and the step after it did not hear of it
            time.sleep(0.01)
        manager.wait()
        return {"saved": step, "changes": DISK.disk_count()}


def save_often(run_dir: Path, step: int, seed: int, saves: int, changes: int) -> dict:
    """One attempt in ten meets EIO at one change of the disk: of `saves` steps, how many were committed, and which of
    the commits were not whole."""
    manager_module.backoff_seconds = storage.backoff_seconds = lambda num_failures: 0.01
    rng, committed, refused, bad = random.Random(seed), 0, 0, []
    with CheckpointManager(run_dir, Retention(2)) as manager:
        manager.find_restorable()
        for _ in range(saves):
            while True:
                refuse = rng.random() < 0.1
                refused += refuse
                DISK.disk_arm(str(run_dir).encode(), rng.randint(1, changes) if refuse else 10**9, 1, errno.EIO)
                manager.save(step, make_state(step), {"data": {"seed": step}})
                while manager.last_saved != step and not manager.poll():
                    time.sleep(0.002)
                step += 1
                if manager.last_saved == step - 1:
                    break
            committed += 1
            if find_restorable(StepFolders(run_dir)).step != step - 1:
                bad.append(step - 1)
    return {"committed": committed, "refused": refused, "bad": bad}


def try_once(trial: dict) -> dict:
    run_dir = Path(trial.pop("run_dir"))
    try:
        return (save_often if "saves" in trial else save_with_faults)(run_dir, **trial)
    except StorageError as error:
        return {"error": str(error), "changes": DISK.disk_count()}


def main() -> None:
    for line in sys.stdin:
        receive, send = os.pipe()
        if (child := os.fork()) == 0:
            os.write(send, json.dumps(try_once(json.loads(line))).encode())
            os._exit(0)
        os.close(send)
        with os.fdopen(receive) as said:
            result = said.read()
        _, status = os.waitpid(child, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)} | json.loads(result or "{}")), flush=True)


if __name__ == "__main__":
    main()
