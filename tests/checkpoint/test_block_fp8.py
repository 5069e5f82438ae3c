"""Matrices in float8 with scales of blocks, beside a plain loop over blocks."""

import ml_dtypes
import numpy as np
import pytest

from sft_jax.checkpoint.block_fp8 import BlockFp8Tensor, join_block_fp8
from sft_jax.checkpoint.safetensors_io import read_index
from sft_jax.checkpoint.safetensors_writer import TensorSpec, write_tensors
from sft_jax.datatypes import StorageError

SHAPE = (300, 200)


def write(folder, scales_shape=(3, 2), dtype=ml_dtypes.float8_e4m3fn):
    rng = np.random.default_rng(0)
    tensors = {
        "w.weight": rng.normal(size=SHAPE).astype(dtype),
        "w.weight_scale_inv": rng.uniform(0.5, 2, scales_shape).astype(np.float32),
        "norm.weight": np.ones(5, ml_dtypes.bfloat16),
    }
    specs = [TensorSpec(name, values.dtype, values.shape) for name, values in tensors.items()]
    write_tensors(folder, specs, iter(tensors.items()))
    return tensors


def test_every_block_is_multiplied_by_its_scale(tmp_path):
    tensors = write(tmp_path)
    joined = join_block_fp8(read_index(tmp_path))
    assert joined.keys() == {"w.weight", "norm.weight"}
    tensor = joined["w.weight"]
    assert isinstance(tensor, BlockFp8Tensor)
    assert (tensor.shape, tensor.dtype.name) == (SHAPE, "bfloat16")
    expected = tensors["w.weight"].astype(np.float32)
    for row in range(3):
        for column in range(2):
            block = expected[128 * row : 128 * (row + 1), 128 * column : 128 * (column + 1)]
            block *= tensors["w.weight_scale_inv"][row, column]
    for rows, columns in (
        (slice(0, 300), slice(0, 200)),
        (slice(100, 260), slice(130, 131)),
        (slice(256, 300), slice(0, 128)),
    ):
        np.testing.assert_array_equal(tensor.read_box((rows, columns)), expected[rows, columns])
    turned = np.empty((7, 300), np.float32)
    tensor.read_view(lambda whole: whole.T[125:132], turned)
    np.testing.assert_array_equal(turned, expected.T[125:132])


@pytest.mark.parametrize("fields", [{"scales_shape": (2, 2)}, {"dtype": ml_dtypes.bfloat16}])
def test_what_does_not_fit_is_refused(tmp_path, fields):
    write(tmp_path, **fields)
    with pytest.raises(
        StorageError, match=r"tensor w.weight: is .* with scales .* expected float8_e4m3fn, with \[3, 2\]"
    ):
        join_block_fp8(read_index(tmp_path))
