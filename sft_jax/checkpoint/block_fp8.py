"""Numbers of 8 bits with a scale for each square block, as DeepSeek-V3 stores its matrices -> plain numbers.

    w.weight            float8_e4m3 [rows, columns]
    w.weight_scale_inv  float32 [ceil(rows / 128), ceil(columns / 128)]: a block is multiplied by its own

Codes without their scales are other numbers, by orders of magnitude, and scales mean nothing without the
`quantization_config` that says of what blocks they are: all three are there, or it is refused.

Source: https://github.com/deepseek-ai/DeepSeek-V3, README_WEIGHTS.md, "FP8 weight".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from sft_jax.checkpoint.stored_tensor import Index, StoredTensor
from sft_jax.datatypes import StorageError

BLOCK = 128
_SUFFIX = "_scale_inv"
_SCALE_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class BlockFp8Tensor(StoredTensor):
    name: str
    codes: StoredTensor
    scales: StoredTensor
    has_powers_of_two: bool
    """Whether that is what the scales are to be: transformers may round any other."""

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
        self._check_scales(scales, blocks)
        for axis, (at, block) in enumerate(zip(box, blocks, strict=True)):
            number = np.arange(at.start, at.stop) // BLOCK - block.start
            scales = np.take(scales, number, axis)
        return self.codes.read_box(box).astype(np.float32) * scales

    def _check_scales(self, scales: np.ndarray, blocks: Index) -> None:
        is_scale = np.isfinite(scales) & (scales > 0)
        if self.has_powers_of_two:
            is_scale &= np.frexp(scales)[0] == 0.5
        if not is_scale.all():
            at = tuple(np.argwhere(~is_scale)[0])
            block = [int(number) + of.start for number, of in zip(at, blocks, strict=True)]
            expected = "a power of two" if self.has_powers_of_two else "a finite number above 0"
            raise StorageError(
                f"{self.scales}: the scale of block {block} is {scales[at]}; expected {expected}. Load it anew."
            )


def join_block_fp8(index: Mapping[str, StoredTensor], described: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """The tensors of a folder, with one in place of each pair of codes and scales.

    Args:
      described: config.json's `quantization_config`, which `read_hf_config` has checked; {}: there is none, and numbers
        in float8 are what they are.

    Raises:
      StorageError: codes, scales and description do not fit each other.
    """
    joined = dict(index)
    for name in index:
        if name.endswith(_SUFFIX):
            _check_is_of_codes(name, index, described)
            joined[name.removesuffix(_SUFFIX)] = _join(name.removesuffix(_SUFFIX), joined.pop(name), index, described)
    bare = [tensor for tensor in joined.values() if tensor.dtype.name.startswith("float8")]
    if described and bare:
        raise StorageError(
            f"{bare[0]}: is {bare[0].dtype.name} and has no scales, {bare[0].name}{_SUFFIX}, which the "
            f"quantization_config in config.json promises ({len(bare)} such tensors). The download is incomplete."
        )
    return joined


def _check_is_of_codes(name: str, index: Mapping[str, StoredTensor], described: Mapping[str, Any]) -> None:
    codes = name.removesuffix(_SUFFIX)
    if described.get("quant_method") != "fp8":
        raise StorageError(
            f"{index[name]}: are scales, and config.json has no quantization_config of quant_method fp8 that says what "
            "they scale. Take config.json from where the weights are from."
        )
    if codes not in index:
        raise StorageError(f"{index[name]}: are scales of {codes}, which is not there. The download is incomplete.")
    listed = [module for module in described.get("modules_to_not_convert") or () if f".{module}." in f".{codes}"]
    if listed:
        raise StorageError(
            f"{index[name]}: are scales of what modules_to_not_convert in config.json excludes as {listed[0]}. Take "
            "config.json from where the weights are from."
        )


def _join(
    name: str, scales: StoredTensor, index: Mapping[str, StoredTensor], described: Mapping[str, Any]
) -> BlockFp8Tensor:
    codes = index[name]
    expected = tuple(-(-size // BLOCK) for size in codes.shape)
    if codes.dtype.name != "float8_e4m3fn" or len(codes.shape) != 2 or scales.shape != expected:
        raise StorageError(
            f"{codes}: is {codes.dtype.name} {list(codes.shape)}, with scales {list(scales.shape)}; expected "
            f"float8_e4m3fn, with {list(expected)}, one for each {BLOCK} x {BLOCK}. Take the bfloat16 weights."
        )
    if scales.dtype.name not in _SCALE_DTYPES:
        raise StorageError(
            f"{scales}: scales are {scales.dtype.name}; expected {', '.join(_SCALE_DTYPES)}. Take the bfloat16 weights."
        )
    return BlockFp8Tensor(name, codes, scales, described.get("scale_fmt") == "ue8m0")
