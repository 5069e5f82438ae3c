"""MXFP4 blocks and scales, as gpt-oss stores its experts -> plain numbers.

A row of n values is n / 32 blocks. A block is 16 bytes, each holding two values of 4 bits, the low half first, and one
shared power of two: 2 ** (scale - 127). The 4 bits are a sign, two of exponent and one of mantissa:

    code    0   1   2    3   4   5   6   7     8 to 15: the same, negative
    value   0  .5   1  1.5   2   3   4   6

    byte 0x2A, scale 128  ->  code 10, code 2  ->  -1 * 2, 1 * 2

Source: OCP Microscaling Formats (MX) Specification v1.0, sections 5.3.3 and 6.3.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from sft_jax.checkpoint.stored_tensor import Index, Select, StoredTensor
from sft_jax.datatypes import StorageError

BLOCK = 32
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.asarray(_POSITIVE + tuple(-value for value in _POSITIVE), np.float32)
_PAIRS = _VALUES[np.stack([np.arange(256) & 15, np.arange(256) >> 4], axis=-1)]  # [byte, 2]
_LARGEST = 252  # 6 * 2 ** 125 is float32's last; beyond are numbers no weight has, and 255 is NaN
_CHUNK = 1 << 16  # blocks decoded at one time: 8 MiB of float32


@dataclass(frozen=True, slots=True)
class Mxfp4Tensor(StoredTensor):
    """A tensor [E, n, rows] that is stored as blocks [E, rows, n / 32, 16] and scales [E, rows, n / 32]."""

    name: str
    blocks: StoredTensor
    scales: StoredTensor

    def __str__(self) -> str:
        return str(self.blocks)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        *outer, rows, size = decoded_shape(self.scales.shape)
        return (*outer, size, rows)

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        return np.dtype(ml_dtypes.bfloat16)

    def read_box(self, box: Index) -> np.ndarray:
        *outer, wanted, rows = box
        of_blocks = slice(wanted.start // BLOCK, -(-wanted.stop // BLOCK))
        scales = self.scales.read_box((*outer, rows, of_blocks))
        blocks = self.blocks.read_box((*outer, rows, of_blocks, slice(0, BLOCK // 2)))
        first = of_blocks.start * BLOCK
        values = decode(blocks, scales, self.dtype, str(self))[..., wanted.start - first : wanted.stop - first]
        return values.swapaxes(-1, -2)

    def read_view(self, select: Select, out: np.ndarray) -> None:
        """Expert by expert, so that one of them is decoded at a time."""
        for expert in range(len(out)):
            part = slice(expert, expert + 1)
            StoredTensor.read_view(self, lambda whole, part=part: select(whole)[part], out[part])  # type: ignore[misc]


def join_mxfp4(index: Mapping[str, StoredTensor], described: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """The tensors of a folder, with one in place of each pair of blocks and scales. What has no partner stays, and
    belongs to no parameter.

    Args:
      described: config.json's `quantization_config`, which `read_hf_config` has checked; {}: there is none.

    Raises:
      StorageError: a pair is not MXFP4's, or nothing says that it is.
    """
    joined = dict(index)
    for name in index:
        stem = name.removesuffix("_blocks")
        if stem != name and f"{stem}_scales" in index:
            blocks, scales = joined.pop(name), joined.pop(f"{stem}_scales")
            if described.get("quant_method") != "mxfp4":
                raise StorageError(
                    f"{blocks}: has scales beside it, and config.json has no quantization_config of quant_method mxfp4 "
                    "that says what they scale. Take config.json from where the weights are from."
                )
            check(blocks.shape, blocks.dtype, scales.shape, scales.dtype, str(blocks))
            joined[stem] = Mxfp4Tensor(stem, blocks, scales)
    return joined


def decode(blocks: np.ndarray, scales: np.ndarray, dtype: np.dtype, where: str) -> np.ndarray:
    """uint8 blocks [..., n / 32, 16] and scales [..., n / 32] -> [..., n] in `dtype`. Beside the result, memory is
    bounded.

    bfloat16 and float32 hold every value as it is, the smallest as subnormal numbers.

    Raises:
      StorageError: shapes or dtypes that are none of MXFP4's, or a scale that makes NaN or infinity.
    """
    check(blocks.shape, blocks.dtype, scales.shape, scales.dtype, where)
    out = np.empty((scales.size, BLOCK), dtype)
    flat = blocks.reshape(-1, BLOCK // 2)
    for chunk, exponents in _chunks(scales.reshape(-1), where):
        values = _PAIRS[flat[chunk]].reshape(-1, BLOCK)
        out[chunk] = np.ldexp(values, exponents[:, None])
    return out.reshape(*scales.shape[:-1], scales.shape[-1] * BLOCK)


def check(
    blocks_shape: tuple[int, ...],
    blocks_dtype: np.dtype,
    scales_shape: tuple[int, ...],
    scales_dtype: np.dtype,
    where: str,
) -> None:
    """Whether two tensors are MXFP4's, before a byte of them is read.

    Raises:
      StorageError: they are not.
    """
    if blocks_dtype != np.uint8 or scales_dtype != np.uint8 or tuple(blocks_shape) != (*scales_shape, BLOCK // 2):
        raise StorageError(
            f"{where}: blocks are {blocks_dtype} {list(blocks_shape)} and scales {scales_dtype} {list(scales_shape)}; "
            f"MXFP4 has uint8 of both, and {BLOCK // 2} bytes for each scale. The download is damaged, or of another "
            "format."
        )


def decoded_shape(scales_shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*scales_shape[:-1], scales_shape[-1] * BLOCK)


def _chunks(scales: np.ndarray, where: str) -> Iterator[tuple[slice, np.ndarray]]:
    """(which blocks, their exponents), some at a time."""
    for start in range(0, len(scales), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        if np.any(scales[chunk] > _LARGEST):
            at = start + int(np.argmax(scales[chunk] > _LARGEST))
            raise StorageError(
                f"{where}: the scale of block {at} is {scales[at]}: NaN or beyond float32. Load it anew."
            )
        yield chunk, scales[chunk].astype(np.int32) - 127
