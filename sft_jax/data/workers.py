"""Tasks in, made parts out, by this process and others of our own: each of those opens a renderer from the recipe.

They are plain child processes that are spoken to through pipes, and not `multiprocessing`'s: those would import the
program that started the run, with jax and all of the model. A worker ends when its pipe does, so that none outlives its
parent, however that ends; signals to stop are the parent's to handle.
"""

import json
import os
import pickle
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, BinaryIO

from sft_jax.data.child import start_child
from sft_jax.data.preparation import Recipe, Task, make_part
from sft_jax.data.rendering import Renderer
from sft_jax.datatypes import DataError, SftError

_BOOT = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from sft_jax.data.workers import work; work()"


def make_parts_together(tasks: Iterable[Task], count: int, recipe: Recipe, renderer: Renderer) -> None:
    """Make the part of every task, in this process and `count - 1` others. While those start, this one is at work.

    Args:
      renderer: this process's.

    Raises:
      DataError: one of the others was killed; and whatever a task raises, in whichever process.
    """
    pool, waiting = _Pool(recipe), dict[Future[None], Task]()
    with ThreadPoolExecutor(count - 1) as threads:
        try:
            for task in tasks:
                for future in [future for future in waiting if future.done()]:
                    del waiting[future]
                    future.result()
                if len(waiting) < 2 * (count - 1):  # each has one, and another is at hand
                    waiting[threads.submit(pool.make, task)] = task
                else:
                    make_part(task, recipe.source, recipe.data, renderer)
            for future, task in reversed(waiting.items()):
                if future.cancel():
                    make_part(task, recipe.source, recipe.data, renderer)
                else:
                    future.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            pool.close()


class _Pool:
    """The processes, each started when a thread has a task and none is idle."""

    def __init__(self, recipe: Recipe):
        self._recipe = pickle.dumps(recipe)
        self._idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
        self._all: list[subprocess.Popen] = []
        self._lock = threading.Lock()
        self._closed = False

    def make(self, task: Task) -> None:
        try:
            process = self._idle.get_nowait()
        except queue.Empty:
            process = self._start()
        try:
            answer = _ask(process, pickle.dumps(task, 5))
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            raise DataError(
                f"config.data.prepare_processes: a process that prepares data ended with status {process.wait()}. "
                "Did the machine run out of memory? Set fewer processes."
            ) from error
        self._idle.put(process)
        if answer is not None:
            raise answer

    def _start(self) -> subprocess.Popen:
        with self._lock:
            assert not self._closed
            command = [sys.executable, "-c", _BOOT, json.dumps(sys.path)]
            env = os.environ | {"JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"}
            process = start_child(command, env=env)
            self._all.append(process)
        assert process.stdin is not None
        process.stdin.write(self._recipe)
        return process

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        with self._lock:
            self._closed = True
            for process in self._all:
                process.kill()
        for process in self._all:
            process.wait()
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdout.close()
            with suppress(BrokenPipeError):  # of what was not flushed
                process.stdin.close()


def _ask(process: subprocess.Popen, question: bytes) -> Exception | None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(question)
    process.stdin.flush()
    return pickle.load(process.stdout)


# --- In the worker ----------------------------------------------------------------------------------------------------


def work() -> None:
    """A recipe and then tasks from stdin; after each, None or what it raised to stdout. Never returns."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, tasks), daemon=True).start()
    recipe: Recipe = tasks.get()
    renderer = None
    while True:
        task = tasks.get()
        answer: Exception | None = None
        try:
            renderer = renderer or recipe.open()
            make_part(task, recipe.source, recipe.data, renderer)
        except (SftError, OSError) as error:
            answer = error
        except Exception:  # a mistake of ours: the parent shows where
            answer = RuntimeError(f"in a process that prepares data:\n{traceback.format_exc()}")
        pickle.dump(answer, answers)
        answers.flush()


def _listen(questions: BinaryIO, tasks: queue.SimpleQueue) -> None:
    """Until the parent closes the pipe, or dies: then this process ends, in the middle of a part if need be."""
    try:
        while True:
            tasks.put(pickle.load(questions))
    except (EOFError, pickle.UnpicklingError):
        os._exit(0)
    except BaseException:  # a recipe that this process cannot read
        traceback.print_exc()
        os._exit(1)
