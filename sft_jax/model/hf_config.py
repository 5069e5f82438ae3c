"""`config.json` of a Hugging Face folder <-> TransformerConfig.

Reading is strict: a key is understood, or known to change no number, or it is an error. An option that would be ignored
(a bias, another activation, another rope) is a wrong model with a plausible loss.
"""

import dataclasses
import math
from typing import Any

from sft_jax.datatypes import ConfigError
from sft_jax.model.config_fields import Fields
from sft_jax.model.families import LayerConfig, TransformerConfig, group_layers, list_layers
from sft_jax.model.family_table import FAMILIES, OPTIONS, Family
from sft_jax.model.moe_fields import latent_fields, moe_fields, take_latent, take_moe
from sft_jax.model.rope import DynamicScaling, RopeConfig, YarnScaling
from sft_jax.model.rope_fields import rope_fields, take_ropes

# Keys that change no number here: identity, storage, generation defaults, reporting.
_HARMLESS_KEYS = frozenset({
    "_name_or_path", "_attn_implementation", "_commit_hash", "_from_model_config", "transformers_version",
    "torch_dtype", "dtype", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp",
    "chunk_size_feed_forward", "output_attentions", "output_hidden_states", "return_dict", "id2label", "label2id",
    "problem_type", "task_specific_params", "max_length", "temperature", "top_p", "top_k", "do_sample", "unsloth_fixed",
    "unsloth_version",
})  # fmt: skip
# Keys that change the model's numbers unless they have this value (or null).
_ONLY_VALUES: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "quantization_config": None,
    "sliding_window": None,
}
# Keys that may be absent and not null: transformers refuses it, or fails. Some families allow some: Family.nulls.
_NEVER_NULL = frozenset({
    "attention_bias", "attention_dropout", "attention_multiplier", "auto_map", "decoder_sparse_step", "embd_pdrop",
    "embedding_multiplier", "first_k_dense_replace", "head_dim", "hidden_act", "hidden_activation", "initializer_range",
    "kv_lora_rank", "logits_scaling", "max_position_embeddings", "max_window_layers", "mlp_bias",
    "moe_intermediate_size", "n_group", "n_routed_experts", "n_shared_experts", "norm_topk_prob", "num_experts",
    "num_experts_per_tok", "num_key_value_heads", "num_local_experts", "num_mtp_layers",
    "original_max_position_embeddings", "output_router_logits", "partial_rotary_factor", "qk_nope_head_dim",
    "qk_rope_head_dim", "query_pre_attn_scalar", "resid_pdrop", "residual_multiplier", "rms_norm_eps",
    "rope_local_base_freq", "rope_theta", "routed_scaling_factor", "router_aux_loss_coef", "router_jitter_noise",
    "sliding_window_pattern", "swiglu_alpha", "swiglu_limit", "tie_word_embeddings", "topk_group", "use_cache",
    "use_sliding_window", "v_head_dim",
})  # fmt: skip
# Where to go instead, for types that people will try.
_INSTEAD = {
    "gemma3": "It holds images too. Load its text model with transformers, save that (its type is gemma3_text), and "
    "name the new folder.",
    "mistral3": "It holds images too. Load its text model with transformers, save that (its type is mistral), and name "
    "the new folder.",
}
_DEQUANTIZE = "Load the model dequantized with transformers, save that, and name the new folder."
_NO_DROPOUT = "Set it to 0 in the file: it acts in training alone, and there is no such thing here."
_REMEDIES = {
    "quantization_config": _DEQUANTIZE,
    **dict.fromkeys(("attention_dropout", "embd_pdrop", "resid_pdrop", "router_jitter_noise"), _NO_DROPOUT),
}
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_MOST_LAYERS = 1000
_SLIDING, _FULL = "sliding_attention", "full_attention"


def read_hf_config(fields: dict[str, Any], where: str) -> TransformerConfig:
    """The fields of a `config.json` -> TransformerConfig.

    Both spellings of rotary positions are read, transformers 4's and 5's. A key that is absent has the default of the
    family's config class in transformers; one that is null means what it means there, or is refused.

    Args:
      where: the file, for error messages.

    Raises:
      ConfigError: for another family, a missing key, a wrong type, or a key or value that would be ignored.
    """
    rest = Fields(fields, where)
    name = rest.take("model_type", str, "")
    if name not in FAMILIES:
        instead = _INSTEAD.get(name, f"Supported are {', '.join(FAMILIES)}.")
        raise ConfigError(f"{where}: model_type is {name!r}. {instead}")
    family = FAMILIES[name]
    rest.refuse_nulls(_NEVER_NULL - family.nulls)
    try:
        config = TransformerConfig(family=name, **_take_values(rest, family))
    except ConfigError as error:
        raise error if str(error).startswith(where) else ConfigError(f"{where}: {error}") from None
    _check_quantization(rest, family)
    only = _ONLY_VALUES | {"architectures": [family.architecture]} | dict(family.only)
    rest.refuse_rest(_HARMLESS_KEYS | family.harmless, only, f"a {name} model", _REMEDIES)
    return config


