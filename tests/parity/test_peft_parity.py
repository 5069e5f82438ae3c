"""Live, beside peft: what we export it loads, what it saves we go on from, and the logits are the same both ways; and a
quantized base is the model of its decoded weights."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from sft_jax.checkpoint.hf import read_config
from sft_jax.checkpoint.peft import export_adapter
from sft_jax.config_schema import Config, LoraConfig, MeshConfig, ModelConfig
from sft_jax.model.adapter_use import AdapterUse
from sft_jax.model.transformer import Params, forward, output_head
from sft_jax.placed_model import ModelOnMesh
from sft_jax.sharding import build_mesh

torch = pytest.importorskip("torch", reason="torch is not installed here; make test-parity installs it")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from torch_reference import plain_kernels, random_llama  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft asks transformers for it
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

UNTIED = dict(
    vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip
TIED = UNTIED | dict(tie_word_embeddings=True, attention_bias=True)
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GOLDENS = Path(__file__).parent / "goldens"
FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
# (fields of the model or the name of a golden one, fields of config.lora)
VARIANTS: dict[str, tuple[dict[str, Any] | str, dict[str, Any]]] = {
    "lora": (UNTIED, dict()),
    "lora_of_some": (TIED, dict(targets=("q_proj", "down_proj"))),
    "rslora": (TIED, dict(use_rslora=True)),
    "dora": (TIED, dict(use_dora=True)),
    "dora_rslora": (UNTIED, dict(use_dora=True, use_rslora=True)),
    "saved": (UNTIED, dict(modules_to_save=("embed_tokens", "lm_head", "input_layernorm"))),
    "saved_tied": (TIED, dict(modules_to_save=("embed_tokens", "model.norm"))),
    "layers_in_groups": ("gemma3_text", dict(targets=("q_proj", "up_proj"))),
    "beside_experts": ("mixtral", dict(targets=("q_proj", "o_proj"))),
    "attention_of_qwen3_moe": ("qwen3_moe", dict(targets=ALL[:4])),
    "attention_of_gpt_oss": ("gpt_oss", dict(targets=ALL[:4])),
    "router_of_mixtral": ("mixtral", dict(targets=("q_proj",), modules_to_save=("mlp.gate",))),
    "router_of_gpt_oss": ("gpt_oss", dict(targets=("q_proj",), modules_to_save=("mlp.router",))),
    "latent": ("deepseek_v3", dict(targets=("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"))),
    "fused": ("phi3", dict(targets=FUSED)),
    "fused_dora_rslora": ("phi3", dict(targets=FUSED, use_dora=True, use_rslora=True)),
}
# PEFT joins the tensors of experts in memory, and saves them so.
OF_EXPERTS: dict[str, tuple[dict[str, Any] | str, dict[str, Any]]] = {
    "experts_of_mixtral": ("mixtral", dict(targets=("all-linear", "experts.*"), modules_to_save=("router",))),
    "experts_of_qwen3_moe": ("qwen3_moe", dict(targets=(*ALL[:4], "experts.*"))),
    "experts_of_deepseek_v3": ("deepseek_v3", dict(targets=("experts.*",), modules_to_save=("mlp.router",))),
    "down_of_experts": ("qwen3_moe", dict(targets=("experts.down",))),
}


@pytest.fixture
def variant(request, tmp_path: Path):
    """(the base's folder, fields of config.lora)."""
    fields, lora = (VARIANTS | OF_EXPERTS)[request.param]
    base = tmp_path / "base" if isinstance(fields, dict) else GOLDENS / fields
    if isinstance(fields, dict):
        random_llama(seed=1, **fields).save_pretrained(base)
    return base, dict(rank=4, alpha=10.0) | lora


def place(folder: Path, lora: dict[str, Any]) -> ModelOnMesh:
    section = ModelConfig(path=str(folder), compute_dtype="float32")
    config = Config(model=section, lora=LoraConfig(**lora))
    return ModelOnMesh(config, read_config(folder)[0], build_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))


def move(params: Params) -> Params:
    """Far from where adapters start."""
    draw = lambda i, value: np.random.default_rng(i).normal(size=value.shape).astype(value.dtype) * 0.1  # noqa: E731
    return {path: params[path] + draw(i, params[path]) for i, path in enumerate(sorted(params))}


def random_ids() -> np.ndarray:
    return np.random.default_rng(0).integers(31, size=(2, 20)).astype(np.int32)


