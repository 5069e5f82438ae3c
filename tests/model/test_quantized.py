"""Codes and scales: each code is the nearest, and the bytes are as few as promised."""

import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.config_schema import LoraConfig
from sft_jax.datatypes import ConfigError
from sft_jax.model import quantized
from sft_jax.model.lora import find_kernels, lay_out
from sft_jax.model.presets import preset_config
from sft_jax.model.transformer import abstract_params

LEVELS = {"int8": np.arange(-128, 128), "int4": np.arange(-8, 8), "nf4": np.asarray(quantized.NF4)}


def draw(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("form", quantized.FORMATS)
@pytest.mark.parametrize(("shape", "axis"), [((96, 5), 0), ((3, 64, 4, 6), 1), ((2, 5, 32, 7), 2), ((2, 12, 6), -2)])
def test_every_code_is_the_nearest_level_of_its_block(form, shape, axis):
    values = draw(shape)
    block = quantized.block_size(shape[axis], "here")
    codes, scales = (make(values, axis, block, form) for make in (quantized.encode, quantized.find_scales))
    assert scales.shape[axis] == shape[axis] // block
    assert codes.shape[axis] == shape[axis] // quantized.codes_per_byte(form)
    decoded = np.asarray(quantized.decode(jnp.asarray(codes), jnp.asarray(scales), axis, form, "float32"))
    factors = np.repeat(scales.astype(np.float32), block, axis=axis)
    nearest = LEVELS[form][np.abs(values[..., None] / factors[..., None] - LEVELS[form]).argmin(-1)] * factors
    np.testing.assert_allclose(decoded, nearest, rtol=1e-6)
    error = np.linalg.norm(decoded - values) / np.linalg.norm(values)
    assert error < {"int8": 0.01, "int4": 0.15, "nf4": 0.11}[form]


def test_the_example_of_the_docstring():
    values = np.asarray([0.1, -0.4, 0.8, 0.2], np.float32)
    assert quantized.find_scales(values, 0, 4, "nf4").tolist() == pytest.approx([0.8], rel=4e-3)
    assert quantized.encode(values, 0, 4, "nf4").tolist() == [0xF9, 0xA2]


@pytest.mark.parametrize("form", quantized.FORMATS)
def test_a_block_of_zeros_stays_zero(form):
    values = np.zeros((32, 3), np.float32)
    codes, scales = (make(values, 0, 32, form) for make in (quantized.encode, quantized.find_scales))
    assert not np.any(quantized.decode(jnp.asarray(codes), jnp.asarray(scales), 0, form, "float32"))


@pytest.mark.parametrize(("length", "block"), [(4096, 64), (96, 48), (2880, 64), (80, 40), (6, 6), (14336, 64)])
def test_blocks_fill_the_dim(length, block):
    assert quantized.block_size(length, "here") == block


@pytest.mark.parametrize("length", [4 * 67, 7, 81])
def test_a_dim_that_no_even_block_fills_is_refused(length):
    with pytest.raises(ConfigError, match=f"layers.mlp.up sums over {length} values"):
        quantized.block_size(length, "layers.mlp.up")


@pytest.mark.parametrize(("form", "bound"), [("int8", 1.1), ("int4", 0.6), ("nf4", 0.6)])
@pytest.mark.parametrize("preset", ["testbed", "llama3.1-70b"])
def test_bytes_per_parameter(preset, form, bound):
    model = preset_config(preset, {})
    base = abstract_params(model, "float32")
    kernels = find_kernels(model, base)
    _, frozen = lay_out(base, kernels, (), (), LoraConfig(rank=1, quantize=form), "bfloat16")
    count = sum(np.prod(base[f"{module}.kernel"].shape) for module in kernels)
    held = [leaf for path, leaf in frozen.items() if path.rpartition(".")[0] in kernels]
    assert sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in held) <= bound * count
    assert {leaf.dtype.name for path, leaf in frozen.items() if path.endswith((".embedding", ".scale"))} == {"bfloat16"}
