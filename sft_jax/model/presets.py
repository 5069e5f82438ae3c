"""The usual sizes by name, in the words of the config.json that each comes from.

The sources are https://huggingface.co/<source>/blob/main/config.json; tests/model/test_presets.py holds the published
numbers of parameters. Values beyond the sizes were compared with other projects' tables: sizes, bases, eps, windows,
scalings, soft-caps and lengths of Llama, Mistral 7B, Mixtral, Qwen2.5, Qwen3, OLMo-2 7B and 13B, Phi-3 mini, Phi-4 and
Gemma (but for its eps) with litgpt/config.py of https://github.com/Lightning-AI/litgpt at 26857050; Llama 3.1, Qwen3,
gpt-oss and DeepSeek-V3 with hf_model_configs.py of https://github.com/AI-Hypercomputer/maxtext, but for the length of
Qwen3-30B-A3B, which is the base's. Comments name what was compared with a copy of the config.json. The rest is written
from memory: Mistral-Nemo, Gemma 3 270M, Phi-3 medium, OLMo-2 1B and 32B, OLMo-3 and Granite.
"""

import dataclasses
import typing
from typing import Any, NamedTuple

from sft_jax.datatypes import ConfigError
from sft_jax.model.config_fields import Fields
from sft_jax.model.families import TransformerConfig, with_num_layers
from sft_jax.model.hf_config import read_hf_config


def preset_config(name: str, overrides: dict[str, Any]) -> TransformerConfig:
    """A preset with some fields changed: any but `family`, `latent` and `layers`, of which `num_layers` may be changed.

    Raises:
      ConfigError: for an unknown preset or field, or a wrong type.
    """
    if name not in PRESETS:
        raise ConfigError(f"config.model.preset: is {name!r}; expected one of {', '.join(PRESETS)}.")
    where = "config.model.overrides"
    hints = typing.get_type_hints(TransformerConfig)
    kinds = {field: hints[field] for field in hints if field not in ("family", "layers", "latent")}
    known = ["num_layers", *kinds]
    for field in overrides:
        if field not in known:
            raise ConfigError(f"{where}: has no field {field!r}. Known: {', '.join(known)}.")
    given = Fields(overrides, where)
    config = PRESETS[name]
    if "num_layers" in overrides:
        config = with_num_layers(config, given.take("num_layers", int))
    values = {}
    for field in list(given.rest):
        optional = [kind for kind in typing.get_args(kinds[field]) if kind is not type(None)]
        values[field] = given.take_optional(field, optional[0], None) if optional else given.take(field, kinds[field])
    return dataclasses.replace(config, **values)


class Preset(NamedTuple):
    """A config.json, and the repository that it lies in; '' for our own."""

    source: str
    fields: dict[str, Any]


def _preset(
    family: str,
    source: str,
    sizes: tuple[int, int, int, int, int],
    vocab_size: int,
    **fields: Any,
) -> Preset:
    """Args:
    sizes: layers, embed_dim, mlp_dim, query heads, key/value heads.
    """
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    given = {"model_type": family, "vocab_size": vocab_size, **dict(zip(names, sizes, strict=True))}
    return Preset(source, given | fields)


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }


_LLAMA = {"rms_norm_eps": 1e-5}
_LLAMA2 = _LLAMA | {"max_position_embeddings": 4096}
_LLAMA3 = _LLAMA | {"rope_theta": 500_000.0, "max_position_embeddings": 8192}
_LLAMA31 = _LLAMA | _llama3_rope(8.0) | {"max_position_embeddings": 131_072}
_LLAMA32 = _LLAMA | _llama3_rope(32.0) | {"max_position_embeddings": 131_072, "tie_word_embeddings": True}
_MISTRAL = {"rms_norm_eps": 1e-5, "head_dim": 128, "sliding_window": None}
_QWEN25 = {"rope_theta": 1_000_000.0}
_QWEN3 = {"rope_theta": 1_000_000.0, "head_dim": 128, "max_position_embeddings": 40_960}
_GEMMA3 = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window": 1024}
_OLMO2 = {"rope_theta": 500_000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 4096}
_OLMO3 = {
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 65_536,
    "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192},
}
_GRANITE3 = {
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
}
_TIED = {"tie_word_embeddings": True}
_PHI4_MINI_LONG = [
    1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898,
    2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424, 6.693110555,
    7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252, 16.37415215, 18.31155283,
    20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7,
    32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
]  # fmt: skip

