"""A step that takes far longer than steps do -> where every thread is, who keeps the others waiting, and status 6.

The loop says where it is. While it trains, a thread looks whether it has stayed in one place for too long; what takes
long and may (compiling, evaluating, saving) is not looked at. With several processes all wait for the one that is
stuck, so all find out at about the same time: each says where it is, and the one that is in another place, or says
nothing, is named.
"""

import faulthandler
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import jax

from sft_jax.datatypes import MachineError
from sft_jax.processes import coordinator, leave, process_place

_LEAST_STEPS = 3
_STEPS = 50
_ANSWER_SECONDS = 10.0
_KEY = "sft_jax/stuck"
DEVICE = "waiting for its devices"


class Watchdog:
    """Watches from construction until `close`.

    Args:
      factor: times the median duration of the last steps; 0: nothing is watched.
      least_seconds: no step is too long before.
    """

    def __init__(self, factor: float, least_seconds: float) -> None:
        self._factor, self._least_seconds = factor, least_seconds
        self._seconds: deque[float] = deque(maxlen=_STEPS)
        self._place = ""
        self._num_places = 0
        self._last_step: float | None = None
        self._closed = threading.Event()
        if factor:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """The loop is there, and this should not take long."""
        self._place, self._num_places = place, self._num_places + 1
        try:
            yield
        finally:
            self._place = ""

    def step_is_over(self) -> None:
        now = time.monotonic()
        if self._last_step is not None:
            self._seconds.append(now - self._last_step)
        self._last_step = now

    def rest(self) -> None:
        """What has just been done is not of a step: leave it out of the durations."""
        self._last_step = None

    def limit_seconds(self) -> float:
        """Infinite until it is known how long steps take: the first ones of a process compile."""
        if len(self._seconds) < _LEAST_STEPS:
            return float("inf")
        return max(self._least_seconds, self._factor * statistics.median(self._seconds))

    def _watch(self) -> None:
        """By counting its own looks, and not by the clock: a process that was suspended is not stuck."""
        interval, number, looks = min(1.0, self._least_seconds / 4), 0, 0
        while not self._closed.wait(interval):
            place = self._place
            looks = looks + 1 if place and number == self._num_places else 0
            number = self._num_places
            if looks * interval > self.limit_seconds():
                self._bark(place, looks * interval)

    def _bark(self, place: str, seconds: float) -> None:
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        usual = statistics.median(self._seconds)
        index, _ = process_place()
        print(
            f"error: process {index} has been at {place} for {seconds:.0f} s, and a step takes {usual:.2g} s. Where "
            f"each thread is stands above. {_who(place)}The last checkpoint is kept: run the same command to go on.",
            file=sys.stderr,
        )
        leave(MachineError.exit_code)


def _who(place: str) -> str:
    """Names the processes that are elsewhere than this one, where all others are at their devices, waiting."""
    client, (index, count) = coordinator(), process_place()
    if client is None:
        return ""
    places, end = {index: place}, time.monotonic() + _ANSWER_SECONDS
    with suppress(jax.errors.JaxRuntimeError):
        client.key_value_set(f"{_KEY}/{index}", place)
    for other in set(range(count)) - {index}:
        with suppress(jax.errors.JaxRuntimeError):
            milliseconds = int(1000 * max(0.1, end - time.monotonic()))
            places[other] = client.blocking_key_value_get(f"{_KEY}/{other}", milliseconds)
    silent = [f"process {other} does not answer" for other in range(count) if other not in places]
    elsewhere = [f"process {other} is at {place}" for other, place in places.items() if DEVICE not in place]
    return "".join(f"Stuck: {what}. " for what in [*silent, *elsewhere])
