"""What a decoder is made of: `config.json` of a Hugging Face folder <-> TransformerConfig, and the named presets.

Reading is strict: a key of `config.json` is understood, or known to change no number, or it is an error. An option that
would be ignored (a bias, another activation, another rope) is a wrong model with a plausible loss.
"""

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any

from sft_jax.datatypes import ConfigError


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama-3.1's stretching of the low rotary frequencies; the formula is in `layers.rope_frequencies`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """A Llama-family decoder: pre-norm, RMSNorm, rotary positions, grouped queries, gated SiLU MLP, no biases."""

    vocab_size: int
    num_layers: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    norm_eps: float
    tie_embeddings: bool
    """The output head is the embedding; there is no `head.kernel`."""
    max_position: int
    """Tokens in the longest sequence that the model was made for. The caller decides about longer ones."""
    initializer_range: float = 0.02
    """Standard deviation of randomly initialised matrices."""
    lora_scale: float = 1.0
    """Multiplies what adapters add, where the parameters hold any."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
                raise ConfigError(f"model: {f.name} is {value}; expected more than 0.")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model: num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}. "
                "Every key/value head serves the same number of query heads."
            )
        if self.head_dim % 2:
            raise ConfigError(f"model: head_dim is {self.head_dim}; rotary positions need an even one.")


def num_params(config: TransformerConfig) -> int:
    """Number of parameters, with a tied head counted once."""
    attention = 2 * config.embed_dim * config.head_dim * (config.num_heads + config.num_kv_heads)
    mlp = 3 * config.embed_dim * config.mlp_dim
    norms = 2 * config.embed_dim
    embeddings = config.vocab_size * config.embed_dim * (1 if config.tie_embeddings else 2)
    return embeddings + config.num_layers * (attention + mlp + norms) + config.embed_dim


def preset_config(name: str, overrides: dict[str, Any]) -> TransformerConfig:
    """A preset with some fields changed. Of `rope_scaling`, only its removal (None) is an override.

    Raises:
      ConfigError: for an unknown preset or field, or a wrong type.
    """
    if name not in PRESETS:
        raise ConfigError(f"config.model.preset: is {name!r}; expected one of {', '.join(PRESETS)}.")
    where = "config.model.overrides"
    kinds = {**typing.get_type_hints(TransformerConfig), "rope_scaling": type(None)}
    for field in overrides:
        if field not in kinds:
            raise ConfigError(f"{where}: has no field {field!r}. Known: {', '.join(kinds)}.")
    values = {field: _take(dict(overrides), field, kinds[field], _REQUIRED, where) for field in overrides}
    return dataclasses.replace(PRESETS[name], **values)


_REQUIRED = object()

# Keys that change no number here: identity, storage, generation defaults, reporting.
_HARMLESS_KEYS = {
    "_name_or_path", "_attn_implementation", "_commit_hash", "_from_model_config", "transformers_version",
    "torch_dtype", "dtype", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp",
    "chunk_size_feed_forward", "output_attentions", "output_hidden_states", "return_dict", "id2label", "label2id",
    "problem_type", "task_specific_params", "max_length", "temperature", "top_p", "top_k", "do_sample", "unsloth_fixed",
    "unsloth_version",
}  # fmt: skip
# Keys that change the model's numbers unless they have this value (or null).
_ONLY_VALUES: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0,
    "partial_rotary_factor": 1,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "quantization_config": None,
    "sliding_window": None,
}


def read_hf_config(fields: dict[str, Any], where: str) -> TransformerConfig:
    """The fields of a `config.json` -> TransformerConfig.

    Both spellings of rotary positions are read: `rope_theta` + `rope_scaling`, and transformers 5's `rope_parameters`.
    A key that is absent or null has the default of transformers' LlamaConfig.

    Args:
      where: the file, for error messages.

    Raises:
      ConfigError: for another architecture, a missing key, a wrong type, or a key or value that would be ignored.
    """
    if fields.get("model_type") != "llama":
        raise ConfigError(f"{where}: model_type is {fields.get('model_type')!r}; only 'llama' is supported so far.")
    rest = {name: value for name, value in fields.items() if value is not None and name != "model_type"}

    def take(name: str, kind: type, default: Any = _REQUIRED) -> Any:
        return _take(rest, name, kind, default, where)

    num_heads = take("num_attention_heads", int)
    embed_dim = take("hidden_size", int)
    rope_theta, rope_scaling = _take_rope(rest, where)
    values: dict[str, Any] = {
        "vocab_size": take("vocab_size", int),
        "num_layers": take("num_hidden_layers", int),
        "embed_dim": embed_dim,
        "mlp_dim": take("intermediate_size", int),
        "num_heads": num_heads,
        "num_kv_heads": take("num_key_value_heads", int, num_heads),
        "head_dim": take("head_dim", int, embed_dim // max(num_heads, 1)),
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "norm_eps": take("rms_norm_eps", float, 1e-6),
        "tie_embeddings": take("tie_word_embeddings", bool, False),
        "max_position": take("max_position_embeddings", int, 2048),
        "initializer_range": take("initializer_range", float, 0.02),
    }
    _refuse_rest(rest, where)
    try:
        return TransformerConfig(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _take(rest: dict[str, Any], name: str, kind: type, default: Any, where: str) -> Any:
    """Remove and return `rest[name]`, checked."""
    if name not in rest:
        if default is _REQUIRED:
            raise ConfigError(f"{where}: has no {name}. A Llama model cannot be built without it.")
        return default
    value = rest.pop(name)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:  # not isinstance: True is an int
        raise ConfigError(f"{where}: {name} is {value!r}; expected {kind.__name__}.")
    return value


def _take_rope(rest: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Remove the rotary keys of either spelling -> (theta, scaling)."""
    if "rope_parameters" in rest and "rope_scaling" in rest:
        raise ConfigError(f"{where}: has both rope_scaling and rope_parameters. Remove one of them.")
    key = "rope_scaling" if "rope_scaling" in rest else "rope_parameters"
    inner = f"{where}: {key}"
    rope = {name: value for name, value in _take(rest, key, dict, {}, where).items() if value is not None}
    outer_theta = _take(rest, "rope_theta", float, None, where)
    theta = _take(rope, "rope_theta", float, outer_theta, inner)
    if outer_theta is not None and theta != outer_theta:
        raise ConfigError(f"{inner}.rope_theta is {theta}, and rope_theta is {outer_theta}. Remove one of them.")
    kind = _take(rope, "rope_type", str, rope.get("type", "default"), inner)
    rope.pop("type", None)  # the older name of rope_type
    scaling = None
    if kind == "llama3":
        scaling = RopeScaling(
            factor=_take(rope, "factor", float, _REQUIRED, inner),
            low_freq_factor=_take(rope, "low_freq_factor", float, _REQUIRED, inner),
            high_freq_factor=_take(rope, "high_freq_factor", float, _REQUIRED, inner),
            original_max_position=_take(rope, "original_max_position_embeddings", int, _REQUIRED, inner),
        )
    elif kind != "default":
        raise ConfigError(f"{inner}: rope_type is {kind!r}; only 'default' and 'llama3' are supported so far.")
    _refuse_rest(rope, inner)
    return 10_000.0 if theta is None else theta, scaling


