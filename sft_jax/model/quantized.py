"""A matrix <-> codes of 8 or 4 bits and a scale for each block of up to 64 values.

Blocks run along one dim of the kernel, the last that is summed over, so that a mesh splits codes and scales as it does
the kernel. Two codes of 4 bits share a byte, the first half of a block in the low bits, the second in the high bits:

    block of 4:  0.1  -0.4  0.8  0.2     scale 0.8     nf4 of x / scale:  9  2 15 10     bytes:  0xf9  0xa2

Encoding is numpy on the host, one part of one layer at a time while weights stream in; decoding is in the layer that
multiplies. Own code, not qwix's: its nf4 holds a code a byte on most backends and looks each up by a gather, and it
encodes on the device, where the whole part would have to be first. Codes are the same; scales are rounded.
"""

import itertools
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from sft_jax.datatypes import ConfigError
from sft_jax.typing import Array

FORMATS = ("int8", "int4", "nf4")
SCALES = "scales"
_LARGEST_BLOCK = 64
_SMALLEST_BLOCK = 16  # below it the scales weigh as much as the codes
_SCALE_DTYPE = np.dtype(ml_dtypes.bfloat16)  # codes are chosen for the rounded scale, so its rounding is no error

# Quantiles of a normal distribution, 0 among them. Source: QLoRA (arXiv:2305.14314), appendix E.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_NF4_BORDERS = np.asarray([(low + high) / 2 for low, high in itertools.pairwise(NF4)], np.float32)
# What a block's largest magnitude is scaled to: half a step beyond the largest code, so that it is used as the others.
_BOUNDS = {"int8": 127.5, "int4": 7.5, "nf4": 1.0}
_NUM_CODES = {"int8": 256, "int4": 16, "nf4": 16}


def block_size(length: int, where: str) -> int:
    """Values per block along a dim: 64, or its largest divisor below that.

    Raises:
      ConfigError: the dim has no even divisor from 16 to 64, and is longer than 64.
    """
    block = max(size for size in range(1, _LARGEST_BLOCK + 1) if length % size == 0)
    if block % 2 or block < min(_SMALLEST_BLOCK, length):
        raise ConfigError(
            f"config.lora.quantize: {where} sums over {length} values, which no blocks of {_SMALLEST_BLOCK} to "
            f"{_LARGEST_BLOCK} fill. Set it to none."
        )
    return block


def codes_per_byte(form: str) -> int:
    return 2 if _NUM_CODES[form] == 16 else 1


def codes_dtype(form: str) -> np.dtype:
    return np.dtype(np.int8 if form == "int8" else np.uint8)


def scales_dtype() -> np.dtype:
    return _SCALE_DTYPE


def find_scales(values: np.ndarray, axis: int, block: int, form: str) -> np.ndarray:
    """The scale of each block along `axis`, which shrinks by `block`. A block of zeros has scale 1."""
    blocks = _split(np.asarray(values, np.float32), axis, block)
    largest = np.abs(blocks).max(axis=2)
    scales = np.where(largest == 0, 1, largest / np.float32(_BOUNDS[form])).astype(_SCALE_DTYPE)
    return scales.reshape(_resized(values.shape, axis, 1, block))


def encode(values: np.ndarray, axis: int, block: int, form: str) -> np.ndarray:
    """The code nearest to each value, packed along `axis`."""
    blocks = _split(np.asarray(values, np.float32), axis, block)
    scales = find_scales(values, axis, block, form).astype(np.float32).reshape(*blocks.shape[:2], 1, -1)
    scaled = blocks / scales
    if form == "nf4":
        codes = np.zeros(scaled.shape, np.uint8)
        for border in _NF4_BORDERS:  # comparisons of whole arrays: several times as fast as a binary search
            codes += scaled > border
    else:
        low, high = -_NUM_CODES[form] // 2, _NUM_CODES[form] // 2 - 1
        codes = np.clip(np.rint(scaled), low, high).astype(np.int8)
        if form == "int8":
            return codes.reshape(values.shape)
        codes = (codes + 8).astype(np.uint8)
    first, second = np.split(codes, 2, axis=2)
    return (first | second << 4).reshape(_resized(values.shape, axis, 1, 2))


def decode(codes: Array, scales: Array, axis: int, form: str, dtype: DTypeLike) -> Array:
    """The values in `dtype`, in the kernel's own shape."""
    block = codes.shape[axis] * codes_per_byte(form) // scales.shape[axis]
    stored = _split(codes, axis, block // codes_per_byte(form))
    factors = scales.reshape(*stored.shape[:2], 1, -1).astype(dtype)
    if form == "int8":
        values = stored.astype(dtype)
    else:
        nibbles = jnp.concatenate([stored & 15, stored >> 4], axis=2)
        values = _look_up(nibbles, NF4, 0, dtype) if form == "nf4" else (nibbles.astype(jnp.int8) - 8).astype(dtype)
    return (values * factors).reshape(_resized(codes.shape, axis, codes_per_byte(form), 1))


def _look_up(codes: Array, table: tuple[float, ...], first: int, dtype: DTypeLike) -> Array:
    """table[codes - first] by halving: selects of constants, which every backend fuses into what reads them."""
    if len(table) == 1:
        return jnp.asarray(table[0], dtype)
    half = len(table) // 2
    low, high = _look_up(codes, table[:half], first, dtype), _look_up(codes, table[half:], first + half, dtype)
    return jnp.where(codes < first + half, low, high)


def _split(values: Any, axis: int, block: int) -> Any:
    """[..., n, ...] -> [before, n / block, block, after]."""
    axis %= values.ndim
    before, after = int(np.prod(values.shape[:axis])), int(np.prod(values.shape[axis + 1 :]))
    return values.reshape(before, values.shape[axis] // block, block, after)


def _resized(shape: tuple[int, ...], axis: int, times: int, over: int) -> tuple[int, ...]:
    """`shape` with one dim `times / over` as long."""
    out = list(shape)
    out[axis] = out[axis] * times // over
    return tuple(out)
