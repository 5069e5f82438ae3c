"""Saving, listing, keeping and restoring steps, on eight devices."""

import errno
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sft_jax.checkpoint.manager import CheckpointManager
from sft_jax.checkpoint.reader import CheckpointReader
from sft_jax.checkpoint.retention import Retention
from sft_jax.config_schema import MeshConfig
from sft_jax.datatypes import NumericError, StorageError
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


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    state = make_state(build_mesh(MeshConfig(fsdp=8)))
    kernel = state["params"]["layers.0.0.mlp.up.kernel"]
    for value in (float("nan"), float("inf")):
        bad = state | {"params": {"layers.0.0.mlp.up.kernel": kernel.at[7, 1].set(value)}}
        with (
            CheckpointManager(tmp_path) as manager,
            pytest.raises(NumericError, match=r"step 2: \['params'\]\['layers.0.0.mlp.up.kernel'\] of the state"),
        ):
            manager.save(2, bad, {})
        assert list((tmp_path / "checkpoints").iterdir()) == []


def test_space_for_all_that_is_kept_is_asked_for_before_the_first_step(tmp_path, monkeypatch):
    free = 4 * 10**9
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    leaf = jax.ShapeDtypeStruct((10**9,), jnp.uint8)
    with CheckpointManager(tmp_path, Retention(latest=2)) as manager:
        manager.check_space({"a": leaf}, num_steps=100)
        error = r"has 4,000,000,000 bytes free, and 3 more checkpoints of up to 2,000,000,000 need 6,000,000,000"
        with pytest.raises(StorageError, match=error):
            manager.check_space({"a": leaf, "b": leaf}, num_steps=100)
    with CheckpointManager(tmp_path, Retention(latest=2, every=50)) as manager:
        with pytest.raises(StorageError, match="5 more checkpoints"):
            manager.check_space({"a": leaf}, num_steps=100)
        for step in (1, 2):
            manager.save(step, make_state(build_mesh(MeshConfig())), {})
        manager.wait()
        manager.check_space({"a": leaf}, num_steps=100)  # two of them are there already


class Flaky:
    """Of Orbax's saves, the first few are refused."""

    def __init__(self, error, times):
        self.error, self.left = error, times

    def __call__(self, orbax, *args, **kwargs):
        if self.left:
            self.left -= 1
            raise self.error
        return ocp.AsyncCheckpointer._save_whole(orbax, *args, **kwargs)


@pytest.fixture
def flaky(monkeypatch):
    monkeypatch.setattr(ocp.AsyncCheckpointer, "_save_whole", ocp.AsyncCheckpointer.save, raising=False)
    for module in ("storage", "manager"):
        monkeypatch.setattr(f"sft_jax.checkpoint.{module}.backoff_seconds", lambda num_failures: 0.001)

    def refuse(error, times):
        flaky = Flaky(error, times)
        monkeypatch.setattr(ocp.AsyncCheckpointer, "save", lambda *args, **kwargs: flaky(*args, **kwargs))

    return refuse


UNAVAILABLE = ValueError("UNAVAILABLE: the store is not there")


def test_what_may_pass_is_tried_again_with_the_state_of_a_later_step(tmp_path, flaky):
    state = make_state(build_mesh(MeshConfig()))
    flaky(UNAVAILABLE, 2)
    with CheckpointManager(tmp_path) as manager:
        manager.save(5, state, {})
        for step in range(6, 9):
            while step < 8 and not manager.poll():
                pass
            if step < 8:
                manager.save(step, state, {})
        manager.wait()
        assert manager.all_steps() == [7]
        assert not manager.poll()


def test_at_the_end_the_same_step_is_tried_again(tmp_path, flaky):
    flaky(UNAVAILABLE, 3)
    with CheckpointManager(tmp_path) as manager:
        manager.save_now(5, make_state(build_mesh(MeshConfig())), {})
        assert manager.all_steps() == [5]


@pytest.mark.parametrize(
    ("error", "times"),
    [(UNAVAILABLE, 4), (OSError(errno.ENOSPC, "full"), 1), (ValueError("ABC [os_error_code='30']"), 1)],
)
def test_what_will_not_pass_stops_the_run_and_keeps_the_older_steps(tmp_path, flaky, error, times):
    state = make_state(build_mesh(MeshConfig()))
    with CheckpointManager(tmp_path) as manager:
        manager.save_now(4, state, {})
    flaky(error, times)
    with CheckpointManager(tmp_path) as manager:
        assert manager.find_restorable().step == 4
        with pytest.raises(StorageError, match="checkpoints/5: could not be written"):
            manager.save_now(5, state, {})
    with CheckpointManager(tmp_path) as manager:
        assert manager.find_restorable().step == 4
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]


def test_the_error_that_stops_a_run_is_not_hidden_by_that_of_its_last_save(tmp_path, flaky):
    def save_and_diverge():
        with CheckpointManager(tmp_path) as manager:
            manager.save(1, make_state(build_mesh(MeshConfig())), {})
            raise NumericError("diverged")

    flaky(UNAVAILABLE, 1)
    with pytest.raises(NumericError, match="diverged") as caught:
        save_and_diverge()
    assert "checkpoints/1: could not be written: UNAVAILABLE: the store is not there" in caught.value.__notes__[0]
    CheckpointManager(tmp_path).close()  # the lock is free


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
