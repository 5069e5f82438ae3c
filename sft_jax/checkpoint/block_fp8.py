"""Numbers of 8 bits with a scale for each square block, as DeepSeek-V3 stores its matrices -> plain numbers.

    w.weight            float8_e4m3 [rows, columns]
    w.weight_scale_inv  float32 [ceil(rows / 128), ceil(columns / 128)]: a block is multiplied by its own

Source: https://github.com/deepseek-ai/DeepSeek-V3, README_WEIGHTS.md, "FP8 weight".
"""

from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from sft_jax.checkpoint.stored_tensor import Index, StoredTensor
from sft_jax.datatypes import StorageError

BLOCK = 128
_SUFFIX = "_scale_inv"


@dataclass(frozen=True, slots=True)
class BlockFp8Tensor(StoredTensor):
    name: str
    codes: StoredTensor
    scales: StoredTensor

    def __str__(self) -> str:
        return str(self.codes)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.codes.shape

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        return np.dtype(ml_dtypes.bfloat16)

    def read_box(self, box: Index) -> np.ndarray:
        blocks = tuple(slice(at.start // BLOCK, -(-at.stop // BLOCK)) for at in box)
        scales = self.scales.read_box(blocks).astype(np.float32)
        for axis, (at, block) in enumerate(zip(box, blocks, strict=True)):
            number = np.arange(at.start, at.stop) // BLOCK - block.start
            scales = np.take(scales, number, axis)
        return self.codes.read_box(box).astype(np.float32) * scales


def join_block_fp8(index: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of a folder, with one in place of each pair of codes and scales.

    Raises:
      StorageError: the two do not fit each other.
    """
    joined = dict(index)
    for name, codes in index.items():
        if f"{name}{_SUFFIX}" not in index:
            continue
        scales = joined.pop(f"{name}{_SUFFIX}")
        expected = tuple(-(-size // BLOCK) for size in codes.shape)
        if codes.dtype.name != "float8_e4m3fn" or len(codes.shape) != 2 or scales.shape != expected:
            raise StorageError(
                f"{codes}: is {codes.dtype.name} {list(codes.shape)}, with scales {list(scales.shape)}; expected "
                f"float8_e4m3fn, with {list(expected)}, one for each {BLOCK} x {BLOCK}. Take the bfloat16 weights."
            )
        joined[name] = BlockFp8Tensor(name, codes, scales)
    return joined
