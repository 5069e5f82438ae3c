"""MXFP4 beside a decoder that goes bit by bit, from the specification."""

import ml_dtypes
import numpy as np
import pytest

from sft_jax.checkpoint import mxfp4
from sft_jax.datatypes import StorageError

FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)


def value_of(code: int, scale: int) -> float:
    """E2M1: sign, two bits of exponent with bias 1, one of mantissa; exponent 0 is subnormal."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    magnitude = mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
    return (-1) ** sign * magnitude * 2.0 ** (scale - 127)


def slow_decode(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    rows = []
    for block, scale in zip(blocks.reshape(-1, 16).tolist(), scales.reshape(-1).tolist(), strict=True):
        rows.append([value_of(code, scale) for byte in block for code in (byte & 15, byte >> 4)])
    return np.asarray(rows, np.float64).reshape(*scales.shape[:-1], -1)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_every_byte_and_scale(dtype):
    blocks = np.resize(np.arange(256, dtype=np.uint8), (253, 3, 16))
    scales = np.stack([np.arange(253, dtype=np.uint8)] * 3, axis=1)
    decoded = mxfp4.decode(blocks, scales, dtype, "x")
    assert decoded.dtype == dtype
    assert decoded.shape == mxfp4.decoded_shape(scales.shape) == (253, 96)
    np.testing.assert_array_equal(decoded.astype(np.float64), slow_decode(blocks, scales))
    assert np.signbit(mxfp4.decode(np.full((1, 16), 0x88, np.uint8), np.zeros(1, np.uint8), dtype, "x")).all()


def test_chunks_join(monkeypatch):
    rng = np.random.default_rng(0)
    blocks, scales = rng.integers(256, size=(2, 5, 4, 16), dtype=np.uint8), rng.integers(110, 130, (2, 5, 4), np.uint8)
    whole = mxfp4.decode(blocks, scales, FLOAT32, "x")
    monkeypatch.setattr(mxfp4, "_CHUNK", 7)
    np.testing.assert_array_equal(mxfp4.decode(blocks, scales, FLOAT32, "x"), whole)
    np.testing.assert_array_equal(whole, slow_decode(blocks, scales))


@pytest.mark.parametrize("scale", [253, 255])
def test_scales_that_are_no_numbers_are_refused(scale):
    scales = np.asarray([[120, scale]], np.uint8)
    with pytest.raises(StorageError, match=f"w: the scale of block 1 is {scale}"):
        mxfp4.decode(np.zeros((1, 2, 16), np.uint8), scales, FLOAT32, "w")


@pytest.mark.parametrize(
    ("blocks", "scales"),
    [
        (np.zeros((2, 3, 16), np.uint8), np.zeros((2, 2), np.uint8)),
        (np.zeros((2, 3, 8), np.uint8), np.zeros((2, 3), np.uint8)),
        (np.zeros((2, 3, 16), np.int8), np.zeros((2, 3), np.uint8)),
        (np.zeros((2, 3, 16), np.uint8), np.zeros((2, 3), np.float32)),
    ],
)
def test_other_formats_are_refused(blocks, scales):
    with pytest.raises(StorageError, match="MXFP4 has uint8 of both"):
        mxfp4.decode(blocks, scales, FLOAT32, "w")
