"""Which tensors an adapter folder has, by family; test_peft_parity holds them to peft."""

from pathlib import Path
from typing import Any

import pytest

from sft_jax.checkpoint.hf import read_config
from sft_jax.checkpoint.peft import adapter_config
from sft_jax.checkpoint.peft_names import AdapterTensor, adapter_tensors
from sft_jax.config_schema import Config, LoraConfig, MeshConfig
from sft_jax.datatypes import ConfigError
from sft_jax.model.families import find_moe
from sft_jax.placed_model import ModelOnMesh
from sft_jax.sharding import build_abstract_mesh

GOLDENS = Path(__file__).parents[1] / "parity" / "goldens"


def name_tensors(family: str, **lora) -> tuple[list[AdapterTensor], dict[str, Any]]:
    """(the folder's tensors, the fields of its config)."""
    config = Config(lora=LoraConfig(**{"rank": 4, "targets": ("o_proj",)} | lora))
    model, _ = read_config(GOLDENS / family)
    placed = ModelOnMesh(config, model, build_abstract_mesh(MeshConfig(fsdp=1), 1))
    shapes = {path: leaf.shape for path, leaf in placed.leaves[0].items()}
    tensors = list(adapter_tensors(model, config.lora, shapes))
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
    ("family", "container", "maps"),
    [
        ("mixtral", "block_sparse_moe", ("w1", "w3", "w2")),
        ("qwen3_moe", "mlp", ("gate_proj", "up_proj", "down_proj")),  # its first layer is dense, and has no adapter
        ("deepseek_v3", "mlp", ("gate_proj", "up_proj", "down_proj")),
    ],
)
@pytest.mark.parametrize("targets", [("experts.*",), ("experts.down", "o_proj")])
def test_each_expert_has_the_names_of_its_files(family: str, container: str, maps: tuple[str, ...], targets) -> None:
    tensors, fields = name_tensors(family, targets=targets)
    maps = maps if "experts.*" in targets else maps[2:]
    experts = {tensor.module.split(".", 3)[3] for tensor in tensors if tensor.is_of_experts}
    model, _ = read_config(GOLDENS / family)
    numbers = range(find_moe(model).num_experts)
    assert experts == {f"{container}.experts.{number}.{name}" for number in numbers for name in maps}
    assert fields["target_modules"] == sorted({*maps, *targets[1:]})
    assert fields["rank_pattern"] == fields["alpha_pattern"] == {}


@pytest.mark.parametrize(
    ("family", "lora", "message"),
    [
        ("mixtral", {"targets": ("experts.(gate|up)",)}, "targets: of the experts' maps, gate and up alone"),
        ("mixtral", {"targets": ("experts.(down|up)",)}, "targets: of the experts' maps, down and up alone"),
        ("mixtral", {"targets": ("experts.*",), "use_rslora": True}, "use_rslora: is set, and PEFT"),
        ("gpt_oss", {"targets": ("experts.*",)}, "targets: model.layers.0.mlp.experts.gate_up_proj stands beside"),
        ("qwen3_moe", {"targets": ("mlp.gate_proj",)}, "targets: model.layers.0.mlp.gate_proj.weight stands beside"),
        ("deepseek_v3", {"targets": (".*",)}, "targets: model.layers.0.mlp.gate_proj.weight stands beside"),
        ("deepseek_v3", {"targets": ("mlp.shared.up",)}, "mlp.shared_experts.up_proj.weight stands beside"),
    ],
)
def test_adapters_that_peft_would_read_otherwise_are_refused(family: str, lora, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        name_tensors(family, **lora)


@pytest.mark.parametrize(
    ("family", "name", "tensor"),
    [
        ("mixtral", "experts.*", "block_sparse_moe.experts.0.w1.weight"),
        ("qwen3_moe", "experts.down", "mlp.experts.0.down_proj.weight"),
        ("deepseek_v3", "mlp.experts.*", "mlp.experts.0.gate_proj.weight"),
        ("gpt_oss", "experts.*", "mlp.experts.gate_up_proj"),
        ("gpt_oss", "experts.down", "mlp.experts.down_proj"),
        ("gpt_oss", "self_attn.sinks", "self_attn.sinks"),
        ("gpt_oss", "attention.sinks", "self_attn.sinks"),
    ],
)
def test_what_is_no_module_s_is_refused(family: str, name: str, tensor: str) -> None:
    with pytest.raises(ConfigError, match=rf"modules_to_save: model.layers.\d.{tensor} is no module's"):
        name_tensors(family, modules_to_save=(name,))


@pytest.mark.parametrize(
    ("family", "option", "name", "module"),
    [
        ("qwen2", "targets", "q_proj.bias", "attention.query"),
        ("qwen2", "modules_to_save", "q_proj.bias", "attention.query"),
        ("qwen2", "modules_to_save", "attention.query.kernel", "attention.query"),
        ("mixtral", "modules_to_save", "block_sparse_moe.gate.weight", "mlp.router"),
        ("deepseek_v3", "modules_to_save", "e_score_correction_bias", "mlp.router"),
        ("gpt_oss", "targets", "experts.down_proj_bias", "mlp.experts.down"),
        ("gpt_oss", "targets", "o_proj.bias", "attention.out"),
    ],
)
def test_a_parameter_is_no_name_of_its_module(family: str, option: str, name: str, module: str) -> None:
    message = rf"{option}: '{name}' finds parameters only\. Name modules: layers\.\d\.\d\.{module} = "
    with pytest.raises(ConfigError, match=message):
        name_tensors(family, **{option: (name,)})


@pytest.mark.parametrize(
    ("option", "pattern", "message"),
    [
        ("targets", "(q_proj|k_proj.bias)", r"'\(k_proj.bias\)', a part of .*, finds parameters only"),
        ("targets", "q_proj|qproj", r"'qproj', a part of 'q_proj\|qproj', matches nothing"),
        ("targets", "self_attn.(?:(q|w)_proj|out)", r"'self_attn.\(\?:\(w\)_proj\)', a part of .* matches nothing"),
        ("modules_to_save", "(embed_tokens|lm_heads)", r"'\(lm_heads\)', a part of .* matches nothing"),
    ],
)
def test_a_part_of_a_pattern_that_finds_nothing_is_refused(option: str, pattern: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.lora\.{option}: {message}"):
        name_tensors("qwen2", **{option: (pattern,)})


def test_a_module_that_has_sinks_beside_its_maps_is_not_the_sinks() -> None:
    with pytest.raises(ConfigError, match=r"'attention' matches nothing\. .*layers\.0\.0\.attention\.sinks"):
        name_tensors("gpt_oss", modules_to_save=("attention",))
