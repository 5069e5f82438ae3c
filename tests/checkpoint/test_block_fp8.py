"""Matrices in float8 with scales of blocks, beside a plain loop over blocks."""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from sft_jax.checkpoint.block_fp8 import BlockFp8Tensor, join_block_fp8
from sft_jax.checkpoint.hf import load_pretrained, read_config
from sft_jax.checkpoint.safetensors_io import read_index
from sft_jax.checkpoint.safetensors_writer import TensorSpec, write_tensors
from sft_jax.datatypes import StorageError

SHAPE = (300, 200)
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


def write(folder, scales_shape=(3, 2), dtype=ml_dtypes.float8_e4m3fn, change=lambda tensors: None):
    rng = np.random.default_rng(0)
    tensors = {
        "w.weight": rng.normal(size=SHAPE).astype(dtype),
        "w.weight_scale_inv": rng.uniform(0.5, 2, scales_shape).astype(np.float32),
        "norm.weight": np.ones(5, ml_dtypes.bfloat16),
    }
    change(tensors)
    specs = [TensorSpec(name, values.dtype, values.shape) for name, values in tensors.items()]
    write_tensors(folder, specs, iter(tensors.items()))
    return tensors


def test_every_block_is_multiplied_by_its_scale(tmp_path):
    tensors = write(tmp_path)
    joined = join_block_fp8(read_index(tmp_path), FP8)
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
        join_block_fp8(read_index(tmp_path), FP8)


@pytest.mark.parametrize(
    ("described", "change", "named"),
    [
        (FP8, lambda tensors: tensors.pop("w.weight_scale_inv"), "tensor w.weight: is float8_e4m3fn and has no scales"),
        (
            {"quant_method": "mxfp4"},
            lambda tensors: tensors.pop("w.weight_scale_inv"),
            "tensor w.weight: is float8_e4m3fn and has no scales",
        ),
        (FP8, lambda tensors: tensors.pop("w.weight"), "are scales of w.weight, which is not there"),
        ({}, lambda tensors: None, "tensor w.weight_scale_inv: are scales, and config.json has no quantization_config"),
        ({"quant_method": "mxfp4"}, lambda tensors: None, "has no quantization_config of quant_method fp8"),
        (FP8 | {"modules_to_not_convert": ["lm_head", "w"]}, lambda tensors: None, "excludes as w"),
        (
            FP8,
            lambda tensors: tensors.update({"w.weight_scale_inv": np.full((3, 2), 127, np.uint8)}),
            "scales are uint8; expected float32, bfloat16, float16",
        ),
    ],
)
def test_codes_scales_and_their_description_come_together(tmp_path, described, change, named):
    write(tmp_path, change=change)
    with pytest.raises(StorageError, match=re.escape(named)):
        join_block_fp8(read_index(tmp_path), described)


def test_what_is_not_converted_stays_as_it_is(tmp_path):
    write(tmp_path)
    described = FP8 | {"modules_to_not_convert": ["norm", "weight_scale"]}
    assert join_block_fp8(read_index(tmp_path), described)["norm.weight"].dtype.name == "bfloat16"


def test_numbers_in_float8_without_a_description_are_what_they_are(tmp_path):
    tensors = write(tmp_path, change=lambda tensors: tensors.pop("w.weight_scale_inv"))
    tensor = join_block_fp8(read_index(tmp_path), {})["w.weight"]
    np.testing.assert_array_equal(tensor.read_box((slice(0, 300), slice(0, 200))), tensors["w.weight"])


@pytest.mark.parametrize("scale", [0.0, -1.0, np.inf, np.nan])
def test_scales_that_are_none_are_refused(tmp_path, scale):
    write(tmp_path, change=lambda tensors: tensors["w.weight_scale_inv"].__setitem__((2, 1), scale))
    tensor = join_block_fp8(read_index(tmp_path), FP8)["w.weight"]
    tensor.read_box((slice(0, 256), slice(0, 200)))
    with pytest.raises(StorageError, match=r"scale_inv: the scale of block \[2, 1\] is .* a finite number above 0"):
        tensor.read_box((slice(130, 300), slice(128, 200)))


def test_scales_that_are_to_be_powers_of_two_are(tmp_path):
    described = FP8 | {"scale_fmt": "ue8m0"}
    write(tmp_path, change=lambda tensors: tensors["w.weight_scale_inv"].fill(0.25))
    box = (slice(0, 300), slice(0, 200))
    join_block_fp8(read_index(tmp_path), described)["w.weight"].read_box(box)
    write(tmp_path, change=lambda tensors: tensors["w.weight_scale_inv"].fill(0.75))
    with pytest.raises(StorageError, match=r"block \[0, 0\] is 0.75; expected a power of two"):
        join_block_fp8(read_index(tmp_path), described)["w.weight"].read_box(box)


def test_a_folder_is_held_against_its_own_description(tmp_path):
    golden = Path(__file__).parents[1] / "parity" / "goldens" / "qwen3_moe"
    fields = json.loads((golden / "config.json").read_text())
    tensors = load_file(golden / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    for scales in ({}, {f"{name}_scale_inv": np.full((1, 1), 0.5, np.float32)}):
        specs = [TensorSpec(name, values.dtype, values.shape) for name, values in (tensors | scales).items()]
        write_tensors(tmp_path, specs, iter((tensors | scales).items()))
        for described in ({}, {"quantization_config": FP8}):
            (tmp_path / "config.json").write_text(json.dumps(fields | described))
            config, _ = read_config(tmp_path)
            if bool(scales) == bool(described):
                kernel = load_pretrained(tmp_path, config, None, "float32")["layers.0.0.attention.query.kernel"][0]
                expected = tensors[name].astype(np.float32).T * (0.5 if scales else 1)
                np.testing.assert_array_equal(np.asarray(kernel).reshape(expected.shape), expected)
            else:
                with pytest.raises(StorageError, match=f"{name}.*quantization_config"):
                    load_pretrained(tmp_path, config, None, "float32")