def _refuse_rest(rest: dict[str, Any], where: str) -> None:
    """What no one took must change nothing."""
    for name, value in rest.items():
        if name in _ONLY_VALUES and value != _ONLY_VALUES[name]:
            raise ConfigError(f"{where}: {name} is {value!r}; only {_ONLY_VALUES[name]!r} is supported.")
    unknown = sorted(rest.keys() - _ONLY_VALUES.keys() - _HARMLESS_KEYS)
    if unknown:
        raise ConfigError(
            f"{where}: {', '.join(f'{name} = {rest[name]!r}' for name in unknown)}: not a known part of a Llama model, "
            "so it might change its numbers. Remove it if it does not."
        )


def to_hf_config(config: TransformerConfig, dtype: str) -> dict[str, Any]:
    """The fields of a `config.json` that transformers (4 and 5) and vLLM load; `read_hf_config` gives `config` back.

    Token ids (bos, eos, pad) belong to the tokenizer: the exporter adds them, or transformers assumes 1 and 2.

    Args:
      dtype: of the stored weights, such as "bfloat16".
    """
    scaling = config.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # the older spelling: every version of transformers reads it
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        },
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def _llama31(factor: float) -> RopeScaling:
    return RopeScaling(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)


PRESETS: dict[str, TransformerConfig] = {
    # https://huggingface.co/meta-llama/Llama-3.1-70B/blob/main/config.json
    "llama3.1-70b": TransformerConfig(
        vocab_size=128256, num_layers=80, embed_dim=8192, mlp_dim=28672, num_heads=64, num_kv_heads=8, head_dim=128,
        rope_theta=500_000.0, rope_scaling=_llama31(8.0), norm_eps=1e-5, tie_embeddings=False, max_position=131072,
    ),
    # https://huggingface.co/meta-llama/Llama-3.1-8B/blob/main/config.json
    "llama3.1-8b": TransformerConfig(
        vocab_size=128256, num_layers=32, embed_dim=4096, mlp_dim=14336, num_heads=32, num_kv_heads=8, head_dim=128,
        rope_theta=500_000.0, rope_scaling=_llama31(8.0), norm_eps=1e-5, tie_embeddings=False, max_position=131072,
    ),
    # https://huggingface.co/meta-llama/Llama-3.2-1B/blob/main/config.json
    "llama3.2-1b": TransformerConfig(
        vocab_size=128256, num_layers=16, embed_dim=2048, mlp_dim=8192, num_heads=32, num_kv_heads=8, head_dim=64,
        rope_theta=500_000.0, rope_scaling=_llama31(32.0), norm_eps=1e-5, tie_embeddings=True, max_position=131072,
    ),
    # https://huggingface.co/meta-llama/Llama-2-7b-hf/blob/main/config.json
    "llama2-7b": TransformerConfig(
        vocab_size=32000, num_layers=32, embed_dim=4096, mlp_dim=11008, num_heads=32, num_kv_heads=32, head_dim=128,
        rope_theta=10_000.0, norm_eps=1e-5, tie_embeddings=False, max_position=4096,
    ),
    # The embedded testbed's base model: 0.87M parameters, pretrained in minutes on a CPU.
    "testbed": TransformerConfig(
        vocab_size=1024, num_layers=4, embed_dim=128, mlp_dim=352, num_heads=4, num_kv_heads=2, head_dim=32,
        rope_theta=10_000.0, norm_eps=1e-5, tie_embeddings=True, max_position=1024,
    ),
    # Workload W1 of benchmarks/: 15.2M parameters.
    "w1": TransformerConfig(
        vocab_size=32000, num_layers=6, embed_dim=288, mlp_dim=768, num_heads=6, num_kv_heads=6, head_dim=48,
        rope_theta=10_000.0, norm_eps=1e-5, tie_embeddings=True, max_position=2048,
    ),
}  # fmt: skip
