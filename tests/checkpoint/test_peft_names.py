"""Which tensors an adapter folder has, by family; test_peft_parity holds them to peft."""

from pathlib import Path
from typing import Any

import pytest

from sft_jax.checkpoint.hf import read_config
from sft_jax.checkpoint.peft import adapter_config
from sft_jax.checkpoint.peft_names import AdapterTensor, adapter_tensors
from sft_jax.config_schema import Config, LoraConfig, MeshConfig
from sft_jax.datatypes import ConfigError
from sft_jax.placed_model import ModelOnMesh
from sft_jax.sharding import build_abstract_mesh

GOLDENS = Path(__file__).parents[1] / "parity" / "goldens"


def name_tensors(family: str, **lora) -> tuple[list[AdapterTensor], dict[str, Any]]:
    """(the folder's tensors, the fields of its config)."""
    config = Config(lora=LoraConfig(**{"rank": 4, "targets": ("o_proj",)} | lora))
    model, _ = read_config(GOLDENS / family)
    placed = ModelOnMesh(config, model, build_abstract_mesh(MeshConfig(fsdp=1), 1))
    shapes = {path: leaf.shape for path, leaf in placed.leaves[0].items()}
    tensors = list(adapter_tensors(model, shapes))
    return tensors, adapter_config(tensors, model, config.lora, "base")


@pytest.mark.parametrize(
    ("family", "name", "module"),
    [
        ("mixtral", "router", "mlp.gate"),
        ("mixtral", "mlp.gate", "mlp.gate"),
        ("mixtral", "block_sparse_moe.gate", "mlp.gate"),
        ("qwen3_moe", "router", "mlp.gate"),
        ("gpt_oss", "mlp.router", "mlp.router"),
        ("deepseek_v3", "mlp.router", "mlp.gate"),  # with a correction
        ("qwen2", "q_proj", "self_attn.q_proj"),  # with a bias
    ],
)
def test_what_trains_whole_is_named_as_the_module_that_transformers_has(family: str, name: str, module: str) -> None:
    tensors, fields = name_tensors(family, modules_to_save=(name,))
    assert {saved.split(".", 3)[3] for saved in fields["modules_to_save"]} == {module}
    saved = {tensor.name for tensor in tensors if tensor.kind == "whole"}
    assert {name.rpartition(".")[0] for name in saved} == {
        f"base_model.model.{name}" for name in fields["modules_to_save"]
    }


@pytest.mark.parametrize(
    ("family", "name", "tensor"),
    [
        ("mixtral", "experts.*", "block_sparse_moe.experts.0.w1.weight"),
        ("qwen3_moe", "experts.down", "mlp.experts.0.down_proj.weight"),
        ("deepseek_v3", "mlp.experts.*", "mlp.experts.0.gate_proj.weight"),
        ("gpt_oss", "experts.*", "mlp.experts.gate_up_proj"),
        ("gpt_oss", "experts.down", "mlp.experts.down_proj"),
        ("gpt_oss", "self_attn.sinks", "self_attn.sinks"),
        ("gpt_oss", "attention", "self_attn.sinks"),
    ],
)
def test_what_is_no_module_s_is_refused(family: str, name: str, tensor: str) -> None:
    with pytest.raises(ConfigError, match=rf"modules_to_save: model.layers.\d.{tensor} is no module's"):
        name_tensors(family, modules_to_save=(name,))
