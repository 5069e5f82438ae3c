"""A kernel of the base and its adapter, both on disk -> the plain model's kernel, one layer, or one expert of a layer,
at a time on the host."""

from collections.abc import Callable, Mapping
from functools import partial
from threading import Lock

import jax.numpy as jnp
import numpy as np

from sft_jax.checkpoint.param_source import ParamSource, check_finite
from sft_jax.checkpoint.quantized_source import HeldArray
from sft_jax.checkpoint.stored_tensor import Index, copy_in_blocks
from sft_jax.model.linear import merge_kernel, read_kernel
from sft_jax.typing import Array


class MergedSource(ParamSource):
    """What `lora.merge_adapters` makes of the same parameters."""

    def __init__(
        self, kernel: ParamSource, parts: Mapping[str, HeldArray], num_stack: int, num_out: int, lora_scale: float
    ) -> None:
        """
        Args:
          kernel: of the base, as it is stored: says the shape.
          parts: the parameters that the linear map had in training, by name, stacked as the kernel is.
          num_stack: how many of the kernel's dims, the first ones, stack it: layers, and experts.
          num_out: how many of the kernel's dims, the last ones, are not summed over.
        """
        self._kernel, self._parts = kernel, parts
        self._make: Callable[[Mapping[str, Array]], Array] = (
            partial(merge_kernel, num_out=num_out, lora_scale=lora_scale)
            if "lora_a" in parts
            else partial(read_kernel, num_out=num_out, dtype="float32")
        )
        self._num_stack = num_stack
        self.shape, self.dtype = kernel.shape, np.dtype(np.float32)
        self._lock = Lock()
        self._made: tuple[tuple[int, ...], np.ndarray] = ((), np.zeros(()))  # the last one: it is asked for in pieces

    def __str__(self) -> str:
        return str(self._kernel)

    def read(self, index: Index, out: np.ndarray) -> None:
        stack, rest = index[: self._num_stack], index[self._num_stack :]
        for offsets in np.ndindex(out.shape[: self._num_stack]):
            with self._lock:
                merged = self._merge(tuple(at.start + offset for at, offset in zip(stack, offsets, strict=True)))
            copy_in_blocks(out[offsets], merged[rest])
        check_finite(out, self)

    def _merge(self, place: tuple[int, ...]) -> np.ndarray:
        if self._made[0] != place:
            self._made = ((), np.zeros(()))  # dropped before the next one is made
            values = {name: jnp.asarray(_read_at(part, place)) for name, part in self._parts.items()}
            self._made = (place, np.asarray(self._make(values)))
        return self._made[1]


def _read_at(part: HeldArray, place: tuple[int, ...]) -> np.ndarray:
    """What a place of the stack has of it."""
    stack = (slice(at, at + 1) for at in place)
    rest = (slice(0, size) for size in part.shape[len(place) :])
    return part.read((*stack, *rest))[(0,) * len(place)]
