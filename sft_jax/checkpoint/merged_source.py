"""A kernel of the base and its adapter, both on disk -> the plain model's kernel, one layer at a time on the host."""

from collections.abc import Callable, Mapping
from functools import partial
from threading import Lock

import jax
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
          parts: the parameters that the linear map had in training, by name, stacked by layers.
          num_stack: how many of the kernel's dims, the first ones, stack it: layers, and experts.
          num_out: how many of the kernel's dims, the last ones, are not summed over.
        """
        self._kernel, self._parts = kernel, parts
        self._make: Callable[[Mapping[str, Array]], Array] = (
            partial(merge_kernel, num_out=num_out, lora_scale=lora_scale)
            if "lora_a" in parts
            else partial(read_kernel, num_out=num_out, dtype="float32")
        )
        for _ in range(num_stack - 1):  # the experts of a layer
            self._make = jax.vmap(self._make)
        self.shape, self.dtype = kernel.shape, np.dtype(np.float32)
        self._lock, self._made = Lock(), (-1, np.zeros(()))  # the last layer: it is asked for in pieces

    def __str__(self) -> str:
        return str(self._kernel)

    def read(self, index: Index, out: np.ndarray) -> None:
        for row, layer in zip(out, range(index[0].start, index[0].stop), strict=True):
            with self._lock:
                merged = self._merge(layer)
            copy_in_blocks(row, merged[index[1:]])
        check_finite(out, self)

    def _merge(self, layer: int) -> np.ndarray:
        if self._made[0] != layer:
            self._made = (-1, np.zeros(()))  # dropped before the next one is made
            values = {name: jnp.asarray(_read_layer(part, layer)) for name, part in self._parts.items()}
            self._made = (layer, np.asarray(self._make(values)))
        return self._made[1]


def _read_layer(part: HeldArray, layer: int) -> np.ndarray:
    rest = (slice(0, size) for size in part.shape[1:])
    return part.read((slice(layer, layer + 1), *rest))[0]
