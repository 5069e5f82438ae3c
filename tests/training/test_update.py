"""Moments in the host's memory: the same step, and what has no such memory is refused."""

import dataclasses

import jax
import numpy as np
import pytest
from test_step import MODEL, make_batch, make_config, make_params, relative

from sft_jax.config_schema import MeshConfig
from sft_jax.datatypes import ConfigError
from sft_jax.model.param_dims import logical_dims
from sft_jax.sharding import build_mesh, is_on_host, shardings_for, spec_for
from sft_jax.training import update
from sft_jax.training.optimizer import build_optimizer, build_schedule
from sft_jax.training.replicas import ReplicaCheck
from sft_jax.training.state import init_state
from sft_jax.training.step import make_train_step


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def run(optimizer, batches, paths=None):
    """(the state before and after a step for each batch, jitted as a run's is, the mesh), of `paths` alone."""
    config = make_config(optimizer=optimizer)
    mesh = build_mesh(MeshConfig(fsdp=2, tensor=2, replica=2))
    params = make_params()
    shardings = shardings_for(mesh, {p: logical_dims(p) for p in params}, {p: v.shape for p, v in params.items()})
    params = {path: jax.device_put(value, shardings[path]) for path, value in params.items()}
    frozen = {path: value for path, value in params.items() if paths and not path.startswith(paths)}
    trained = {path: value for path, value in params.items() if path not in frozen}
    built = build_optimizer(config.optimizer, seed=0)
    state = init_state(trained, built, config.optimizer.offload)
    before, placed = jax.device_get(state), jax.tree.map(lambda leaf: leaf.sharding, state)
    schedule = build_schedule(config.schedule, config.optimizer.learning_rate, 10)
    step = jax.jit(
        make_train_step(config, MODEL, built, schedule, mesh, num_sources=2),
        donate_argnums=0,
        out_shardings=(placed, None),
    )
    place = lambda x: jax.device_put(x, jax.NamedSharding(mesh, spec_for(("batch", "seq")[: x.ndim])))  # noqa: E731
    for batch in batches:
        state, _ = step(state, frozen, jax.tree.map(place, batch))
    return before, state, mesh


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_the_update_is_the_same_and_moments_of_layers_stay_on_the_host(name):
    batches = [make_batch(), make_batch(seed=5)]
    _, near, _ = run({"name": name}, batches)
    _, far, mesh = run({"name": name, "offload": True}, batches)
    assert relative(jax.device_get(far), jax.device_get(near)) < 1e-12
    kinds = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(far.opt_state):
        kinds.setdefault(".layers." in jax.tree_util.keystr(path, simple=True, separator="."), set()).add(
            leaf.sharding.memory_kind
        )
    assert kinds == {True: {"pinned_host"}, False: {"device"}}
    assert not any(is_on_host(leaf) for leaf in jax.tree.leaves(far.params))
    ReplicaCheck(far, mesh).check(2, far)


def test_where_layers_alone_train():
    batches = [make_batch()]
    _, near, _ = run({}, batches, paths="layers.")
    _, far, _ = run({"offload": True}, batches, paths="layers.")
    assert relative(jax.device_get(far), jax.device_get(near)) < 1e-12


@pytest.mark.parametrize("bad", ["loss", "direction of a layer"])
def test_a_bad_step_changes_only_the_counters(bad):
    batch, options = make_batch(), {"offload": True}
    if bad == "loss":
        batch = dataclasses.replace(batch, loss_weights=batch.loss_weights.at[3, 2].set(np.nan))
    else:  # something / 0
        options |= {"eps": 0.0, "grad_clip_norm": 1e-300}
    before, after, _ = run(options, [batch], paths="layers.")
    assert (int(after.step), int(after.num_updates), int(after.num_skipped)) == (1, 0, 1)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after.params), before.params)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after.opt_state), before.opt_state)


def test_devices_without_such_a_memory_are_refused(monkeypatch):
    monkeypatch.setattr(update, "HOST_MEMORY", "nowhere")
    with pytest.raises(ConfigError, match=r"config.optimizer.offload: is True, and .*nowhere.*Set it to False"):
        run({"offload": True}, [])
