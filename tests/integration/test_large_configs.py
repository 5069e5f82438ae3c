"""The large configs, traced whole for hardware that is not here: seconds, and no memory."""

import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from sft_jax.command_line import read_config
from sft_jax.model.families import num_params
from sft_jax.model.param_dims import LOGICAL_DIMS
from sft_jax.model.presets import preset_config
from sft_jax.model.transformer import abstract_params
from sft_jax.placed_model import ModelOnMesh
from sft_jax.sharding import abstract_batch, build_abstract_mesh, check_batch_divides
from sft_jax.training.optimizer import build_schedule
from sft_jax.training.step import make_train_step

CONFIGS = Path(__file__).parents[2] / "configs"
MESHES = [["--config.mesh.fsdp=64"], ["--config.mesh.replica=2", "--config.mesh.fsdp=8", "--config.mesh.tensor=4"]]


@pytest.mark.parametrize("mesh_args", MESHES, ids=["fsdp", "replica-fsdp-tensor"])
@pytest.mark.parametrize(("name", "params"), [("70b", 70_553_706_496), ("8b", 8_030_261_248)])
def test_train_step_traces_on_64_devices(name, params, mesh_args):
    config = read_config([f"--config={CONFIGS}/{name}.py", "--config.batch.grad_accum_steps=1", *mesh_args])
    model = preset_config(config.model.preset, config.model.overrides)
    assert num_params(model) == params
    mesh = build_abstract_mesh(config.mesh, 64)
    check_batch_divides(config, mesh)
    placed = ModelOnMesh(config, model, mesh)
    step = make_train_step(config, model, placed.optimizer, build_schedule(config.schedule, 1.0, 100), mesh)
    batch = abstract_batch(mesh, config.batch.batch_size, config.data.max_seq_len)
    state, metrics = jax.eval_shape(step, placed.abstract_state, {}, batch)
    describe = lambda leaf: (leaf.shape, leaf.dtype)  # noqa: E731
    assert jax.tree.map(describe, state) == jax.tree.map(describe, placed.abstract_state)
    assert metrics["loss"].dtype == jnp.float32
    # Whatever is large is split: on each device a 64th of the parameters, and the norms in full.
    local = sum(math.prod(p.sharding.shard_shape(p.shape)) for p in placed.abstract_state.params.values())
    replicas = config.mesh.replica
    assert local < 1.01 * replicas * params / 64


@pytest.mark.parametrize("name", ["llama3.1-70b", "llama3.2-1b"])
def test_every_parameter_has_exactly_one_rule(name):
    for path, leaf in abstract_params(preset_config(name, {}), "float32").items():
        found = [dims for pattern, dims in LOGICAL_DIMS if re.fullmatch(pattern, path)]
        assert len(found) == 1
        assert len(found[0]) == len(leaf.shape)
