"""Small random `config.json`s of every family, in transformers 4's spelling, which exercise what the family can say."""

from typing import Any

import numpy as np

ORIGINAL_LENGTH = 14  # of the context that a rope scaling stretches; the rows of the tests are longer


def draw_config(family: str, seed: int) -> dict[str, Any]:
    """The fields of one config; the same for the same seed."""
    rng = np.random.default_rng([seed, *family.encode()])
    num_heads, num_kv_heads = _pick(rng, [(4, 4), (4, 2), (6, 2), (3, 1), (5, 1), (6, 3)])
    head_dim = _pick(rng, [4, 6, 8, 10])
    fields = {
        "model_type": family,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "vocab_size": _pick(rng, [61, 64, 97]),
        "hidden_size": num_heads * _pick(rng, [4, 6, 7]),
        "intermediate_size": int(rng.integers(16, 48)),
        "num_hidden_layers": int(rng.integers(1, 5)),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": _pick(rng, [1e-5, 1e-6]),
        "tie_word_embeddings": bool(rng.integers(2)),
        "max_position_embeddings": 256,
        "rope_theta": _pick(rng, [100.0, 10_000.0, 1e6]),
        "rope_scaling": _draw_scaling(rng, head_dim // 2),
    }
    if fields["rope_scaling"] and fields["rope_scaling"]["rope_type"] == "dynamic":
        fields["max_position_embeddings"] = ORIGINAL_LENGTH
    _FAMILIES[family](rng, fields)
    if family in ("gemma2", "gemma3_text", "gpt_oss") and seed % 4 == 2:  # elsewhere null and other keys say so
        fields["layer_types"] = ["full_attention"] * fields["num_hidden_layers"]
    return fields


def _pick(rng: np.random.Generator, options: list[Any]) -> Any:
    return options[rng.integers(len(options))]


def _draw_scaling(rng: np.random.Generator, num_pairs: int) -> dict[str, Any] | None:
    kind = _pick(rng, [None, "linear", "dynamic", "llama3", "yarn", "longrope"])
    factor = _pick(rng, [2.0, 4.0, 5.5])
    if kind is None:
        return None
    scaling = {"rope_type": kind}
    if kind != "longrope":
        scaling["factor"] = factor
    if kind in ("llama3", "yarn", "longrope"):
        scaling["original_max_position_embeddings"] = ORIGINAL_LENGTH
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "yarn":
        extras = [{}, {"attention_factor": 1.3}, {"beta_fast": 8.0, "beta_slow": 2.0}, {"truncate": False}]
        scaling |= _pick(rng, [*extras, {"mscale": 1.5, "mscale_all_dim": 0.7}])
    if kind == "longrope":
        scaling |= _draw_factors(rng, num_pairs) | _pick(rng, [{}, {"attention_factor": 1.2}, {"factor": 3.0}])
    return scaling


def _draw_factors(rng: np.random.Generator, num_pairs: int) -> dict[str, list[float]]:
    """For longrope."""
    return {
        name: rng.uniform(1, top, num_pairs).round(2).tolist()
        for name, top in (("short_factor", 1.5), ("long_factor", 6.0))
    }


def _draw_window(rng: np.random.Generator) -> int:
    return _pick(rng, [1, 3, 8, 20])


def _llama(rng: np.random.Generator, fields: dict[str, Any]) -> None:
    fields |= {"attention_bias": bool(rng.integers(2)), "mlp_bias": bool(rng.integers(2))}


def _mistral(rng: np.random.Generator, fields: dict[str, Any]) -> None:
    fields["sliding_window"] = _pick(rng, [None, _draw_window(rng)])


def _qwen2(rng: np.random.Generator, fields: dict[str, Any]) -> None:
    fields |= {"use_sliding_window": bool(rng.integers(2)), "sliding_window": _draw_window(rng)}
    fields["max_window_layers"] = int(rng.integers(0, fields["num_hidden_layers"] + 1))
    if fields["use_sliding_window"] and rng.integers(2):
        kinds = ["sliding_attention", "full_attention"]
        fields["layer_types"] = [_pick(rng, kinds) for _ in range(fields["num_hidden_layers"])]


def _qwen3(rng: np.random.Generator, fields: dict[str, Any]) -> None:
    _qwen2(rng, fields)
    fields["attention_bias"] = bool(rng.integers(2))


def _gemma(rng: np.random.Generator, fields: dict[str, Any]) -> None:
    fields |= {"hidden_act": _pick(rng, ["gelu", "gelu_pytorch_tanh"]), "attention_bias": bool(rng.integers(2))}


def _gemma2(rng: np.random.Generator, fields: dict[str, Any]) -> None:
    fields |= {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": bool(rng.integers(2)),
        "query_pre_attn_scalar": _pick(rng, [4, 7, 16]),
        "attn_logit_softcapping": _pick(rng, [None, 1.5, 50.0]),
        "final_logit_softcapping": _pick(rng, [None, 2.0, 30.0]),
        "sliding_window": _draw_window(rng),
        "num_hidden_layers": int(rng.integers(1, 6)),
    }


def _gemma3(rng: np.random.Generator, fields: dict[str, Any]) -> None:
    _gemma2(rng, fields)
    fields["attn_logit_softcapping"] = None
    fields["rope_local_base_freq"] = _pick(rng, [50.0, 10_000.0])
    if rng.integers(2):
        fields["sliding_window_pattern"] = _pick(rng, [2, 3])
    if fields["rope_scaling"] and fields["rope_scaling"]["rope_type"] in ("dynamic", "yarn"):
        # transformers 5.23 looks for these two's settings outside the object of their kind of layer
        fields |= {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "max_position_embeddings": 256}


def _olmo2(rng: np.random.Generator, fields: dict[str, Any]) -> None:
    fields["attention_bias"] = bool(rng.integers(2))


def _olmo3(rng: np.random.Generator, fields: dict[str, Any]) -> None:
    _olmo2(rng, fields)
    fields |= {"rope_theta": 500_000.0, "sliding_window": _draw_window(rng)}
    if rng.integers(2):
        kinds = ["sliding_attention", "full_attention"]
        fields["layer_types"] = [_pick(rng, kinds) for _ in range(fields["num_hidden_layers"])]


def _granite(rng: np.random.Generator, fields: dict[str, Any]) -> None:
    _llama(rng, fields)
    fields |= {
        "embedding_multiplier": _pick(rng, [1.0, 12, 3.5]),
        "attention_multiplier": _pick(rng, [1.0, 0.015625, 0.4]),
        "residual_multiplier": _pick(rng, [1.0, 0.22]),
        "logits_scaling": _pick(rng, [1.0, 2, 0.8]),
    }


def _phi3(rng: np.random.Generator, fields: dict[str, Any]) -> None:
    head_dim = fields["hidden_size"] // fields["num_attention_heads"]
    fields.pop("head_dim")
    head_dim += head_dim % 2
    fields["hidden_size"] = head_dim * fields["num_attention_heads"]
    fields["partial_rotary_factor"] = _pick(rng, [1.0, 4 / head_dim])
    fields |= {
        "original_max_position_embeddings": ORIGINAL_LENGTH,
        "sliding_window": _pick(rng, [None, _draw_window(rng)]),
    }
    fields |= {"rope_scaling": None, "max_position_embeddings": 256}
    if rng.integers(2):
        num_pairs = int(head_dim * fields["partial_rotary_factor"]) // 2
        fields["rope_scaling"] = {"type": "longrope"} | _draw_factors(rng, num_pairs)


def _draw_experts(rng: np.random.Generator) -> tuple[int, int]:
    """How many there are, and how many a token has."""
    return _pick(rng, [(4, 2), (8, 2), (6, 3), (5, 1), (3, 3)])


def _mixtral(rng: np.random.Generator, fields: dict[str, Any]) -> None:
    _mistral(rng, fields)
    fields["num_local_experts"], fields["num_experts_per_tok"] = _draw_experts(rng)


def _qwen3_moe(rng: np.random.Generator, fields: dict[str, Any]) -> None:
    fields |= {"attention_bias": bool(rng.integers(2)), "norm_topk_prob": bool(rng.integers(2))}
    fields |= {"use_sliding_window": bool(rng.integers(2)), "sliding_window": _draw_window(rng)}
    fields["num_experts"], fields["num_experts_per_tok"] = _draw_experts(rng)
    fields["moe_intermediate_size"] = int(rng.integers(6, 20))
    fields["num_hidden_layers"] = int(rng.integers(2, 5))
    fields |= _pick(rng, [{}, {"decoder_sparse_step": 2}, {"mlp_only_layers": [0]}, {"mlp_only_layers": [1]}])


def _gpt_oss(rng: np.random.Generator, fields: dict[str, Any]) -> None:
    kinds = ["sliding_attention", "full_attention"]
    fields |= {
        "attention_bias": bool(rng.integers(2)),
        "swiglu_limit": _pick(rng, [0.7, 2.0, 7.0]),
        "sliding_window": _draw_window(rng),
        "layer_types": [kinds[layer % 2] for layer in range(fields["num_hidden_layers"])],
    }
    fields["num_local_experts"], fields["num_experts_per_tok"] = _draw_experts(rng)
    if rng.integers(2):
        fields["layer_types"] = [_pick(rng, kinds) for _ in fields["layer_types"]]
    if fields["rope_scaling"] is None and rng.integers(2):  # as its own folders have it
        yarn = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
        fields["rope_scaling"] = yarn | {"original_max_position_embeddings": ORIGINAL_LENGTH}
    elif fields["rope_scaling"] is None:
        fields["rope_scaling"] = {"rope_type": "default"}


def _deepseek_v3(rng: np.random.Generator, fields: dict[str, Any]) -> None:
    fields.pop("head_dim")
    num_groups, per_group = _pick(rng, [(1, 6), (2, 3), (4, 2)])
    groups_per_token = int(rng.integers(1, num_groups + 1))
    fields |= {
        "num_key_value_heads": fields["num_attention_heads"],
        "num_hidden_layers": int(rng.integers(2, 5)),
        "attention_bias": bool(rng.integers(2)),
        "q_lora_rank": _pick(rng, [None, 11]),
        "kv_lora_rank": _pick(rng, [8, 13]),
        "qk_nope_head_dim": _pick(rng, [4, 7]),
        "qk_rope_head_dim": _pick(rng, [4, 8]),
        "v_head_dim": _pick(rng, [5, 8]),
        "rope_interleave": bool(rng.integers(2)),
        "n_routed_experts": num_groups * per_group,
        "n_group": num_groups,
        "topk_group": groups_per_token,
        "num_experts_per_tok": int(rng.integers(1, min(4, groups_per_token * per_group) + 1)),
        "norm_topk_prob": bool(rng.integers(2)),
        "routed_scaling_factor": _pick(rng, [1.0, 2.5]),
        "moe_intermediate_size": int(rng.integers(6, 20)),
        "n_shared_experts": _pick(rng, [1, 2]),
        "first_k_dense_replace": int(rng.integers(0, 3)),
    }
    scaling = fields["rope_scaling"]
    if scaling and scaling["rope_type"] == "longrope":
        scaling |= _draw_factors(rng, fields["qk_rope_head_dim"] // 2)
    if scaling and scaling["rope_type"] == "yarn" and rng.integers(2):
        scaling |= {"mscale": 1.0, "mscale_all_dim": 1.0}


_FAMILIES = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "olmo2": _olmo2,
    "olmo3": _olmo3,
    "granite": _granite,
    "phi3": _phi3,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "gpt_oss": _gpt_oss,
    "deepseek_v3": _deepseek_v3,
}
DRAWN_FAMILIES = tuple(_FAMILIES)
