import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.model.families import list_layers
from sft_jax.model.presets import PRESETS
from sft_jax.model.rope import RopeConfig, rope_for, rope_frequencies, rotate


def rope_of(preset):
    return list_layers(PRESETS[preset])[0].rope


def test_rotation_follows_the_formula():
    half, head_dim, theta = 16, 32, 10_000.0
    x = np.random.default_rng(0).normal(size=(1, 5, 2, head_dim))
    positions = np.array([[0, 1, 2, 0, 700]])
    expected = np.zeros_like(x)
    for token, position in enumerate(positions[0]):
        for i in range(half):
            angle = position * theta ** (-2 * i / head_dim)
            a, b = x[0, token, :, i], x[0, token, :, i + half]
            expected[0, token, :, i] = a * math.cos(angle) - b * math.sin(angle)
            expected[0, token, :, i + half] = b * math.cos(angle) + a * math.sin(angle)
    with jax.enable_x64(True):
        rotated = rotate(
            jnp.asarray(x), rope_for(jnp.asarray(positions), None, RopeConfig(theta=theta), head_dim, jnp.float64)
        )
    np.testing.assert_allclose(rotated, expected, atol=1e-12)


def test_scores_depend_on_the_distance_only():
    rope = rope_of("llama3.2-1b")
    q, k = np.random.default_rng(1).normal(size=(2, 1, 1, 1, 64))
    with jax.enable_x64(True):

        def score(query_position, key_position):
            rope_q, rope_k = (
                rope_for(jnp.full((1, 1), p), None, rope, 64, jnp.float64) for p in (query_position, key_position)
            )
            return float(jnp.vdot(rotate(jnp.asarray(q), rope_q), rotate(jnp.asarray(k), rope_k)))

        assert score(5, 2) == pytest.approx(score(9003, 9000), abs=1e-9)
        assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-3)


@pytest.mark.parametrize("preset", ["llama3.1-8b", "llama3.2-1b"])
def test_llama3_scaling_follows_the_published_code(preset):
    rope, head_dim = rope_of(preset), PRESETS[preset].head_dim
    scaling = rope.scaling
    low_wavelength = scaling.original_max_position / scaling.low_freq_factor
    high_wavelength = scaling.original_max_position / scaling.high_freq_factor
    expected = []
    for frequency in rope_frequencies(dataclasses.replace(rope, scaling=None), head_dim):
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
    np.testing.assert_allclose(rope_frequencies(rope, head_dim), expected, rtol=1e-12)


def test_rope_is_exact_far_out_even_when_computing_in_bfloat16():
    rope = rope_for(jnp.array([[4096, 4097]]), None, rope_of("llama2-7b"), 128, jnp.bfloat16)
    assert rope.cos.dtype == jnp.float32
    np.testing.assert_allclose(rope.cos[0, :, 0], np.cos([4096.0, 4097.0]), atol=1e-4)