def our_logits(placed: ModelOnMesh, params: Params) -> np.ndarray:
    ids = random_ids()
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    options = {"compute_dtype": "float32", "remat": "none", "attention": "reference"}
    options |= {"adapters": AdapterUse(placed.config.lora.scale)}
    hidden = forward(params, placed.model, jnp.asarray(ids), jnp.asarray(positions), jnp.ones_like(ids), **options)
    return np.asarray(jnp.einsum("bld,vd->blv", hidden, output_head(params)))


def their_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor(random_ids(), dtype=torch.long)).logits.numpy()


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter_model.safetensors")


def load_base(folder: Path) -> Any:
    kernels = plain_kernels(json.loads((folder / "config.json").read_text()))
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **kernels).eval()


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # of experts that it joins
@pytest.mark.parametrize("variant", VARIANTS | OF_EXPERTS, indirect=True)
def test_peft_loads_what_we_export(variant, tmp_path: Path) -> None:
    folder, lora = variant
    placed = place(folder, lora)
    trainable, frozen = placed.open_params()
    start = our_logits(placed, trainable | frozen)
    np.testing.assert_allclose(start, their_logits(load_base(folder)), atol=1e-4)  # no effect yet
    trained = move(trainable)
    export_adapter(tmp_path / "adapter", trained, placed.model, placed.config.lora, str(folder), "float32")

    ours = our_logits(placed, trained | frozen)
    assert np.abs(ours - start).max() > 0.1
    loaded = peft.PeftModel.from_pretrained(load_base(folder), tmp_path / "adapter")
    if not any("experts" in name for name in lora.get("targets", ())):
        assert peft.get_peft_model_state_dict(loaded).keys() == read_tensors(tmp_path / "adapter").keys()
    np.testing.assert_allclose(their_logits(loaded.eval()), ours, atol=2e-4)
    merged = our_logits(placed, placed.merge(trained | frozen))
    np.testing.assert_allclose(their_logits(loaded.merge_and_unload()), merged, atol=2e-4)


@pytest.mark.parametrize("variant", VARIANTS, indirect=True)
def test_we_go_on_from_what_peft_saves(variant, tmp_path: Path) -> None:
    folder, lora = variant
    placed = place(folder, lora | {"init_from": str(tmp_path / "adapter")})
    options = {
        "r": lora["rank"], "lora_alpha": lora["alpha"], "target_modules": list(lora.get("targets", ALL)),
        "modules_to_save": list(lora.get("modules_to_save", ())) or None, "use_rslora": lora.get("use_rslora", False),
        "use_dora": lora.get("use_dora", False), "task_type": "CAUSAL_LM",
        "ensure_weight_tying": placed.model.tie_embeddings and "modules_to_save" in lora,
    }  # fmt: skip
    theirs = peft.get_peft_model(load_base(folder), peft.LoraConfig(**options))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path / "adapter")

    trainable, frozen = placed.open_params()
    np.testing.assert_allclose(our_logits(placed, trainable | frozen), their_logits(theirs.eval()), atol=2e-4)
    export_adapter(tmp_path / "again", trainable, placed.model, placed.config.lora, str(folder), "float32")
    first, again = (read_tensors(tmp_path / name) for name in ("adapter", "again"))
    assert first.keys() == again.keys()
    if "qkv_proj" not in lora.get("targets", ()):  # parts of what is fused share a matrix there, and never here
        assert all(np.array_equal(first[name], again[name]) for name in first)
    placed = place(folder, lora | {"init_from": str(tmp_path / "again")})
    once_more, _ = placed.open_params()
    assert all(np.array_equal(once_more[path], trainable[path]) for path in trainable)


@pytest.mark.parametrize("trained", [None, ["embed_tokens", "lm_head"]], ids=["resized", "resized_and_trained"])
def test_we_go_on_from_a_changed_vocabulary(trained: list[str] | None, tmp_path: Path) -> None:
    random_llama(seed=1, **UNTIED).save_pretrained(tmp_path / "base")
    resized = load_base(tmp_path / "base")
    resized.resize_token_embeddings(100, mean_resizing=False)
    options = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": trained, "task_type": "CAUSAL_LM"}
    theirs = peft.get_peft_model(resized, peft.LoraConfig(**options))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    assert "base_model.model.lm_head.weight" in read_tensors(tmp_path / "adapter")

    whole = {"modules_to_save": ("embed_tokens", "lm_head"), "init_from": str(tmp_path / "adapter")}
    placed = place(tmp_path / "base", dict(rank=4, alpha=8.0, targets=("q_proj",)) | whole)
    placed = dataclasses.replace(placed, model=dataclasses.replace(placed.model, vocab_size=100))
    trainable, frozen = placed.open_params()
    np.testing.assert_allclose(our_logits(placed, trainable | frozen), their_logits(theirs.eval()), atol=2e-4)
