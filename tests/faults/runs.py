"""Small runs to damage: a state on eight devices, saved at a few steps, with no training."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sft_jax.checkpoint.manager import CheckpointManager
from sft_jax.checkpoint.retention import Retention
from sft_jax.config_schema import MeshConfig
from sft_jax.sharding import build_mesh


def make_state(step: int) -> dict:
    """A state that is known by its step."""
    mesh = build_mesh(MeshConfig(fsdp=8))
    place = lambda value, spec: jax.device_put(value, NamedSharding(mesh, spec))  # noqa: E731
    params = {
        "layers.0.0.mlp.up.kernel": place(np.float32(step) + jnp.arange(64.0).reshape(16, 4), PartitionSpec("fsdp")),
        "final_norm.scale": place(jnp.full(4, step, jnp.bfloat16), PartitionSpec()),
    }
    return {"step": place(jnp.asarray(step, jnp.int32), PartitionSpec()), "params": params, "opt_state": (params, {})}


def abstract(state: dict) -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def save_run(run_dir: Path, steps: range | list[int], latest: int = 5) -> Path:
    with CheckpointManager(run_dir, Retention(latest), config_digest="c", data_fingerprint="d") as manager:
        for step in steps:
            manager.save(step, make_state(step), {"data": {"seed": step}})
    return run_dir


def restored_step(run_dir: Path, allow_fresh: bool = False) -> int | None:
    """What a start of the run restores: the step, proved to have the values that were saved; None: it begins anew."""
    with CheckpointManager(run_dir, Retention(5), allow_fresh=allow_fresh) as manager:
        step = manager.find_restorable().step
        if step is None:
            return None
        state, meta = manager.restore(step, abstract(make_state(0)))
    jax.tree.map(_assert_same, state, make_state(step))
    assert meta == {"data": {"seed": step}}
    return step


def _assert_same(restored: jax.Array, saved: jax.Array) -> None:
    for one, other in zip(restored.addressable_shards, saved.addressable_shards, strict=True):
        np.testing.assert_array_equal(one.data, other.data)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink())


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in files_of(folder)}


def copy_run(run_dir: Path, target: Path) -> Path:
    return Path(shutil.copytree(run_dir, target, symlinks=True))
