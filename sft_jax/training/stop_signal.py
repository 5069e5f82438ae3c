"""SIGTERM -> an end at which no finished step is lost, in whatever phase, by all processes together.

    before    up to the first step of this process: nothing can be lost, so the run ends at once
    training  the loop asks at every tick (a step, a batch of an evaluation) and saves the last finished step
    after     the last step is saved: at once

A handler of Python runs only when the main thread comes back from C++, which compiling takes minutes to do. So a thread
hears of the signal too, by the file descriptor that the interpreter writes to from within the signal, and ends the
process where the handler could not. With several processes, one that is told tells the others through the coordinator,
and each says where it is: all end at once if one is still `before`, else they all go on to the tick after the latest.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax

from sft_jax.datatypes import PREEMPTED_EXIT_CODE
from sft_jax.processes import coordinator, leave, process_place

GRACE_SECONDS = 5.0
"""For a main thread that is in Python to clear up after itself."""
AGREE_SECONDS = 20.0
_POLL_SECONDS = 2.0
_KEY = "sft_jax/stop"
_BEFORE, _TRAINING, _AFTER = -1, 0, 1 << 62
_AT_ONCE = "nothing was under way that is not saved. Run the same command to go on."


class Preempted(BaseException):
    """The run was told to stop, and its last finished step is saved. No `except Exception` may swallow it."""


class Interrupted(BaseException):
    """To the loop of training: save the last finished step, and stop."""


class StopSignal:
    """Hears SIGTERM from construction until `close`; further ones change nothing. Outside the main thread it hears
    none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phase, self._tick = _BEFORE, 0
        self._stop_tick: int | None = None
        self._may_raise = self._waiting = False
        self._closed = threading.Event()
        self._wakeup: tuple[int, int] | None = None
        if threading.current_thread() is threading.main_thread():
            self._wakeup = os.pipe()
            os.set_blocking(self._wakeup[1], False)
            self._old = signal.signal(signal.SIGTERM, self._handle)
            self._old_wakeup = signal.set_wakeup_fd(self._wakeup[1], warn_on_full_buffer=False)
            self._watcher = threading.Thread(target=self._watch, name="stop signal", daemon=True)
            self._watcher.start()

    def __enter__(self) -> "StopSignal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:  # from here on the watcher sends no signal, for which there would be no handler
            self._closed.set()
        if self._wakeup is None:
            return
        signal.set_wakeup_fd(self._old_wakeup)
        # Of a process that was told to stop, its status says so: one more must not end it before it has given that.
        signal.signal(signal.SIGTERM, self._old if self._stop_tick is None else signal.SIG_IGN)
        os.close(self._wakeup[1])
        self._watcher.join()
        os.close(self._wakeup[0])
        self._wakeup = None

    def begin_training(self) -> None:
        """The first step of this process is under way: from here on a stop waits for the loop."""
        with self._lock:
            self._phase = _TRAINING

    def end_training(self) -> None:
        """The last step is saved.

        Raises:
          Preempted: the run was told to stop meanwhile.
        """
        with self._lock:
            self._phase = _AFTER
        if self._stop_tick is not None:
            raise Preempted(f"after the last step, which is saved; {_AT_ONCE}")

    def check(self) -> None:
        """All processes ask in the same order, and are answered alike.

        Raises:
          Interrupted: now is the time to stop.
        """
        with self._lock:
            self._tick += 1
            stops = self._stop_tick is not None and self._tick >= self._stop_tick
        if stops:
            raise Interrupted

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what may take for ever and changes nothing, such as reading a batch. In a run of one process a stop
        breaks into it. Of several, the others would wait for this one in their next step.

        Raises:
          Interrupted: from anywhere within.
        """
        self._waiting = coordinator() is None
        try:
            if self._waiting and self._stop_tick is not None:
                raise Interrupted
            yield
        finally:
            self._waiting = False

    def _handle(self, *_: Any) -> None:
        """In the main thread, wherever that is: at the signal, and again when the watcher knows what to do."""
        if self._stop_tick is None or self._closed.is_set():
            return
        if self._may_raise:
            self._may_raise = self._waiting = False  # what unwinds is not to be broken into
            raise Preempted(_AT_ONCE)
        if self._waiting:
            self._waiting = False
            raise Interrupted

    def _watch(self) -> None:
        while not self._told():
            if self._closed.is_set():
                return
        if self._agree():
            if not self._closed.wait(GRACE_SECONDS):
                os.write(2, f"preempted: {_AT_ONCE}\n".encode())
                leave(PREEMPTED_EXIT_CODE)
            return
        # A signal that comes when the main thread has looked for one, and before it sleeps, does not wake it.
        while not self._closed.wait(_POLL_SECONDS):
            if self._waiting:
                self._call_handler()

    def _told(self) -> bool:
        assert self._wakeup is not None
        if select.select([self._wakeup[0]], [], [], _POLL_SECONDS)[0]:
            return signal.SIGTERM in os.read(self._wakeup[0], 4096)
        if coordinator() is not None:
            with suppress(jax.errors.JaxRuntimeError):
                return bool(coordinator().key_value_try_get(_KEY))
        return False

    def _agree(self) -> bool:
        """Whether the run ends at once; else from `_stop_tick` on. Until all agree, the loop waits at its next tick."""
        with self._lock:
            places = [self._tick if self._phase == _TRAINING else self._phase]
            try:
                places = _gather(places[0])
            except jax.errors.JaxRuntimeError as error:
                if self._phase == _TRAINING:
                    print(f"told to stop, and not all processes answer: {error}", file=sys.stderr)
                    return False
            at_once = _BEFORE in places or self._phase == _AFTER
            self._stop_tick, self._may_raise = max(places) + 1, at_once
        self._call_handler()
        return at_once

    def _call_handler(self) -> None:
        """In the main thread, which a signal wakes from what it waits for."""
        with self._lock:
            if not self._closed.is_set():
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


def _gather(place: int) -> list[int]:
    """Where each process is."""
    client, (index, count) = coordinator(), process_place()
    if client is None:
        return [place]
    client.key_value_set(_KEY, "stop", allow_overwrite=True)
    client.key_value_set(f"{_KEY}/{index}", str(place))
    end = time.monotonic() + AGREE_SECONDS
    return [
        int(client.blocking_key_value_get(f"{_KEY}/{other}", int(max(1.0, end - time.monotonic()) * 1000)))
        for other in range(count)
    ]
