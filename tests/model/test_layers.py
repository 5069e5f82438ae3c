import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.model.families import PRESETS
from sft_jax.model.layers import RMSNorm, rope_for, rope_frequencies, rotate
from sft_jax.model.linear import Linear


def test_rotation_follows_the_formula():
    config = PRESETS["testbed"]
    half = config.head_dim // 2
    x = np.random.default_rng(0).normal(size=(1, 5, 2, config.head_dim))
    positions = np.array([[0, 1, 2, 0, 700]])
    expected = np.zeros_like(x)
    for token, position in enumerate(positions[0]):
        for i in range(half):
            angle = position * config.rope_theta ** (-2 * i / config.head_dim)
            a, b = x[0, token, :, i], x[0, token, :, i + half]
            expected[0, token, :, i] = a * math.cos(angle) - b * math.sin(angle)
            expected[0, token, :, i + half] = b * math.cos(angle) + a * math.sin(angle)
    with jax.enable_x64(True):
        rotated = rotate(jnp.asarray(x), rope_for(jnp.asarray(positions), config, jnp.float64))
    np.testing.assert_allclose(rotated, expected, atol=1e-12)


def test_scores_depend_on_the_distance_only():
    config = PRESETS["llama3.2-1b"]
    q, k = np.random.default_rng(1).normal(size=(2, 1, 1, 1, config.head_dim))
    with jax.enable_x64(True):

        def score(query_position, key_position):
            rope_q, rope_k = (
                rope_for(jnp.full((1, 1), p), config, jnp.float64) for p in (query_position, key_position)
            )
            return float(jnp.vdot(rotate(jnp.asarray(q), rope_q), rotate(jnp.asarray(k), rope_k)))

        assert score(5, 2) == pytest.approx(score(9003, 9000), abs=1e-9)
        assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-3)


@pytest.mark.parametrize("preset", ["llama3.1-8b", "llama3.2-1b"])
def test_llama3_scaling_follows_the_published_code(preset):
    config = PRESETS[preset]
    scaling = config.rope_scaling
    low_wavelength = scaling.original_max_position / scaling.low_freq_factor
    high_wavelength = scaling.original_max_position / scaling.high_freq_factor
    expected = []
    for frequency in rope_frequencies(dataclasses.replace(config, rope_scaling=None)):
        wavelength = 2 * math.pi / frequency
        if wavelength < high_wavelength:
            expected.append(frequency)
        elif wavelength > low_wavelength:
            expected.append(frequency / scaling.factor)
        else:
            smooth = (scaling.original_max_position / wavelength - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            expected.append((1 - smooth) * frequency / scaling.factor + smooth * frequency)
    np.testing.assert_allclose(rope_frequencies(config), expected, rtol=1e-12)


def test_rope_is_exact_far_out_even_when_computing_in_bfloat16():
    rope = rope_for(jnp.array([[4096, 4097]]), PRESETS["llama2-7b"], jnp.bfloat16)
    assert rope.cos.dtype == jnp.float32
    np.testing.assert_allclose(rope.cos[0, :, 0], np.cos([4096.0, 4097.0]), atol=1e-4)


def test_norm_keeps_its_statistics_in_float32():
    x = 100 * jax.random.normal(jax.random.key(0), (1, 2, 4096))
    norm = RMSNorm(4096, 1e-5, jnp.float32)
    out = norm(x.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    expected = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=0.01, atol=0.01)


def test_linear_contracts_its_in_dims():
    linear = Linear((2, 3), (4,), 1.0, jax.random.key(0), jnp.float32)
    x = jax.random.normal(jax.random.key(1), (1, 5, 2, 3))
    np.testing.assert_allclose(linear(x), np.einsum("blnh,nhd->bld", x, linear.kernel[...]), rtol=1e-5)
