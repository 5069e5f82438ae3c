"""Live, beside transformers: a null in config.json means here what it means there, or is refused."""

import dataclasses
from typing import Any

import pytest

from sft_jax.datatypes import ConfigError
from sft_jax.model.family_table import FAMILIES
from sft_jax.model.hf_config import read_hf_config

torch = pytest.importorskip("torch", reason="torch is not installed here; make test-parity installs it")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

SMALL = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
OF_FAMILY: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    "deepseek_v3": {
        "num_key_value_heads": 2, "n_routed_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
        "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
        "first_k_dense_replace": 1,
    },
}  # fmt: skip
ROPE_KEYS = {"rope_theta", "rope_local_base_freq", "rope_scaling", "partial_rotary_factor", "sliding_window_pattern"}
# What null means where it is neither what absence means nor None.
MEANING = {"num_key_value_heads": 2, "norm_topk_prob": False, "rope_interleave": False}


def fields_of(family: str) -> dict[str, Any]:
    return {"model_type": family} | SMALL | OF_FAMILY.get(family, {})


def their_logits(fields: dict[str, Any]) -> Any:
    config = transformers.CONFIG_MAPPING[fields["model_type"]].from_dict(dict(fields))
    torch.manual_seed(0)
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_config(config, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        return model(input_ids=torch.arange(24)[None], use_cache=False).logits


def declared_keys(family: str) -> set[str]:
    own, of_all = (
        {field.name for field in dataclasses.fields(kind)}
        for kind in (transformers.CONFIG_MAPPING[family], transformers.PreTrainedConfig)
    )
    known = FAMILIES[family]
    return own - of_all | ROPE_KEYS | {"head_dim"} | set(known.options) | set(known.only)


@pytest.mark.parametrize("family", FAMILIES)
def test_null_means_what_it_means_in_transformers(family: str) -> None:
    base = fields_of(family)
    unchanged = their_logits(base)
    for key in sorted(declared_keys(family)):
        fields = base | {key: None}
        try:
            ours = read_hf_config(fields, "config.json")
        except ConfigError:
            continue
        theirs = their_logits(fields)  # which must not fail
        if ours == read_hf_config(base, "config.json"):
            assert torch.equal(theirs, unchanged), key
        elif key in MEANING:
            meaning = base | {key: MEANING[key]}
            assert ours == read_hf_config(meaning, "config.json")
            assert torch.equal(theirs, their_logits(meaning)), key
