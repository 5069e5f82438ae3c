"""The families that are understood: what each one's `config.json` may say, and what goes without saying.

An entry is data. Where a key is absent, transformers' config class of that family has a default, and so does the entry.
docs/models.md says how to add one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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


def _write_scalar(scale: float) -> float:
    """0.0625 -> 256: an integer where it was one."""
    scalar = scale**-2
    return round(scalar) if abs(scalar - round(scalar)) < 1e-9 * scalar else scalar


OPTIONS: dict[str, Option] = {
    "attention_bias": Option(bool, ("qkv_bias", "out_bias")),
    "mlp_bias": Option(bool, ("mlp_bias",)),
    "attn_logit_softcapping": Option(float, ("attention_softcap",), is_optional=True),
    "final_logit_softcapping": Option(float, ("logit_softcap",), is_optional=True),
    "query_pre_attn_scalar": Option(float, ("attention_scale",), read=lambda value: value**-0.5, write=_write_scalar),
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
    activations: Mapping[str, str] = field(default_factory=dict)
    """Names of activations that mean something else than in other families."""
    scales_embedding: bool = False
    """Embeddings are multiplied by sqrt(embed_dim)."""
    only: Mapping[str, Any] = field(default_factory=dict)
    """Keys that would change the numbers, and the one value that is supported."""
    harmless: frozenset[str] = frozenset()
    """Keys that change no number."""


_GEMMA: dict[str, Any] = {"norm_adds_one": True}
_GEMMA_ONLY = {"use_bidirectional_attention": False}

FAMILIES: dict[str, Family] = {
    # Llama 2, 3, 3.1, 3.2, 3.3, and the many models that took over its code.
    "llama": Family(
        architecture="LlamaForCausalLM",
        options={"attention_bias": False, "mlp_bias": False},
    ),
}
