"""Examples of several sources in, those of one epoch out: how often each source is seen. numpy only.

Each source is laid out as an endless row of passes, each over all of its examples in an order of its own, and epoch `e`
is the stretch [e * c, (e + 1) * c) of it, of c examples. With five examples and c = 2 (0.4 passes an epoch):

    pass      0 0 0 0 0 1 1 1 1 1        epoch 0: 3, 1        epoch 2: 2 and then 4
    example   3 1 4 0 2 4 2 0 3 1        epoch 1: 4, 0        epoch 3: 2, 0

so all examples are seen equally often in the long run. Which ones an epoch holds follows from (sizes, seed, epoch).
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from sft_jax.config_schema import SourceConfig
from sft_jax.datatypes import ConfigError

MIXTURE_VERSION = 1
"""Raised whenever the same sizes and seed give other examples in some epoch: a resumed run must notice."""


def passes_per_epoch(sources: Sequence[SourceConfig], sizes: Sequence[int], fields: Sequence[str]) -> list[Fraction]:
    """How often an epoch goes through each source, exactly.

    With weights, the source that is scarcest for its weight is seen once, and the others in proportion: of 100 and 900
    examples with weights 1 and 3, all of the first and 300 of the second.

    Args:
      fields: the config fields that name the sources, for errors.

    Raises:
      ConfigError: a share is so small that an epoch may have no example of the source.
    """
    if sources[0].weight is None:
        passes = [_exact(source.epochs) for source in sources]
    else:
        weights = [_exact(source.weight or 0) for source in sources]
        scarcest = min(size / weight for size, weight in zip(sizes, weights, strict=True))
        passes = [scarcest * weight / size for size, weight in zip(sizes, weights, strict=True)]
    for field, source, size, share in zip(fields, sources, sizes, passes, strict=True):
        if share * size < 1:
            name = "epochs" if source.weight is None else "weight"
            raise ConfigError(
                f"{field}.{name}: is {getattr(source, name)}, which of its {size:,} examples takes "
                f"{float(share * size):.2g} an epoch. Raise it, so that an epoch has one at least."
            )
    return passes


def _exact(number: float) -> Fraction:
    """0.1 as 1/10."""
    return Fraction(str(number))


class Mixture:
    """The examples of each epoch.

    Args:
      examples: the ids of each source's examples, ascending.
      passes: how often an epoch goes through each.
      seed: None for no shuffling: every pass in the order of the ids.
    """

    def __init__(self, examples: Sequence[np.ndarray], passes: Sequence[Fraction], seed: int | None):
        self._examples, self._seed = tuple(examples), seed
        self._counts = [share * len(ids) for ids, share in zip(examples, passes, strict=True)]
        self.is_constant = all(share.denominator == 1 for share in passes)
        """Whether all epochs hold the same examples."""

    def epoch(self, epoch: int) -> np.ndarray:
        """Source by source, the ids of the examples of one epoch, int64; an example may be there several times."""
        return np.concatenate([self._stretch(source, epoch) for source in range(len(self._examples))])

    def count(self, source: int, epoch: int) -> int:
        """How many examples an epoch has of a source."""
        begin, end = self._bounds(source, epoch)
        return end - begin

    def _bounds(self, source: int, epoch: int) -> tuple[int, int]:
        return int(epoch * self._counts[source]), int((epoch + 1) * self._counts[source])

    def _stretch(self, source: int, epoch: int) -> np.ndarray:
        ids, (begin, end) = self._examples[source], self._bounds(source, epoch)
        pieces = []
        while begin < end:
            number, offset = divmod(begin, len(ids))
            count = min(end - begin, len(ids) - offset)
            # Of a whole pass the order does not matter: packing draws its own.
            chosen = ids if count == len(ids) else np.sort(ids[self._order(source, number)[offset : offset + count]])
            pieces.append(chosen)
            begin += count
        return np.concatenate(pieces)

    def _order(self, source: int, number: int) -> np.ndarray:
        """The order of a source's pass, by sorting raw Philox words, which numpy promises never to change. The counter
        keeps them apart from those that packing draws for the same seed."""
        size = len(self._examples[source])
        if self._seed is None:
            return np.arange(size)
        key, counter = np.array([self._seed, number], np.uint64), np.array([0, 0, source, 1], np.uint64)
        return np.argsort(np.random.Philox(key=key, counter=counter).random_raw(size), kind="stable")
