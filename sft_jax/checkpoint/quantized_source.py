"""Where a kernel's values lie -> its codes and scales (model/quantized.py), one part of one layer at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from sft_jax.checkpoint.param_source import ParamSource, read_box
from sft_jax.checkpoint.stored_tensor import Index
from sft_jax.model import quantized


class HeldArray(NamedTuple):
    """An array that a source becomes: its shape, and how to read a box of it."""

    shape: tuple[int, ...]
    read: Callable[[Index], np.ndarray]


@dataclass(frozen=True)
class QuantizedSource:
    """A stacked kernel in blocks along `axis`, the last dim that is summed over."""

    source: ParamSource
    axis: int
    block: int
    form: str
    num_stack: int
    """How many of the dims, the first ones, stack kernels: layers, and experts. One kernel is encoded at a time."""

    def codes(self) -> HeldArray:
        encode = partial(quantized.encode, axis=self.axis, block=self.block, form=self.form)
        return self._held(encode, self.block // quantized.codes_per_byte(self.form))

    def scales(self) -> HeldArray:
        return self._held(partial(quantized.find_scales, axis=self.axis, block=self.block, form=self.form), 1)

    def _held(self, make: Callable[[np.ndarray], np.ndarray], per_block: int) -> HeldArray:
        before, after = self.source.shape[: self.axis], self.source.shape[self.axis + 1 :]
        shape = (*before, self.source.shape[self.axis] // self.block * per_block, *after)
        return HeldArray(shape, partial(self._read, make, per_block))

    def _read(self, make: Callable[[np.ndarray], np.ndarray], per_block: int, index: Index) -> np.ndarray:
        # Reading twice, for codes and for scales, costs less than holding both: the pages are in memory by then.
        at = index[self.axis]
        first, last = at.start // per_block, -(-at.stop // per_block)  # a shard may begin inside a block
        kept = (*[slice(None)] * self.axis, slice(at.start - first * per_block, at.stop - first * per_block))
        stack, before = index[: self.num_stack], index[self.num_stack : self.axis]
        whole = (*before, slice(first * self.block, last * self.block), *index[self.axis + 1 :])
        sizes = [at.stop - at.start for at in stack]
        made = []
        for offsets in np.ndindex(*sizes):
            place = (slice(at.start + i, at.start + i + 1) for at, i in zip(stack, offsets, strict=True))
            made.append(make(read_box(self.source, (*place, *whole), "float32"))[kept])
        one = made[0].shape[self.num_stack :]
        return np.concatenate(made).reshape(*sizes, *one)
