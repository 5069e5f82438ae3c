"""Moments in bfloat16: right in the mean, exact where they can be, the same on every mesh and after a resume."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_step import MODEL, make_batch, make_config, make_params

import sft_jax.training.moments as moments_lib
from sft_jax.config_schema import MeshConfig, OptimizerConfig
from sft_jax.sharding import build_mesh
from sft_jax.training.moments import RoundedState, round_at_random
from sft_jax.training.optimizer import build_optimizer, build_schedule
from sft_jax.training.state import init_state
from sft_jax.training.step import make_train_step

NAMES = ["adamw", "lion", "sgd"]


@pytest.mark.parametrize("x", [1 + 1 / 512, -3.3, 1.999, 1e-30, -65504.1, 2.0**100 * 1.001])
def test_the_mean_of_many_draws_is_what_was_rounded(x):
    draws = round_at_random(jnp.full(2**16, x, jnp.float32), jax.random.key(0))
    assert draws.dtype == jnp.bfloat16
    x = float(np.float32(x))
    low, high = np.unique(np.asarray(draws, np.float64))  # two neighbours, and nothing else
    assert low < x < high
    assert high - low <= abs(x) / 128
    share = (x - low) / (high - low)
    four_deviations = 4 * np.sqrt(share * (1 - share) / 2**16)
    assert abs(np.mean(np.asarray(draws, np.float64) == high) - share) < four_deviations


def test_what_bfloat16_holds_stays_and_what_is_no_number_stays_none():
    every = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    rounded = np.asarray(round_at_random(jnp.asarray(every.astype(np.float32)), jax.random.key(1)))
    numbers = ~np.isnan(every.astype(np.float32))
    np.testing.assert_array_equal(rounded[numbers].view(np.uint16), every[numbers].view(np.uint16))
    assert np.isnan(rounded[~numbers].astype(np.float32)).all()
    beyond = jnp.asarray([3.4e38, -3.4e38], jnp.float32)  # there is no neighbour beyond the largest but infinity
    assert np.isinf(np.asarray(round_at_random(beyond, jax.random.key(1)), np.float32)).all()


def grow(name, dtype, steps=1000):
    """The moments of 256 elements after so many equal gradients, as float32."""
    betas = {"b1": 0.999} if name == "sgd" else {"b1": 0.999, "b2": 0.999}
    optimizer = build_optimizer(OptimizerConfig(name=name, moment_dtype=dtype, **betas), seed=3)
    params = {"a.kernel": jnp.ones((16, 16))}

    @jax.jit
    def run(state):
        update = lambda _, state: optimizer.update(params, state, params)[1]  # noqa: E731
        return jax.lax.fori_loop(0, steps, update, state)

    leaves = jax.tree.leaves(run(optimizer.init(params)))
    return [np.asarray(leaf, np.float32) for leaf in leaves if leaf.shape == (16, 16)]


@pytest.mark.parametrize("name", NAMES)
def test_small_changes_add_up_where_rounding_to_the_nearest_loses_them(name, monkeypatch):
    expected = grow(name, "float32")
    found = grow(name, "bfloat16")
    monkeypatch.setattr(moments_lib, "round_at_random", lambda x, key: x.astype(jnp.bfloat16))
    nearest = grow(name, "bfloat16")
    assert len(found) == len(expected) == (2 if name == "adamw" else 1)
    for wide, rounded, lost in zip(expected, found, nearest, strict=True):
        np.testing.assert_allclose(rounded.mean(), wide.mean(), rtol=0.02)
        assert len(np.unique(rounded)) > 3  # each element has draws of its own
        assert lost.mean() < 0.6 * wide.mean()


def make_grads(seed, shape=(8, 16)):
    rng = np.random.default_rng(seed)
    return {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path in ("a.kernel", "b.kernel")}


def update(optimizer, state, grads):
    return jax.jit(optimizer.update)(grads, state, grads)[1]


@functools.cache
def moments_of(name, seed=0, updates=2):
    optimizer = build_optimizer(OptimizerConfig(name=name, moment_dtype="bfloat16"), seed)
    state = optimizer.init(make_grads(0))
    for number in range(updates):
        state = update(optimizer, state, make_grads(number))
    return jax.device_get(state)


def assert_equal_bits(left, right):
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert np.asarray(one).dtype == np.asarray(other).dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"replica": 2, "fsdp": 2, "tensor": 2}])
def test_no_mesh_changes_a_bit(name, axes):
    mesh = build_mesh(MeshConfig(**axes))
    place = lambda tree: jax.device_put(tree, jax.NamedSharding(mesh, jax.P("fsdp", "tensor")))  # noqa: E731
    optimizer = build_optimizer(OptimizerConfig(name=name, moment_dtype="bfloat16"), seed=0)
    state = init_state(place(make_grads(0)), optimizer).opt_state
    for number in range(2):
        state = update(optimizer, state, place(make_grads(number)))
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert {(leaf.dtype.name, leaf.sharding.spec) for leaf in moments} == {("bfloat16", jax.P("fsdp", "tensor"))}
    assert_equal_bits(state, moments_of(name))


def test_every_seed_update_moment_and_parameter_has_draws_of_its_own():
    def bits(tree):
        return np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(tree) if np.ndim(leaf)])

    one, other = moments_of("adamw"), moments_of("adamw", seed=1)
    assert 0.05 < np.mean(bits(one) != bits(other)) < 0.95
    optimizer = build_optimizer(OptimizerConfig(name="sgd", b1=0.0, moment_dtype="bfloat16"), seed=0)
    grads = {"a.kernel": jnp.full((8, 16), 1 + 1 / 256), "b.kernel": jnp.full((8, 16), 1 + 1 / 256)}
    first = update(optimizer, optimizer.init(grads), grads)
    second = update(optimizer, first, grads)
    drawn = [np.asarray(leaf) for state in (first, second) for leaf in jax.tree.leaves(state) if np.ndim(leaf)]
    assert len(drawn) == 4
    for i in range(4):
        for j in range(i):
            assert 0.2 < np.mean(drawn[i] != drawn[j]) < 0.8  # b1 is 0: all are rounded from the same


def train(moment_dtype, steps=40):
    """Losses of a tiny model on one batch."""
    config = make_config(
        model={"param_dtype": "float32", "compute_dtype": "float32"},
        optimizer={"accum_dtype": "float32", "moment_dtype": moment_dtype},
    )
    mesh = build_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    optimizer = build_optimizer(config.optimizer, config.run.seed)
    with jax.enable_x64(True):
        drawn = {path: np.asarray(value, np.float32) for path, value in make_params().items()}
    params = jax.device_put(drawn, jax.NamedSharding(mesh, jax.P()))
    schedule = build_schedule(config.schedule, config.optimizer.learning_rate, steps)
    step, state = jax.jit(make_train_step(config, MODEL, optimizer, schedule, mesh)), init_state(params, optimizer)
    batch, losses = make_batch(), []
    for _ in range(steps):
        state, metrics = step(state, {}, batch)
        losses.append(float(metrics["loss"]))
    return losses, state


def test_training_reaches_nearly_the_same_loss():
    (wide, _), (rounded, state) = train("float32"), train("bfloat16")
    assert isinstance(state.opt_state[0], RoundedState)
    assert int(state.opt_state[0].count) == 40
    assert wide[-1] < 0.5 * wide[0]
    assert rounded[0] == wide[0]
    assert rounded[-1] != wide[-1]
    assert rounded[-1] == pytest.approx(wide[-1], rel=0.03)
