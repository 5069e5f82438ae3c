"""The keys of a `config.json` that describe mixtures of experts and latent attention <-> MoeConfig, LatentConfig."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sft_jax.datatypes import ConfigError
from sft_jax.model.config_fields import Fields
from sft_jax.model.latent_config import LatentConfig
from sft_jax.model.moe_config import MoeConfig


@dataclass(frozen=True, kw_only=True)
class MoeKeys:
    """How a family says what its mixtures are."""

    num_experts: tuple[str, ...]
    """Names of the one key; the first is written."""
    expert_dim: str | None = None
    """None: `intermediate_size`."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of MoeConfig that no key sets."""
    options: Mapping[str, tuple[str, type]] = field(default_factory=dict)
    """Keys -> the field of MoeConfig that they set, and its type."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Of keys, where transformers' config class has one."""
    shared: str | None = None
    """The key that counts shared experts, each as wide as the others; None: there are none."""
    placed: str = "all"
    """Which layers have a mixture: all; after_first (not the first `first_k_dense_replace`); or step (every
    `decoder_sparse_step`-th, without `mlp_only_layers`)."""


def take_moe(fields: Fields, keys: MoeKeys, num_layers: int, mlp_dim: int) -> list[MoeConfig | None]:
    """Remove the keys -> the mixture of every layer, first to last; None: a plain MLP."""
    values = {  # null is as good as false
        name: fields.take_optional(key, kind, keys.defaults.get(key), null=False)
        for key, (name, kind) in keys.options.items()
    }
    values |= {
        "num_experts": _take_one(fields, keys.num_experts, keys.defaults),
        "experts_per_token": fields.take("num_experts_per_tok", int, keys.defaults["num_experts_per_tok"]),
        "expert_dim": fields.take(keys.expert_dim, int, keys.defaults[keys.expert_dim]) if keys.expert_dim else mlp_dim,
    }
    if keys.shared:
        num_shared = fields.take(keys.shared, int, keys.defaults[keys.shared])
        if num_shared < 0:
            raise ConfigError(f"{keys.shared} is {num_shared}; expected at least 0. Correct it.")
        values["shared_dim"] = num_shared * values["expert_dim"]
    moe = MoeConfig(**values, **keys.fixed)
    # gpt-oss' folders have both; transformers reads the first.
    other = fields.take("experts_per_token", int, moe.experts_per_token)
    if other != moe.experts_per_token:
        raise ConfigError(
            f"experts_per_token is {other}, and num_experts_per_tok {moe.experts_per_token}. Remove the first."
        )
    if keys.placed == "all":
        return [moe] * num_layers
    if keys.placed == "after_first":
        first = fields.take("first_k_dense_replace", int, keys.defaults["first_k_dense_replace"])
        return [moe if layer >= first else None for layer in range(num_layers)]
    step, plain = fields.take("decoder_sparse_step", int, 1), fields.take_list("mlp_only_layers", int, [])
    if step < 1:
        raise ConfigError(f"decoder_sparse_step is {step}; expected at least 1.")
    return [None if layer in plain or (layer + 1) % step else moe for layer in range(num_layers)]


def _take_one(fields: Fields, names: Sequence[str], defaults: Mapping[str, Any]) -> int:
    """The value of a key with several names, which must not differ."""
    found = {name: fields.take(name, int, None) for name in names}
    values = {value for value in found.values() if value is not None}
    if len(values) > 1:
        raise ConfigError(f"{' and '.join(names)} are {' and '.join(map(str, found.values()))}. Remove one of them.")
    return values.pop() if values else defaults[names[0]]


def moe_fields(keys: MoeKeys, layers: Sequence[MoeConfig | None]) -> dict[str, Any]:
    """The keys; `take_moe` gives the layers back."""
    moe = next((moe for moe in layers if moe is not None), None)
    fields = _size_fields(keys, moe) if moe else {}  # of layers that are all plain, nothing reads the sizes
    plain = [number for number, layer in enumerate(layers) if layer is None]
    if keys.placed == "after_first":
        fields["first_k_dense_replace"] = len(plain)
    elif keys.placed == "step":
        fields |= {"decoder_sparse_step": 1, "mlp_only_layers": plain}
    return fields


def _size_fields(keys: MoeKeys, moe: MoeConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {key: getattr(moe, name) for key, (name, _) in keys.options.items()}
    fields[keys.num_experts[0]] = moe.num_experts
    fields["num_experts_per_tok"] = moe.experts_per_token
    if keys.expert_dim:
        fields[keys.expert_dim] = moe.expert_dim
    if keys.shared:
        fields[keys.shared] = moe.shared_dim // moe.expert_dim
    return fields


def take_latent(fields: Fields) -> LatentConfig:
    """Remove the keys of latent attention. Absent ones are DeepSeek-V3's."""
    latent = LatentConfig(
        query_rank=fields.take_optional("q_lora_rank", int, 1536),
        kv_rank=fields.take("kv_lora_rank", int, 512),
        plain_dim=fields.take("qk_nope_head_dim", int, 128),
        rope_dim=fields.take("qk_rope_head_dim", int, 64),
        value_dim=fields.take("v_head_dim", int, 128),
        interleaved=fields.take_optional("rope_interleave", bool, True, null=False),
        use_bias=fields.take("attention_bias", bool, False),
    )
    # What transformers derives and stores beside them.
    for name, own in (("head_dim", latent.rope_dim), ("qk_head_dim", latent.head_dim)):
        value = fields.take(name, int, own)
        if value != own:
            raise ConfigError(f"{name} is {value}; latent attention with these ranks has {own}.")
    return latent


def latent_fields(latent: LatentConfig) -> dict[str, Any]:
    """The keys; `take_latent` gives `latent` back."""
    return {
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.kv_rank,
        "qk_nope_head_dim": latent.plain_dim,
        "qk_rope_head_dim": latent.rope_dim,
        "v_head_dim": latent.value_dim,
        "rope_interleave": latent.interleaved,
        "attention_bias": latent.use_bias,
    }
