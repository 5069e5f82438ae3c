"""The families that are understood: what each one's `config.json` may say, and what goes without saying.

An entry is data. Where a key is absent, transformers' config class of that family has a default, and so does the entry.
docs/models.md says how to add one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sft_jax.datatypes import ConfigError
from sft_jax.model.moe_fields import MoeKeys
from sft_jax.model.rope_fields import RopeDefaults


class Option(NamedTuple):
    """A key that only some families have."""

    kind: type
    fields: tuple[str, ...]
    """Of TransformerConfig, that the key sets; the first is written back."""
    is_optional: bool = False
    """Whether null means none, and not the default."""
    read: Callable[[Any], Any] = lambda value: value
    write: Callable[[Any], Any] = lambda value: value


def _read_scalar(scalar: float) -> float:
    if scalar <= 0:
        raise ConfigError(f"query_pre_attn_scalar is {scalar}; expected more than 0. Correct it.")
    return float(scalar**-0.5)


def _write_scalar(scale: float) -> float | int:
    """0.0625 -> 256: an integer where it was one."""
    scalar = scale**-2
    return round(scalar) if abs(scalar - round(scalar)) < 1e-9 * scalar else scalar


OPTIONS: dict[str, Option] = {
    "attention_bias": Option(bool, ("qkv_bias", "out_bias")),
    "mlp_bias": Option(bool, ("mlp_bias",)),
    "attn_logit_softcapping": Option(float, ("attention_softcap",), is_optional=True),
    "final_logit_softcapping": Option(float, ("logit_softcap",), is_optional=True),
    "query_pre_attn_scalar": Option(float, ("attention_scale",), read=_read_scalar, write=_write_scalar),
    "embedding_multiplier": Option(float, ("embedding_multiplier",)),
    "attention_multiplier": Option(float, ("attention_scale",)),
    "residual_multiplier": Option(float, ("residual_multiplier",)),
    "logits_scaling": Option(float, ("logits_divisor",)),
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a `model_type` is read and written."""

    architecture: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of TransformerConfig that no key sets."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keys of OPTIONS that the family has -> their defaults."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Of keys that every family has, where they are not Llama's."""
    rope: RopeDefaults = field(default_factory=RopeDefaults)
    windows: str = "none"
    """Which layers have a window: none; all; last (from `max_window_layers` on, if `use_sliding_window`); or all but
    every n-th, by the number."""
    window_period: int = 0
    """For `windows="periodic"`: every n-th layer sees everything."""
    window: int | None = None
    """Default of `sliding_window`."""
    window_switch: str | None = None
    """The key without which no layer has a window; None: there is no such key."""
    activations: Mapping[str, str] = field(default_factory=dict)
    """Names of activations that mean something else than in other families."""
    activation_key: str = "hidden_act"
    """The key that transformers reads the activation from."""
    is_silu_only: bool = False
    """Its experts do not heed the key."""
    period_key: str | None = None
    """The key of `window_period`; None: transformers reads none."""
    scales_embedding: bool = False
    """Embeddings are multiplied by sqrt(embed_dim)."""
    only: Mapping[str, Any] = field(default_factory=dict)
    """Keys that would change the numbers, and the one value that is supported (of an object: of its keys)."""
    harmless: frozenset[str] = frozenset()
    """Keys that change no number."""
    nulls: frozenset[str] = frozenset()
    """Keys that may be null, of those that may not be so in every family."""
    divides_hidden: bool = False
    """Whether transformers wants `hidden_size` to be a multiple of the number of heads."""
    moe: MoeKeys | None = None
    """Layers have mixtures of experts, described by these keys."""
    is_latent: bool = False
    """Attention is latent."""
    quantized: Mapping[str, Any] = field(default_factory=dict)
    """What `quantization_config` must say in folders whose codes are decoded when they are read; {}: there are none."""
    quantized_options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What else it may say."""
    written: Mapping[str, Any] = field(default_factory=dict)
    """Keys that are written besides, because transformers assumes something else."""


_NULL_KV_HEADS = frozenset({"num_key_value_heads"})  # as many as there are query heads
# Of transformers' training; ours are in config.loss.
_ROUTER_LOSSES = frozenset({"router_aux_loss_coef", "output_router_logits"})
# Activations are not quantized here, so it is harmless that they would be by scales of their own ("dynamic").
_BLOCK_FP8: dict[str, Any] = {
    "quantized": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    "quantized_options": {"activation_scheme": ("dynamic",), "scale_fmt": ("float", "ue8m0")},
}
# DeepSeek's folders name the code that came with them, which is never run: transformers' own is the same model.
_DEEPSEEK_ROUTING = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
_DEEPSEEK_CODE = {
    "AutoConfig": "configuration_deepseek.DeepseekV3Config",
    "AutoModel": "modeling_deepseek.DeepseekV3Model",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
}


# Gemma's norms multiply by 1 + scale, and its embeddings by sqrt(embed_dim).
_GEMMA: dict[str, Any] = {
    "scales_embedding": True,
    "only": {"use_bidirectional_attention": False},
    "harmless": frozenset({"cache_implementation", "sliding_window_size"}),
}
_GEMMA_LATER: dict[str, Any] = {"nulls": frozenset({"attention_dropout", "hidden_act"}), "divides_hidden": True}
_GEMMA_DEFAULTS = {"head_dim": 256, "activation": "gelu_tanh", "tie_word_embeddings": True}
# Microsoft's folders name the code that came with them, which is never run: transformers' own is the same model.
_PHI3_CODE = {
    "AutoConfig": "configuration_phi3.Phi3Config",
    "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    "AutoTokenizer": "Xenova/gpt-4o",
}

FAMILIES: dict[str, Family] = {
    # Llama 2, 3, 3.1, 3.2, 3.3, and the many models that took over its code.
    "llama": Family(
        architecture="LlamaForCausalLM",
        options={"attention_bias": False, "mlp_bias": False},
        nulls=_NULL_KV_HEADS | {"head_dim", "attention_dropout"},
        divides_hidden=True,
    ),
    # Mistral 7B and Mistral-Small.
    "mistral": Family(
        architecture="MistralForCausalLM",
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131_072},
        windows="all",
        window=4096,
        nulls=frozenset({"head_dim"}),
    ),
    # Qwen2 and Qwen2.5.
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        fixed={"qkv_bias": True},
        defaults={"num_key_value_heads": 32, "max_position_embeddings": 32_768},
        windows="last",
        window=4096,
        only={"use_mrope": False},
        nulls=_NULL_KV_HEADS,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        fixed={"qk_norm": "head"},
        options={"attention_bias": False},
        defaults={"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32_768},
        windows="last",
        window=4096,
        nulls=_NULL_KV_HEADS,
    ),
    "gemma": Family(
        architecture="GemmaForCausalLM",
        fixed={"norm_adds_one": True},
        options={"attention_bias": False},
        defaults=_GEMMA_DEFAULTS | {"num_key_value_heads": 16, "max_position_embeddings": 8192},
        activations={"gelu": "gelu_tanh"},  # as the first folders call it
        nulls=frozenset({"hidden_activation"}),
        **_GEMMA,
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        fixed={"norm_adds_one": True, "norms": "sandwich"},
        options={
            "attention_bias": False,
            "query_pre_attn_scalar": 256.0,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        defaults=_GEMMA_DEFAULTS | {"num_key_value_heads": 4, "max_position_embeddings": 8192},
        windows="periodic",
        window_period=2,
        window=4096,
        activation_key="hidden_activation",
        **_GEMMA_LATER,
        **_GEMMA,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        fixed={"norm_adds_one": True, "norms": "sandwich", "qk_norm": "head"},
        options={
            "attention_bias": False,
            "query_pre_attn_scalar": 256.0,
            "final_logit_softcapping": None,
        },
        defaults=_GEMMA_DEFAULTS | {"num_key_value_heads": 4, "max_position_embeddings": 131_072},
        rope=RopeDefaults(theta=1_000_000.0, local_theta=10_000.0, local_key="rope_local_base_freq"),
        windows="periodic",
        window_period=6,
        period_key="sliding_window_pattern",
        activation_key="hidden_activation",
        window=4096,
        **_GEMMA_LATER,
        # transformers has the key and does not heed it.
        **_GEMMA | {"only": _GEMMA["only"] | {"attn_logit_softcapping": None}},
    ),
    # OLMo-2: no norm before a part, one after it, and one over all queries and all keys.
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        fixed={"norms": "post", "qk_norm": "all"},
        options={"attention_bias": False},
        defaults={"rms_norm_eps": 1e-5},
        nulls=_NULL_KV_HEADS,
    ),
    # OLMo-3: OLMo-2 with windows in three layers of four, which keep their rope when the others' is stretched.
    "olmo3": Family(
        architecture="Olmo3ForCausalLM",
        fixed={"norms": "post", "qk_norm": "all"},
        options={"attention_bias": False},
        defaults={"rms_norm_eps": 1e-5},
        rope=RopeDefaults(theta=500_000.0, local_theta=500_000.0),
        windows="periodic",
        window_period=4,
        window=4096,
        nulls=_NULL_KV_HEADS,
    ),
    # Granite 3: Llama with four multipliers.
    "granite": Family(
        architecture="GraniteForCausalLM",
        options={
            "attention_bias": False,
            "mlp_bias": False,
            "embedding_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
        nulls=_NULL_KV_HEADS,
    ),
    # Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: fused tensors, see hf_names.
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        rope=RopeDefaults(original_max_position=4096, types=("default", "longrope", "su"), is_partial=True),
        windows="all",
        only={
            "resid_pdrop": 0,
            "embd_pdrop": 0,
            "lm_head_bias": False,
            "interpolate_factor": 1,
            "full_attn_mod": 1,
            "auto_map": _PHI3_CODE,
        },
        nulls=_NULL_KV_HEADS,
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5},
        rope=RopeDefaults(theta=1_000_000.0),
        windows="all",
        moe=MoeKeys(
            num_experts=("num_local_experts", "num_experts"),
            defaults={"num_local_experts": 8, "num_experts_per_tok": 2},
        ),
        only={"router_jitter_noise": 0},
        harmless=_ROUTER_LOSSES,
        nulls=frozenset({"head_dim"}),
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        fixed={"qk_norm": "head"},
        options={"attention_bias": False},
        defaults={"num_key_value_heads": 4, "max_position_embeddings": 32_768},
        windows="all",
        window_switch="use_sliding_window",
        window=4096,
        moe=MoeKeys(
            num_experts=("num_experts", "num_local_experts"),
            expert_dim="moe_intermediate_size",
            options={"norm_topk_prob": ("normalize_weights", bool)},
            defaults={
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 768,
                "norm_topk_prob": False,
            },
            placed="step",
        ),
        harmless=_ROUTER_LOSSES | {"max_window_layers"},  # the window is that of all layers
        **_BLOCK_FP8,
    ),
    "gpt_oss": Family(
        architecture="GptOssForCausalLM",
        fixed={"attention_sinks": True},
        options={"attention_bias": True},
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
        },
        rope=RopeDefaults(
            theta=150_000.0,
            scaling={"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096},
        ),
        windows="periodic",
        window_period=2,
        window=128,
        moe=MoeKeys(
            num_experts=("num_local_experts", "num_experts"),
            fixed={"router_bias": True, "expert_bias": True},
            options={"swiglu_limit": ("clamp", float)},
            defaults={"num_local_experts": 128, "num_experts_per_tok": 4, "swiglu_limit": 7.0},
        ),
        is_silu_only=True,
        only={"swiglu_alpha": 1.702},
        harmless=_ROUTER_LOSSES | {"initial_context_length"},
        quantized={"quant_method": "mxfp4"},
    ),
    # DeepSeek-V3 and R1, and what took over their code. The layers for multi-token prediction are left out.
    "deepseek_v3": Family(
        architecture="DeepseekV3ForCausalLM",
        defaults={"num_key_value_heads": 128, "max_position_embeddings": 4096},
        is_latent=True,
        nulls=_NULL_KV_HEADS | {"attention_dropout", "norm_topk_prob"},
        moe=MoeKeys(
            num_experts=("n_routed_experts", "num_local_experts"),
            expert_dim="moe_intermediate_size",
            fixed={"scores": "sigmoid", "correction_bias": True},
            options={
                "norm_topk_prob": ("normalize_weights", bool),
                "routed_scaling_factor": ("weights_multiplier", float),
                "n_group": ("num_groups", int),
                "topk_group": ("groups_per_token", int),
            },
            defaults={
                "n_routed_experts": 256,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 2048,
                "n_shared_experts": 1,
                "first_k_dense_replace": 3,
                "norm_topk_prob": True,
                "routed_scaling_factor": 2.5,
                "n_group": 8,
                "topk_group": 4,
            },
            shared="n_shared_experts",
            placed="after_first",
        ),
        only=_DEEPSEEK_ROUTING | {"auto_map": _DEEPSEEK_CODE},
        harmless=_ROUTER_LOSSES | {"num_nextn_predict_layers", "ep_size", "aux_loss_alpha", "seq_aux"},
        # transformers assumes that there is such a layer; vLLM that routing is of another kind.
        written=_DEEPSEEK_ROUTING | {"num_nextn_predict_layers": 0},
        **_BLOCK_FP8,
    ),
}
