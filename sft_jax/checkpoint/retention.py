"""The steps of a run -> those that are no longer needed."""

import dataclasses
from collections.abc import Mapping

from sft_jax.checkpoint.manifest import Manifest


@dataclasses.dataclass(frozen=True)
class Retention:
    """What is kept: the newest `latest` steps; every step that `every` divides (0: none); and the `best` ones."""

    latest: int = 2
    every: int = 0
    best: bool = False

    def superfluous(self, saved: Mapping[int, Manifest]) -> list[int]:
        """The best step is the last that was saved as the best."""
        kept = set(sorted(saved)[-self.latest :])
        if self.every:
            kept |= {step for step in saved if step % self.every == 0}
        losses = {step: manifest.best_loss for step, manifest in saved.items() if manifest.best_loss is not None}
        if self.best and losses:
            kept.add(min(losses, key=lambda step: (losses[step], step)))
        return sorted(set(saved) - kept)

    def most(self, num_steps: int) -> int:
        """How many steps there are at most, in a run of `num_steps`."""
        return self.latest + int(self.best) + (num_steps // self.every if self.every else 0)
