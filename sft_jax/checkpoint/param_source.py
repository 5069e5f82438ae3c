"""Where the values of a parameter lie -> any box of them on the host -> the parameter on its devices, by shards."""

import abc
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from sft_jax.checkpoint.stored_tensor import Index, all_finite
from sft_jax.datatypes import StorageError
from sft_jax.typing import Array

_BLOCK_BYTES = 2**25


class ParamSource(abc.ABC):
    """`str()` says where the values lie, for error messages. `dtype` holds all of them as they are stored."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @abc.abstractmethod
    def read(self, index: Index, out: np.ndarray) -> None:
        """The values of a box, with start and stop in every dim, cast to `out`'s dtype.

        Raises:
          StorageError: they cannot be read, or one is NaN or infinite in that dtype.
        """


class GrownSource(ParamSource):
    """A parameter with more rows than are stored: each of the new ones is the mean of the old."""

    def __init__(self, stored: ParamSource, num_rows: int) -> None:
        self.stored, self.dtype = stored, stored.dtype
        self.shape = (num_rows, *stored.shape[1:])
        total = sum(rows.sum(axis=0, dtype=np.float64) for rows in read_rows(stored))
        self._new_row = np.asarray(total / stored.shape[0], np.float32)

    def __str__(self) -> str:
        return str(self.stored)

    def read(self, index: Index, out: np.ndarray) -> None:
        rows, rest = index[0], index[1:]
        num_old = max(min(rows.stop, self.stored.shape[0]) - rows.start, 0)
        if num_old:
            self.stored.read((slice(rows.start, rows.start + num_old), *rest), out[:num_old])
        out[num_old:] = self._new_row[rest]


def read_rows(source: ParamSource) -> Iterator[np.ndarray]:
    """All of a parameter in float32, some of its rows at a time."""
    step = max(1, _BLOCK_BYTES // (4 * math.prod(source.shape[1:])))
    for box in boxes(source.shape, (step, *source.shape[1:])):
        yield read_box(source, box, "float32")


def read_box(source: ParamSource, index: Index, dtype: str | np.dtype) -> np.ndarray:
    out = np.empty([at.stop - at.start for at in index], jnp.dtype(dtype))
    source.read(index, out)
    return out


def boxes(shape: Sequence[int], step: Sequence[int]) -> Iterator[Index]:
    """A shape cut into boxes of `step`, the last dim's fastest; those at its far sides may be smaller."""
    counts = [-(-size // by) for size, by in zip(shape, step, strict=True)]
    for place in np.ndindex(*counts):
        yield tuple(slice(at * by, min(at * by + by, size)) for at, by, size in zip(place, step, shape, strict=True))


def place_shards(shape: tuple[int, ...], sharding: Sharding, read: Callable[[Index], np.ndarray]) -> Array:
    """`jax.make_array_from_callback`, with one shard on the host at a time instead of all of a process's."""
    devices_by_part: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        if device in sharding.addressable_devices:
            part = tuple(dim.indices(size)[:2] for dim, size in zip(index, shape, strict=True))
            devices_by_part.setdefault(part, []).append(device)
    shards = []
    for part, devices in devices_by_part.items():
        values = read(tuple(slice(*bounds) for bounds in part))
        copies = [jax.device_put(values, device) for device in devices]
        shards += jax.block_until_ready(copies)
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def check_finite(values: np.ndarray, source: object) -> None:
    if not all_finite(values):
        raise StorageError(
            f"{source} has NaN or infinite values (as {values.dtype.name}). It is damaged, from a "
            "diverged run, or too large for that dtype. Use another."
        )
