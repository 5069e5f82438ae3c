"""The usual sizes by name, each with its source."""

import dataclasses
import typing
from typing import Any

from sft_jax.datatypes import ConfigError
from sft_jax.model.config_fields import Fields
from sft_jax.model.families import LayerConfig, TransformerConfig, same_layers, with_num_layers
from sft_jax.model.rope import Llama3Scaling, RopeConfig


def preset_config(name: str, overrides: dict[str, Any]) -> TransformerConfig:
    """A preset with some fields changed: any but `family` and `layers`, of which `num_layers` may be changed.

    Raises:
      ConfigError: for an unknown preset or field, or a wrong type.
    """
    if name not in PRESETS:
        raise ConfigError(f"config.model.preset: is {name!r}; expected one of {', '.join(PRESETS)}.")
    where = "config.model.overrides"
    hints = typing.get_type_hints(TransformerConfig)
    kinds = {field: hints[field] for field in hints if field not in ("family", "layers")}
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


def _llama(num_layers: int, theta: float, scaling: Llama3Scaling | None = None, **fields: Any) -> TransformerConfig:
    layer = LayerConfig(rope=RopeConfig(theta=theta, scaling=scaling))
    return TransformerConfig(layers=same_layers(num_layers, layer), norm_eps=1e-5, **fields)


def _llama31(factor: float) -> Llama3Scaling:
    return Llama3Scaling(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)


PRESETS: dict[str, TransformerConfig] = {
    # https://huggingface.co/meta-llama/Llama-3.1-70B/blob/main/config.json
    "llama3.1-70b": _llama(
        80, 500_000.0, _llama31(8.0), vocab_size=128256, embed_dim=8192, mlp_dim=28672, num_heads=64, num_kv_heads=8,
        head_dim=128, tie_embeddings=False, max_position=131072,
    ),
    # https://huggingface.co/meta-llama/Llama-3.1-8B/blob/main/config.json
    "llama3.1-8b": _llama(
        32, 500_000.0, _llama31(8.0), vocab_size=128256, embed_dim=4096, mlp_dim=14336, num_heads=32, num_kv_heads=8,
        head_dim=128, tie_embeddings=False, max_position=131072,
    ),
    # https://huggingface.co/meta-llama/Llama-3.2-1B/blob/main/config.json
    "llama3.2-1b": _llama(
        16, 500_000.0, _llama31(32.0), vocab_size=128256, embed_dim=2048, mlp_dim=8192, num_heads=32, num_kv_heads=8,
        head_dim=64, tie_embeddings=True, max_position=131072,
    ),
    # https://huggingface.co/meta-llama/Llama-2-7b-hf/blob/main/config.json
    "llama2-7b": _llama(
        32, 10_000.0, vocab_size=32000, embed_dim=4096, mlp_dim=11008, num_heads=32, num_kv_heads=32, head_dim=128,
        tie_embeddings=False, max_position=4096,
    ),
    # The embedded testbed's base model: 0.87M parameters, pretrained in minutes on a CPU.
    "testbed": _llama(
        4, 10_000.0, vocab_size=1024, embed_dim=128, mlp_dim=352, num_heads=4, num_kv_heads=2, head_dim=32,
        tie_embeddings=True, max_position=1024,
    ),
    # Workload W1 of benchmarks/: 15.2M parameters.
    "w1": _llama(
        6, 10_000.0, vocab_size=32000, embed_dim=288, mlp_dim=768, num_heads=6, num_kv_heads=6, head_dim=48,
        tie_embeddings=True, max_position=2048,
    ),
}  # fmt: skip