def _check_quantization(rest: Fields, family: Family) -> None:
    """Remove the description of codes that are decoded when they are read."""
    described = rest.rest.get("quantization_config")
    if not isinstance(described, dict) or not family.quantized:
        return
    if described.get("quant_method") != family.quantized["quant_method"]:
        return
    fields = Fields(described, f"{rest.where}: quantization_config")
    fields.take_list("modules_to_not_convert", str, [])
    for name, value in family.quantized.items():
        if fields.take(name, type(value)) != value:
            raise ConfigError(
                f"{fields.where}: {name} is {described[name]!r}; only {value!r} is supported. {_DEQUANTIZE}"
            )
    for name, values in family.quantized_options.items():
        if (value := fields.take(name, str, values[0])) not in values:
            raise ConfigError(
                f"{fields.where}: {name} is {value!r}; expected one of {', '.join(values)}. {_DEQUANTIZE}"
            )
    fields.refuse_rest(frozenset(), {}, "codes that are understood")
    del rest.rest["quantization_config"]


def _take_values(rest: Fields, family: Family) -> dict[str, Any]:
    """The values of TransformerConfig's fields."""
    defaults = family.defaults
    num_heads = rest.take("num_attention_heads", int)
    embed_dim = rest.take("hidden_size", int)
    num_layers = rest.take("num_hidden_layers", int)
    if num_layers > _MOST_LAYERS:  # before they are made, one by one
        raise ConfigError(f"num_hidden_layers is {num_layers}; expected at most {_MOST_LAYERS}. Correct it.")
    if embed_dim < 1:  # before its root is taken
        raise ConfigError(f"hidden_size is {embed_dim}; expected at least 1. Correct it.")
    max_position = rest.take("max_position_embeddings", int, defaults.get("max_position_embeddings", 2048))
    num_kv_heads = rest.take_optional("num_key_value_heads", int, defaults.get("num_key_value_heads", num_heads))
    full, sliding = take_ropes(rest, family.rope, max_position)
    mlp_dim = rest.take("intermediate_size", int)
    layers = _take_layers(rest, family, num_layers, full, sliding)
    if family.moe:
        mixtures = take_moe(rest, family.moe, num_layers, mlp_dim)
        layers = [dataclasses.replace(layer, moe=moe) for layer, moe in zip(layers, mixtures, strict=True)]
    if family.divides_hidden and num_heads > 0 and embed_dim % num_heads:
        raise ConfigError(
            f"hidden_size is {embed_dim}; expected a multiple of {num_heads} heads, as in transformers. Correct it."
        )
    latent = take_latent(rest) if family.is_latent else None
    values: dict[str, Any] = {
        "vocab_size": rest.take("vocab_size", int),
        "embed_dim": embed_dim,
        "mlp_dim": mlp_dim,
        "num_heads": num_heads,
        "num_kv_heads": num_heads if num_kv_heads is None else num_kv_heads,
        "head_dim": latent.head_dim
        if latent
        else rest.take("head_dim", int, defaults.get("head_dim", embed_dim // max(num_heads, 1))),
        "latent": latent,
        "layers": group_layers(layers),
        "norm_eps": rest.take("rms_norm_eps", float, defaults.get("rms_norm_eps", 1e-6)),
        "activation": _take_activation(rest, family),
        "tie_embeddings": rest.take("tie_word_embeddings", bool, defaults.get("tie_word_embeddings", False)),
        "max_position": _usable_positions(full, max_position),
        "initializer_range": rest.take("initializer_range", float, 0.02),
    } | dict(family.fixed)
    if latent and isinstance(full.scaling, YarnScaling):
        values["attention_scale"] = latent.head_dim**-0.5 * full.scaling.latent_factor
    if family.scales_embedding:
        values["embedding_multiplier"] = math.sqrt(embed_dim)
    for key, default in family.options.items():
        option = OPTIONS[key]
        value = (rest.take_optional if option.is_optional else rest.take)(key, option.kind, default)
        values |= dict.fromkeys(option.fields, None if value is None else option.read(value))
    return values


def _usable_positions(rope: RopeConfig, max_position: int) -> int:
    """With dynamic scaling the config's number is the length that it starts from."""
    scaling = rope.scaling
    return int(max_position * scaling.factor) if isinstance(scaling, DynamicScaling) else max_position


def _take_activation(rest: Fields, family: Family) -> str:
    names = _ACTIVATIONS | dict(family.activations)
    found = {key: rest.take(key, str, None) for key in ("hidden_act", "hidden_activation")}
    for key, value in found.items():
        if value is not None and value not in names:
            raise ConfigError(f"{key} is {value!r}; expected one of {', '.join(names)}.")
    own, other = family.activation_key, next(key for key in found if key != family.activation_key)
    default = family.defaults.get("activation", "silu")
    activation = default if found[own] is None else names[found[own]]
    if found[other] is not None and names[found[other]] != activation:
        raise ConfigError(
            f"{other} is {found[other]!r}, which this family does not read; by {own} it is {activation}. Drop it."
        )
    if family.is_silu_only and activation != "silu":
        raise ConfigError(
            f"{own} is {found[own]!r}; this family's experts have an activation of their own. Remove {own}."
        )
    return activation


def _take_layers(
    rest: Fields, family: Family, num_layers: int, full: RopeConfig, sliding: RopeConfig
) -> list[LayerConfig]:
    """Every layer, first to last."""
    if family.windows == "none":
        return [LayerConfig(rope=full)] * num_layers
    window = rest.take_optional("sliding_window", int, family.window)
    if family.window_switch and not rest.take(family.window_switch, bool, False):
        window = None
    if family.windows == "all":
        return [LayerConfig(rope=full if window is None else sliding, window=window)] * num_layers
    if family.windows == "last":
        window = window if rest.take("use_sliding_window", bool, False) else None
        first = rest.take("max_window_layers", int, 28)
        kinds = [_SLIDING if window is not None and layer >= first else _FULL for layer in range(num_layers)]
    else:
        kinds = _periodic_kinds(num_layers, _take_period(rest, family))
    kinds = rest.take_list("layer_types", str, kinds)
    if len(kinds) != num_layers or set(kinds) - {_SLIDING, _FULL}:
        raise ConfigError(f"layer_types is {kinds}; expected {num_layers} of {_SLIDING} and {_FULL}.")
    if _SLIDING in kinds and window is None:
        raise ConfigError(f"layer_types has {_SLIDING}, and sliding_window is null. Say how long it is.")
    of_kind = {_SLIDING: LayerConfig(rope=sliding, window=window), _FULL: LayerConfig(rope=full)}
    return [of_kind[kind] for kind in kinds]


def _periodic_kinds(num_layers: int, period: int) -> list[str]:
    return [_SLIDING if (layer + 1) % period else _FULL for layer in range(num_layers)]


def _take_period(rest: Fields, family: Family) -> int:
    """Remove the keys of the pattern -> that of the family's own key. Another's must not differ, unless layer_types
    says it all."""
    found = {key: rest.take(key, int, None) for key in ("sliding_window_pattern", "_sliding_window_pattern")}
    own = found.get(family.period_key or "")
    period = family.window_period if own is None else own
    for key, value in found.items():
        if value is not None and value < 1:
            raise ConfigError(f"{key} is {value}; expected at least 1.")
        if value not in (None, period) and rest.rest.get("layer_types") is None:
            raise ConfigError(f"{key} is {value}, which this family does not read; it has {period}. Remove {key}.")
    return period


def to_hf_config(config: TransformerConfig, dtype: str) -> dict[str, Any]:
    """The fields of a `config.json` that transformers (4 and 5) and vLLM load; `read_hf_config` gives `config` back.

    Ids of bos and eos belong to the tokenizer: the exporter adds them, or transformers assumes its own.

    Args:
      dtype: of the stored weights, such as "bfloat16".
    """
    family = FAMILIES[config.family]
    layers = list_layers(config)
    full, sliding = (
        next((layer.rope for layer in layers if (layer.window is None) == is_full), None) for is_full in (True, False)
    )
    full, sliding = full or sliding, sliding or full
    if full is None or sliding is None:
        raise ConfigError(f"{config.family}: a model without rotary positions has no config.json.")
    dynamic = full.scaling if isinstance(full.scaling, DynamicScaling) else None
    max_position = dynamic.original_max_position if dynamic else config.max_position
    activation = next(name for name, ours in _ACTIVATIONS.items() if ours == config.activation)
    fields = {
        "architectures": [family.architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        **(latent_fields(config.latent) if config.latent else {"head_dim": config.head_dim}),
        "hidden_act": activation,
        "attention_dropout": 0.0,
        "max_position_embeddings": max_position,
        "rms_norm_eps": config.norm_eps,
        **rope_fields(full, sliding, family.rope, max_position),
        **_window_fields(layers, family),
        **(moe_fields(family.moe, [layer.moe for layer in layers]) if family.moe else {}),
        **family.written,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "torch_dtype": dtype,
        "use_cache": True,
        "pad_token_id": None,  # is said: transformers would assume the family's, which may lie outside the vocabulary
    }
    fields[family.activation_key] = activation
    for key in family.options:
        value = getattr(config, OPTIONS[key].fields[0])
        fields[key] = None if value is None else OPTIONS[key].write(value)
    assert read_hf_config(fields, "config.json") == config, f"{config.family} cannot be all of {config}"
    return fields


def _window_fields(layers: list[LayerConfig], family: Family) -> dict[str, Any]:
    if family.windows == "none":
        return {}
    window = next((layer.window for layer in layers if layer.window is not None), None)
    # Of these families transformers wants a number even where no layer has a window.
    unused = family.window if family.windows == "periodic" else None
    fields: dict[str, Any] = {"sliding_window": unused if window is None else window}
    if family.window_switch:
        fields[family.window_switch] = window is not None
    if family.windows == "all":
        return fields
    if family.windows == "last":
        fields["use_sliding_window"] = window is not None
        fields["max_window_layers"] = sum(layer.window is None for layer in layers)
    return fields | {"layer_types": [_FULL if layer.window is None else _SLIDING for layer in layers]}
