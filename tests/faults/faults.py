"""Faults of a run of training: each patches the program in the process that calls it. Nothing of it is in the program.

A point is the name of a place; something happens when a run comes to it for the `at`-th time. SFT_JAX_FAULTS says what,
by name with its arguments; this file, and no other program, reads it:

    SFT_JAX_FAULTS='{"send": {"point": "save", "at": 2, "number": 9, "log": "/tmp/sent"}}' \\
        python tests/faults/faults.py --config=configs/demo.py
"""

import contextlib
import ctypes
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sft_jax import main as main_module
from sft_jax.checkpoint import manager as manager_module
from sft_jax.checkpoint.step_folders import StepFolders
from sft_jax.command_line import run_command
from sft_jax.training import loop

VARIABLE = "SFT_JAX_FAULTS"
STALL_SECONDS = 60.0


def stall_in_c() -> None:
    """What compiling does: the main thread does not come back to the interpreter, whatever signal comes."""
    mutex = ctypes.create_string_buffer(64)
    lock = ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex)
    lock(mutex)


STALLS: dict[str, Callable[[], object]] = {
    "": lambda: None,
    "python": lambda: threading.Event().wait(STALL_SECONDS),
    "c": stall_in_c,
}


def at_call(number: int, happen: Callable[[], object], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, with something that happens before its call of this number, from 1."""
    count = 0

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            happen()
        return function(*args, **kwargs)

    return call


def patch(owner: Any, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    setattr(owner, name, around(getattr(owner, name)))


def around_step(around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Of the compiled step of training: its first call compiles."""
    patch(main_module, "jit_train_step", lambda jit: lambda *args: around(jit(*args)))


def around_batches(around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Of reading a batch to train on."""

    def place(inner: Callable[..., Any]) -> Callable[..., Any]:
        def place_batches(*args: Any) -> Any:
            start = inner(*args)

            def batches(first: int) -> Any:
                read = around(functools.partial(next, start(first)))
                while True:
                    yield read()

            return batches

        return place_batches

    patch(main_module, "place_batches", place)


POINTS: dict[str, Callable[[Callable[[Any], Any]], None]] = {
    "prepare": functools.partial(patch, main_module, "open_train_data"),
    "restore": functools.partial(patch, manager_module.CheckpointManager, "restore"),
    "compile": around_step,
    "step": around_step,
    "data": around_batches,
    "evaluation": functools.partial(patch, loop, "evaluate_all"),
    "save": functools.partial(patch, manager_module.CheckpointManager, "save"),
    "hashing": functools.partial(patch, manager_module, "write_manifest"),
    "export": functools.partial(patch, main_module, "export_pretrained"),
}


def send(point: str, at: int, number: int, log: str, stall: str = "", again: float = 0.0, delay: float = 0.0) -> None:
    """A signal to this process at a point.

    Args:
      log: a file that gets the time of it.
      stall: what the point does from then on.
      delay: seconds until it is sent, while the run goes on; 0: it is sent in the point.
      again: seconds until it is sent once more; 0: it is not.
    """

    def happen() -> None:
        with open(log, "a") as out:
            out.write(f"{time.time()}\n")
        if delay:
            threading.Timer(delay, os.kill, [os.getpid(), number]).start()
            return
        if again:
            threading.Thread(target=lambda: (time.sleep(again), os.kill(os.getpid(), number)), daemon=True).start()
        os.kill(os.getpid(), number)
        STALLS[stall]()

    POINTS[point](functools.partial(at_call, at, happen))


def fail(point: str, at: int, errno: int = 0) -> None:
    """An error at a point: of the disk, by its number, or one that nobody foresees."""

    def happen() -> None:
        raise OSError(errno, os.strerror(errno), "a-file") if errno else RuntimeError(f"by mistake, at {point}")

    POINTS[point](functools.partial(at_call, at, happen))


def count_steps(log: str) -> None:
    """A line for each step that is under way, in a file."""

    def around(step: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            result = step(*args)
            with open(log, "a") as out:
                out.write("step\n")
            return result

        return call

    around_step(around)


def jump(at: int, batch_size: int) -> None:
    """The metrics of the step `at` say that the gradient has jumped, whenever its batch is trained on."""

    def around(step: Callable[..., Any]) -> Callable[..., Any]:
        def call(state: Any, frozen: Any, batch: Any) -> Any:
            state, metrics = step(state, frozen, batch)
            if int(batch.rows[0]) // batch_size + 1 == at:
                metrics["grad_norm"] = metrics["grad_norm"] * 1e6
            return state, metrics

        return call

    around_step(around)


def flip_copy(values: jax.Array, number: int, place: int, bit: int) -> jax.Array:
    """The same with one bit of one byte changed, of the copy, or the part, that the device of this number holds."""
    parts = [np.array(shard.data) for shard in values.addressable_shards]
    flat = parts[number].reshape(-1).view(np.uint8)
    flat[place % flat.size] ^= 1 << bit
    devices = [shard.device for shard in values.addressable_shards]
    placed = [jax.device_put(part, device) for part, device in zip(parts, devices, strict=True)]
    return jax.make_array_from_single_device_arrays(values.shape, values.sharding, placed)


def flip(at: int, number: int) -> None:
    """After the step of this number, counted from 1 in this process, a bit of a parameter is another on one device."""

    def around(step: Callable[..., Any]) -> Callable[..., Any]:
        count = 0

        def call(*args: Any) -> Any:
            nonlocal count
            count += 1
            state, metrics = step(*args)
            if count == at:
                path = min(state.params)
                state.params[path] = flip_copy(state.params[path], number, 0, 0)
            return state, metrics

        return call

    around_step(around)


def see(run_dir: str) -> None:
    """Looking for checkpoints, this process sees those of another folder."""
    patch(manager_module, "find_restorable", lambda find: lambda _, *args: find(StepFolders(run_dir), *args))


def send_to_all_when_workers_are(number: int, log: str, after: float) -> None:
    """A signal to this process and its descendants, as a container or a job gets it, once a process that prepares data
    has been there for some seconds. Their numbers go to the log, which has the time of the signal first."""

    def watch() -> None:
        while not (workers := children(os.getpid())):
            time.sleep(0.001)
        time.sleep(after)
        workers = children(os.getpid())
        with open(log, "a") as out:
            out.write("\n".join([str(time.time()), *map(str, workers)]))
        for pid in [*workers, os.getpid()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    threading.Thread(target=watch, daemon=True).start()


def children(pid: int) -> list[int]:
    return [
        int(child)
        for task in os.listdir(f"/proc/{pid}/task")
        for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split()
    ]


FAULTS = {
    "send_to_all_when_workers_are": send_to_all_when_workers_are,
    "jump": jump,
    "flip": flip,
    "see": see,
    "send": send,
    "fail": fail,
    "count_steps": count_steps,
}


def arm() -> None:
    for name, options in json.loads(os.environ.get(VARIABLE, "{}")).items():
        FAULTS[name](**options)


if __name__ == "__main__":
    arm()
    sys.exit(run_command(main_module.main, sys.argv[1:]))
