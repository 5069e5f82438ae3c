"""Saving, listing, keeping and restoring steps, on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sft_jax.checkpoint.manager import CheckpointManager
from sft_jax.checkpoint.reader import CheckpointReader
from sft_jax.checkpoint.retention import Retention
from sft_jax.config_schema import MeshConfig
from sft_jax.datatypes import StorageError
from sft_jax.sharding import build_mesh


def make_state(mesh, scale=1.0):
    place = lambda x, s: jax.device_put(x, NamedSharding(mesh, s))  # noqa: E731
    params = {"layers.0.0.mlp.up.kernel": place(scale * jnp.arange(16.0).reshape(8, 2), PartitionSpec("fsdp"))}
    count = place(jnp.asarray(3, jnp.int32), PartitionSpec())
    return {"step": count, "params": params, "opt_state": (params, {"count": count})}


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def test_restores_what_was_saved_on_another_mesh(tmp_path):
    state = make_state(build_mesh(MeshConfig(fsdp=8)))
    manager = CheckpointManager(tmp_path)
    manager.save(3, state, {"data": {"seed": 1}})
    manager.close()
    other = make_state(build_mesh(MeshConfig(fsdp=2, tensor=4)), scale=0.0)
    manager = CheckpointReader(tmp_path)
    restored, meta = manager.restore(3, abstract(other))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, other)
    assert meta == {"data": {"seed": 1}} == manager.read_meta(3)
    params = manager.restore_params(3, abstract(other["params"]))
    jax.tree.map(np.testing.assert_array_equal, params, state["params"])
    manager.close()


def test_keeps_the_latest_and_the_best(tmp_path):
    state = make_state(build_mesh(MeshConfig()))
    manager = CheckpointManager(tmp_path, Retention(latest=2, every=3, best=True))
    for step, loss in ((1, None), (2, 0.5), (3, None), (4, 0.4), (5, None), (6, None), (7, None)):
        manager.save(step, state, {}, best_loss=loss)
    manager.wait()
    assert manager.all_steps() == [3, 4, 6, 7]
    manager.close()


def test_saving_a_saved_step_again_leaves_it(tmp_path):
    mesh = build_mesh(MeshConfig())
    manager = CheckpointManager(tmp_path)
    manager.save(1, make_state(mesh), {})
    manager.save(1, make_state(mesh, scale=2.0), {})
    restored, _ = manager.restore(1, abstract(make_state(mesh)))
    assert restored["params"]["layers.0.0.mlp.up.kernel"][0, 1] == 1
    manager.close()


def test_errors_say_what_is_there(tmp_path):
    state = make_state(build_mesh(MeshConfig()))
    manager = CheckpointManager(tmp_path)
    assert manager.find_restorable().step is None
    manager.save(4, state, {})
    manager.wait()
    with pytest.raises(StorageError, match=r"has no step 9\. Saved steps: 4"):
        manager.read_meta(9)
    wrong = abstract(state) | {"params": {"other": jax.ShapeDtypeStruct((2,), jnp.float32)}}
    with pytest.raises(StorageError, match="cannot be restored"):
        manager.restore(4, wrong)
    manager.close()