TABLE: dict[str, Preset] = {
    # The embedded testbed's base model: 0.87M parameters, pretrained in minutes on a CPU.
    "testbed": _preset("llama", "", (4, 128, 352, 4, 2), 1024, **_LLAMA, **_TIED, max_position_embeddings=1024),
    # Workload W1 of benchmarks/: 15.2M parameters.
    "w1": _preset("llama", "", (6, 288, 768, 6, 6), 32_000, **_LLAMA, **_TIED, max_position_embeddings=2048),
    "llama2-7b": _preset("llama", "meta-llama/Llama-2-7b-hf", (32, 4096, 11008, 32, 32), 32_000, **_LLAMA2),
    "llama2-13b": _preset("llama", "meta-llama/Llama-2-13b-hf", (40, 5120, 13824, 40, 40), 32_000, **_LLAMA2),
    "llama2-70b": _preset("llama", "meta-llama/Llama-2-70b-hf", (80, 8192, 28672, 64, 8), 32_000, **_LLAMA2),
    "llama3-8b": _preset("llama", "meta-llama/Meta-Llama-3-8B", (32, 4096, 14336, 32, 8), 128_256, **_LLAMA3),
    "llama3-70b": _preset("llama", "meta-llama/Meta-Llama-3-70B", (80, 8192, 28672, 64, 8), 128_256, **_LLAMA3),
    "llama3.1-8b": _preset("llama", "meta-llama/Llama-3.1-8B", (32, 4096, 14336, 32, 8), 128_256, **_LLAMA31),
    "llama3.1-70b": _preset("llama", "meta-llama/Llama-3.1-70B", (80, 8192, 28672, 64, 8), 128_256, **_LLAMA31),
    "llama3.1-405b": _preset("llama", "meta-llama/Llama-3.1-405B", (126, 16384, 53248, 128, 8), 128_256, **_LLAMA31),
    "llama3.2-1b": _preset(
        "llama", "meta-llama/Llama-3.2-1B", (16, 2048, 8192, 32, 8), 128_256, **_LLAMA32, head_dim=64
    ),
    "llama3.2-3b": _preset(
        "llama", "meta-llama/Llama-3.2-3B", (28, 3072, 8192, 24, 8), 128_256, **_LLAMA32, head_dim=128
    ),
    "llama3.3-70b": _preset(
        "llama", "meta-llama/Llama-3.3-70B-Instruct", (80, 8192, 28672, 64, 8), 128_256, **_LLAMA31
    ),
    "mistral-7b-v0.1": _preset(
        "mistral", "mistralai/Mistral-7B-v0.1", (32, 4096, 14336, 32, 8), 32_000, **_MISTRAL | {"sliding_window": 4096},
        rope_theta=10_000.0, max_position_embeddings=32_768,
    ),
    "mistral-7b-v0.3": _preset(
        "mistral", "mistralai/Mistral-7B-v0.3", (32, 4096, 14336, 32, 8), 32_768, **_MISTRAL,
        rope_theta=1_000_000.0, max_position_embeddings=32_768,
    ),
    "mistral-nemo-12b": _preset(
        "mistral", "mistralai/Mistral-Nemo-Instruct-2407", (40, 5120, 14336, 32, 8), 131_072, **_MISTRAL,
        rope_theta=1_000_000.0, max_position_embeddings=131_072,
    ),
    "mistral-small-24b": _preset(  # all as in a copy
        "mistral", "mistralai/Mistral-Small-24B-Base-2501", (40, 5120, 32768, 32, 8), 131_072, **_MISTRAL,
        rope_theta=100_000_000.0, max_position_embeddings=32_768,
    ),
    "qwen2.5-0.5b": _preset(
        "qwen2", "Qwen/Qwen2.5-0.5B", (24, 896, 4864, 14, 2), 151_936, **_QWEN25, **_TIED,
        max_position_embeddings=32_768,
    ),
    "qwen2.5-1.5b": _preset(
        "qwen2", "Qwen/Qwen2.5-1.5B", (28, 1536, 8960, 12, 2), 151_936, **_QWEN25, **_TIED,
        max_position_embeddings=131_072,
    ),
    "qwen2.5-3b": _preset(
        "qwen2", "Qwen/Qwen2.5-3B", (36, 2048, 11008, 16, 2), 151_936, **_QWEN25, **_TIED,
        max_position_embeddings=32_768,
    ),
    "qwen2.5-7b": _preset(
        "qwen2", "Qwen/Qwen2.5-7B", (28, 3584, 18944, 28, 4), 152_064, **_QWEN25, max_position_embeddings=131_072
    ),
    # The bases' eps; of 32B as a published copy has it. The Instruct models have 1e-6.
    "qwen2.5-14b": _preset(
        "qwen2", "Qwen/Qwen2.5-14B", (48, 5120, 13824, 40, 8), 152_064, **_QWEN25, rms_norm_eps=1e-5,
        max_position_embeddings=131_072,
    ),
    "qwen2.5-32b": _preset(
        "qwen2", "Qwen/Qwen2.5-32B", (64, 5120, 27648, 40, 8), 152_064, **_QWEN25, rms_norm_eps=1e-5,
        max_position_embeddings=131_072,
    ),
    "qwen2.5-72b": _preset(
        "qwen2", "Qwen/Qwen2.5-72B", (80, 8192, 29568, 64, 8), 152_064, **_QWEN25, rms_norm_eps=1e-5,
        max_position_embeddings=131_072,
    ),
    "qwen3-0.6b": _preset("qwen3", "Qwen/Qwen3-0.6B", (28, 1024, 3072, 16, 8), 151_936, **_QWEN3, **_TIED),
    "qwen3-1.7b": _preset("qwen3", "Qwen/Qwen3-1.7B", (28, 2048, 6144, 16, 8), 151_936, **_QWEN3, **_TIED),
    "qwen3-4b": _preset("qwen3", "Qwen/Qwen3-4B", (36, 2560, 9728, 32, 8), 151_936, **_QWEN3, **_TIED),
    "qwen3-8b": _preset("qwen3", "Qwen/Qwen3-8B", (36, 4096, 12288, 32, 8), 151_936, **_QWEN3),
    "qwen3-14b": _preset("qwen3", "Qwen/Qwen3-14B", (40, 5120, 17408, 40, 8), 151_936, **_QWEN3),
    "qwen3-32b": _preset("qwen3", "Qwen/Qwen3-32B", (64, 5120, 25600, 64, 8), 151_936, **_QWEN3),
    "gemma-2b": _preset("gemma", "google/gemma-2b", (18, 2048, 16384, 8, 1), 256_000),
    "gemma-7b": _preset("gemma", "google/gemma-7b", (28, 3072, 24576, 16, 16), 256_000),
    "gemma2-2b": _preset("gemma2", "google/gemma-2-2b", (26, 2304, 9216, 8, 4), 256_000),
    "gemma2-9b": _preset("gemma2", "google/gemma-2-9b", (42, 3584, 14336, 16, 8), 256_000),
    "gemma2-27b": _preset(
        "gemma2", "google/gemma-2-27b", (46, 4608, 36864, 32, 16), 256_000, head_dim=128, query_pre_attn_scalar=144
    ),
    "gemma3-270m": _preset(
        "gemma3_text", "google/gemma-3-270m", (18, 640, 2048, 4, 1), 262_144, sliding_window=512,
        max_position_embeddings=32_768,
    ),
    "gemma3-1b": _preset(
        "gemma3_text", "google/gemma-3-1b-pt", (26, 1152, 6912, 4, 1), 262_144, sliding_window=512,
        max_position_embeddings=32_768,
    ),
    # The text models of folders that hold images too.
    "gemma3-4b": _preset("gemma3_text", "google/gemma-3-4b-pt", (34, 2560, 10240, 8, 4), 262_208, **_GEMMA3),
    "gemma3-12b": _preset("gemma3_text", "google/gemma-3-12b-pt", (48, 3840, 15360, 16, 8), 262_208, **_GEMMA3),
    "gemma3-27b": _preset(
        "gemma3_text", "google/gemma-3-27b-pt", (62, 5376, 21504, 32, 16), 262_208, **_GEMMA3, head_dim=128,
        query_pre_attn_scalar=168,
    ),
    "phi3-mini-4k": _preset(
        "phi3", "microsoft/Phi-3-mini-4k-instruct", (32, 3072, 8192, 32, 32), 32_064, sliding_window=2047
    ),
    "phi3-medium-4k": _preset(
        "phi3", "microsoft/Phi-3-medium-4k-instruct", (40, 5120, 17920, 40, 10), 32_064, sliding_window=2047
    ),
    "phi4": _preset(  # rope_theta and max_position_embeddings as in a copy
        "phi3", "microsoft/phi-4", (40, 5120, 17920, 40, 10), 100_352, rope_theta=250_000.0,
        max_position_embeddings=16_384, original_max_position_embeddings=16_384,
    ),
    # As in three copies, one of revision cfbefacb9925.
    "phi4-mini": _preset(
        "phi3", "microsoft/Phi-4-mini-instruct", (32, 3072, 8192, 24, 8), 200_064, **_TIED, sliding_window=262_144,
        partial_rotary_factor=0.75, max_position_embeddings=131_072, original_max_position_embeddings=4096,
        rope_scaling={"type": "longrope", "short_factor": [1.0] * 48, "long_factor": _PHI4_MINI_LONG},
    ),
    "olmo2-1b": _preset("olmo2", "allenai/OLMo-2-0425-1B", (16, 2048, 8192, 16, 16), 100_352, **_OLMO2),
    "olmo2-7b": _preset("olmo2", "allenai/OLMo-2-1124-7B", (32, 4096, 11008, 32, 32), 100_352, **_OLMO2),
    "olmo2-13b": _preset("olmo2", "allenai/OLMo-2-1124-13B", (40, 5120, 13824, 40, 40), 100_352, **_OLMO2),
    "olmo2-32b": _preset("olmo2", "allenai/OLMo-2-0325-32B", (64, 5120, 27648, 40, 8), 100_352, **_OLMO2),
    "olmo3-7b": _preset("olmo3", "allenai/Olmo-3-1025-7B", (32, 4096, 11008, 32, 32), 100_278, **_OLMO3),
    "olmo3-32b": _preset("olmo3", "allenai/Olmo-3-1125-32B", (64, 5120, 27648, 40, 8), 100_278, **_OLMO3),
    "granite3.1-2b": _preset(
        "granite", "ibm-granite/granite-3.1-2b-instruct", (40, 2048, 8192, 32, 8), 49_155, **_GRANITE3,
        rope_theta=5_000_000.0, attention_multiplier=0.015625, logits_scaling=8.0,
    ),
    "granite3.1-8b": _preset(  # multipliers and theta as in a copy of 3.3's
        "granite", "ibm-granite/granite-3.1-8b-instruct", (40, 4096, 12800, 32, 8), 49_155, **_GRANITE3,
        rope_theta=10_000_000.0, attention_multiplier=0.0078125, logits_scaling=16.0,
    ),
    "mixtral-8x7b": _preset(
        "mixtral", "mistralai/Mixtral-8x7B-v0.1", (32, 4096, 14336, 32, 8), 32_000, sliding_window=None,
        num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=32_768,
    ),
    "qwen3-30b-a3b": _preset(
        "qwen3_moe", "Qwen/Qwen3-30B-A3B", (48, 2048, 6144, 32, 4), 151_936, **_QWEN3, norm_topk_prob=True,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
    ),
    "gpt-oss-20b": _preset(
        "gpt_oss", "openai/gpt-oss-20b", (24, 2880, 2880, 64, 8), 201_088, num_local_experts=32, num_experts_per_tok=4
    ),
    "gpt-oss-120b": _preset(
        "gpt_oss", "openai/gpt-oss-120b", (36, 2880, 2880, 64, 8), 201_088, num_local_experts=128, num_experts_per_tok=4
    ),
    "deepseek-v3": _preset(
        "deepseek_v3", "deepseek-ai/DeepSeek-V3", (61, 7168, 18432, 128, 128), 129_280, n_routed_experts=256,
        num_experts_per_tok=8, moe_intermediate_size=2048, max_position_embeddings=163_840, rope_theta=10_000.0,
        rope_scaling={
            "type": "yarn", "factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
    ),
}  # fmt: skip

PRESETS: dict[str, TransformerConfig] = {
    name: read_hf_config(preset.fields, preset.source or name) for name, preset in TABLE.items()
}
