"""Each step's loss and gradient norm -> whether one of them has jumped, by a window that no value can poison.

What is usual is the median of the last steps, and by how much steps differ is the median of their distances from it
(MAD). Neither moves far for a single value, however large; a value that is not finite does not enter at all. With
rewinding, a run goes back to its last checkpoint and passes over the batches that it jumped at.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from sft_jax.config_schema import SpikeConfig

NAMES = ("loss", "grad_norm")
_LEAST = 16
"""Steps before there is a usual."""
_SIGMAS_PER_MAD = 1.4826
"""Of a normal distribution."""
_LEAST_SIGMA = 0.01
"""As a share of the median: what does not differ at all is no measure."""


class SpikeRewind(Exception):
    """A step has jumped: go back, and pass over its batch."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


class SpikeWatch:
    """It travels with the checkpoints, so that a resumed run decides alike.

    Args:
      state: what `to_json` gave.
    """

    def __init__(self, config: SpikeConfig, state: Mapping[str, Any] | None = None) -> None:
        state = state or {}
        self._config = config
        self._windows = {name: deque(state.get(name, ()), maxlen=max(1, config.window)) for name in NAMES}
        self.skipped: set[int] = set(state.get("skipped", ()))
        """The steps, from 1, whose batches are passed over."""

    def to_json(self) -> dict[str, Any]:
        return {**{name: list(window) for name, window in self._windows.items()}, "skipped": sorted(self.skipped)}

    def add(self, record: Mapping[str, float]) -> dict[str, float]:
        """`{"spike/loss": sigmas}` of what jumps in this step's record. It enters the window all the same: a new level
        becomes the usual one."""
        if not self._config.window:
            return {}
        found = {}
        for name, window in self._windows.items():
            value = record[name]
            if not math.isfinite(value):
                continue
            if len(window) >= min(_LEAST, self._config.window) and (sigmas := _distance(value, window)) > (
                self._config.threshold
            ):
                found[f"spike/{name}"] = sigmas
            window.append(value)
        return found

    @property
    def may_rewind(self) -> bool:
        return self._config.rewind and len(self.skipped) < self._config.max_rewinds


def _distance(value: float, window: deque[float]) -> float:
    """In robust standard deviations above the median."""
    median = statistics.median(window)
    sigma = _SIGMAS_PER_MAD * statistics.median(abs(one - median) for one in window)
    return (value - median) / max(sigma, _LEAST_SIGMA * abs(median), 1e-30)
