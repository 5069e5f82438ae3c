"""A mixture of experts from its folder to its mesh: dtypes, shards, and what trains."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from sft_jax.checkpoint.hf import read_config
from sft_jax.config_schema import Config, LoraConfig, MeshConfig, ModelConfig
from sft_jax.placed_model import ModelOnMesh
from sft_jax.sharding import build_mesh

GOLDENS = Path(__file__).parents[1] / "parity" / "goldens"
ATTENTION = LoraConfig(rank=2, targets=("q_b_proj", "kv_b_proj", "o_proj", "shared_experts.up_proj"))


@pytest.mark.parametrize("lora", [LoraConfig(), ATTENTION], ids=["full", "lora"])
def test_a_folder_is_placed_as_it_was_planned(lora):
    folder = GOLDENS / "deepseek_v3"
    config = Config(model=ModelConfig(path=str(folder), param_dtype="bfloat16"), lora=lora)
    mesh = build_mesh(MeshConfig(replica=2, fsdp=1, expert=4))
    placed = ModelOnMesh(config, read_config(folder)[0], mesh)
    trained, frozen = placed.open_params()
    for params, leaves in zip((trained, frozen), placed.leaves, strict=True):
        planned = {path: (leaf.shape, jnp.dtype(leaf.dtype)) for path, leaf in leaves.items()}
        assert {path: (value.shape, value.dtype) for path, value in params.items()} == planned
    every = trained | frozen
    assert {path for path, value in every.items() if value.dtype == jnp.float32} == {"layers.0.1.mlp.router.correction"}
    kernel = every["layers.0.1.mlp.experts.gate.kernel"]  # [layers, experts, D, X]
    assert kernel.sharding.shard_shape(kernel.shape) == (1, 2, 12, 4)
    if lora.rank:
        assert not any("experts" in path for path in trained)
        assert "layers.0.1.mlp.shared.up.lora_a" in trained
    assert jax.tree.map(lambda leaf: leaf.dtype, placed.abstract_state.params) == {
        path: value.dtype for path, value in trained.items()
    }
