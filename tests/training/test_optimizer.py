"""Schedules against the values in the docstring, optimizers against their published update."""

import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.config_schema import OptimizerConfig, ScheduleConfig
from sft_jax.training.optimizer import build_optimizer, build_schedule

EXPECTED = {
    "constant": [0.5, 1, 1, 1, 1, 1, 1, 1],
    "linear": [0.5, 1, 1, 0.82, 0.64, 0.46, 0.28, 0.10],
    "cosine": [0.5, 1, 1, 0.91, 0.69, 0.41, 0.19, 0.10],
    "wsd": [0.5, 1, 1, 1, 1, 0.70, 0.40, 0.10],
}


def build(name, **fields):
    if name == "wsd":
        fields["decay_fraction"] = 0.5
    return build_schedule(ScheduleConfig(name=name, **fields), 1.0, 8)


@pytest.mark.parametrize("name", EXPECTED)
def test_schedules_by_hand(name):
    schedule = build(name, warmup_steps=2)
    np.testing.assert_allclose([schedule(i) for i in range(8)], EXPECTED[name], atol=5e-3)


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("warmup", [0, 1, 8, 20])
def test_schedules_are_positive_and_never_above_the_peak(name, warmup):
    values = [float(build(name, warmup_steps=warmup)(i)) for i in range(8)]
    assert all(0 < value <= 1 + 1e-6 for value in values)


def test_warmup_fraction_is_a_share_of_all_steps():
    schedule = build("constant", warmup_fraction=0.5)
    np.testing.assert_allclose([schedule(i) for i in range(5)], [0.25, 0.5, 0.75, 1, 1])


PARAMS = {"a.kernel": jnp.asarray([[1.0, -2.0], [3.0, 0.5]]), "norm.scale": jnp.asarray([1.0, 2.0])}
GRADS = {"a.kernel": jnp.asarray([[0.1, -0.2], [0.0, 0.4]]), "norm.scale": jnp.asarray([0.3, -0.1])}


def first_direction(**fields):
    optimizer = build_optimizer(OptimizerConfig(**fields), seed=0)
    direction, _ = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)
    return direction


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adamw", lambda g: g / (np.abs(g) + 1e-8)),  # m_hat = g, v_hat = g^2 at the first step
        ("lion", np.sign),
        ("sgd", lambda g: g),
    ],
)
def test_first_step(name, expected):
    direction = first_direction(name=name, weight_decay=0.0)
    for path, grad in GRADS.items():
        np.testing.assert_allclose(direction[path], expected(np.asarray(grad)), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd"])
def test_weight_decay_is_decoupled_and_spares_norms(name):
    without = first_direction(name=name, weight_decay=0.0)
    decayed = first_direction(name=name, weight_decay=0.1)
    np.testing.assert_allclose(decayed["a.kernel"] - without["a.kernel"], 0.1 * PARAMS["a.kernel"], rtol=1e-5)
    np.testing.assert_array_equal(decayed["norm.scale"], without["norm.scale"])


@pytest.mark.parametrize(
    ("name", "field"), [("adamw", "b1"), ("adamw", "b2"), ("adamw", "eps"), ("lion", "b2"), ("sgd", "b1")]
)
def test_every_option_changes_the_update(name, field):
    def third(**fields):
        optimizer = build_optimizer(OptimizerConfig(name=name, **fields), seed=0)
        state = optimizer.init(PARAMS)
        for scale in (1.0, -0.5, 0.05):
            grads = {path: grad * scale for path, grad in GRADS.items()}
            direction, state = optimizer.update(grads, state, PARAMS)
        return direction["a.kernel"]

    assert not np.allclose(third(), third(**{field: 0.2}))
