"""The rotary keys of a `config.json` <-> RopeConfig, in both spellings: `rope_theta` beside `rope_scaling`, and
transformers 5's `rope_parameters`, which holds all of it and may have one object for each kind of layer."""

import math
from typing import Any, NamedTuple

from sft_jax.datatypes import ConfigError
from sft_jax.model.config_fields import REQUIRED, Fields
from sft_jax.model.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    RopeScaling,
    YarnScaling,
    yarn_factor,
)

_KINDS = ("full_attention", "sliding_attention")
# Of an object that describes a scaling: keys that may be absent and not null, as in _NEVER_NULL of hf_config.
_NEVER_NULL = frozenset({
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "truncate",
})  # fmt: skip


class RopeDefaults(NamedTuple):
    """What a family assumes where its config.json says nothing."""

    theta: float = 10_000.0
    local_theta: float | None = None
    """Of the layers with a window, which then have a base of their own and no scaling; None: all layers are alike."""
    local_key: str | None = None
    """That says `local_theta` in the older spelling; None: there is none, and no other base is supported, because the
    two spellings of such a folder mean different bases in transformers 4 and 5."""
    original_max_position: int | None = None
    """A key beside the others, stronger than the one within the scaling; None: there is no such default."""
    scaling: dict[str, Any] | None = None
    """What a folder without a scaling has."""
    types: tuple[str, ...] = ()
    """Types of scaling that the family has; (): all."""
    is_partial: bool = False
    """Whether `partial_rotary_factor` is heeded; transformers ignores it elsewhere."""


def take_ropes(fields: Fields, defaults: RopeDefaults, max_position: int) -> tuple[RopeConfig, RopeConfig]:
    """Remove the rotary keys of either spelling -> those of layers that see everything, and of those with a window."""
    old, new = (fields.take(name, dict, None) for name in ("rope_scaling", "rope_parameters"))
    if old is not None and new is not None:
        raise ConfigError(f"{fields.where}: has both rope_scaling and rope_parameters. Remove one of them.")
    outer = _Outer(
        theta=_take_theta(fields, "rope_theta"),
        theta_key="rope_theta",
        fraction=fields.take("partial_rotary_factor", float, None),
        original=fields.take("original_max_position_embeddings", int, defaults.original_max_position),
        max_position=max_position,
        types=defaults.types or tuple(_READERS),
        is_partial=defaults.is_partial,
    )
    name = "rope_scaling" if old is not None else "rope_parameters"
    values = old or (new if new is not None else defaults.scaling or {})  # {} is a scaling in the newer spelling only
    if defaults.local_theta is None:
        rope = _read_rope(Fields(values, f"{fields.where}: {name}"), outer, defaults.theta)
        return rope, rope
    of_4, of_5 = (old or {}).get("type"), (old or {}).get("rope_type", "default")
    if of_4 not in (None, of_5):
        raise ConfigError(
            f"{fields.where}: rope_scaling has type {of_4!r}, which transformers 4 heeds in this family; in 5 its "
            f"rope_type is {of_5!r} all the same. Write the one that was trained as rope_type, and remove type."
        )
    local_theta = _take_theta(fields, defaults.local_key) if defaults.local_key else None
    local = outer._replace(theta=local_theta, theta_key=defaults.local_key or "")
    if new and new.keys() - set(_KINDS):
        raise ConfigError(f"{fields.where}: rope_parameters has {', '.join(new)}; expected {' and '.join(_KINDS)}.")
    within = Fields(new or {}, f"{fields.where}: rope_parameters")
    nested = {kind: within.take(kind, dict, {}) for kind in _KINDS} if new else {_KINDS[0]: values, _KINDS[1]: {}}
    full_fields, sliding_fields = (Fields(nested[kind], f"{fields.where}: {name}.{kind}") for kind in _KINDS)
    full = _read_rope(full_fields, outer, defaults.theta)
    sliding = _read_rope(sliding_fields, local, defaults.local_theta)
    if sliding.scaling is not None:
        raise ConfigError(f"{sliding_fields.where}: has a scaling; only layers without a window may. Remove it.")
    bases = {full.theta, sliding.theta}
    if defaults.local_key is None and bases != {defaults.local_theta}:
        raise ConfigError(
            f"{fields.where}: rope_theta is {' and '.join(map(str, sorted(bases)))}; only {defaults.local_theta} is "
            "supported, since transformers 4 and 5 disagree about any other."
        )
    return full, sliding


class _Outer(NamedTuple):
    """What stands beside the object that describes a scaling."""

    theta: float | None
    theta_key: str
    fraction: float | None
    original: int | None
    max_position: int
    types: tuple[str, ...]
    is_partial: bool


def _read_rope(fields: Fields, outer: _Outer, default_theta: float) -> RopeConfig:
    fields.refuse_nulls(_NEVER_NULL)
    theta = _take_theta(fields, "rope_theta")
    if theta is not None and outer.theta not in (None, theta):
        raise ConfigError(
            f"{fields.where}: rope_theta is {theta}, and beside it {outer.theta_key} {outer.theta}. Remove one of them."
        )
    theta = outer.theta if theta is None else theta
    fraction = _agree(fields, "partial_rotary_factor", float, outer.fraction)
    if fraction not in (None, 1) and not outer.is_partial:
        raise ConfigError(
            f"{fields.where}: partial_rotary_factor is {fraction}; this family turns every dim. Remove the key."
        )
    kind = fields.take("rope_type", str, fields.take("type", str, "default"))
    if kind not in outer.types:
        raise ConfigError(f"{fields.where}: rope_type is {kind!r}; expected one of {', '.join(outer.types)}.")
    scaling = _READERS[kind](fields, outer)
    if scaling is None:  # written beside it all the same
        _agree(fields, "original_max_position_embeddings", int, outer.original)
    fields.refuse_rest(frozenset(), {}, f"rotary positions of type {kind!r}")
    return RopeConfig(
        theta=default_theta if theta is None else theta, fraction=1.0 if fraction is None else fraction, scaling=scaling
    )


def _take_theta(fields: Fields, name: str) -> float | None:
    theta: float | None = fields.take(name, float, None)
    if theta is not None and theta <= 1:
        raise ConfigError(f"{fields.where}: {name} is {theta}; expected a number above 1.")
    return theta


def _agree(fields: Fields, name: str, kind: type, outer: Any) -> Any:
    """The value within the object or beside it, which must not differ."""
    inner = fields.take(name, kind, None)
    if inner is not None and outer is not None and inner != outer:
        raise ConfigError(f"{fields.where}: {name} is {inner}, and {outer} beside it. Remove one of them.")
    return outer if inner is None else inner


def _take_positive(fields: Fields, name: str, default: Any = REQUIRED) -> float:
    value: float = fields.take(name, float, default)
    if value <= 0:
        raise ConfigError(f"{fields.where}: {name} is {value}; expected a number above 0.")
    return value


def _original(fields: Fields, outer: _Outer) -> int:
    original = _agree(fields, "original_max_position_embeddings", int, outer.original)
    original = outer.max_position if original is None else original
    if original < 2:  # its logarithm is a divisor
        raise ConfigError(f"{fields.where}: stretches a context of {original} tokens; expected at least 2.")
    return original


def _read_default(fields: Fields, outer: _Outer) -> None:
    return None


def _read_linear(fields: Fields, outer: _Outer) -> LinearScaling:
    return LinearScaling(factor=_take_positive(fields, "factor"))


def _read_dynamic(fields: Fields, outer: _Outer) -> DynamicScaling:
    original = _original(fields, outer._replace(original=outer.max_position))
    return DynamicScaling(factor=_take_positive(fields, "factor"), original_max_position=original)


def _read_llama3(fields: Fields, outer: _Outer) -> Llama3Scaling:
    low, high = (_take_positive(fields, f"{name}_freq_factor") for name in ("low", "high"))
    if low >= high:  # their difference is a divisor
        raise ConfigError(f"{fields.where}: low_freq_factor is {low}; expected less than high_freq_factor, {high}.")
    return Llama3Scaling(
        factor=_take_positive(fields, "factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position=_original(fields, outer),
    )


def _read_yarn(fields: Fields, outer: _Outer) -> YarnScaling:
    original = _original(fields, outer)
    of_lengths = outer.max_position / original if "factor" in fields.rest else REQUIRED  # where it is null, not absent
    factor = _take_positive(fields, "factor", of_lengths)
    scales = fields.take("mscale", float, 0.0), fields.take("mscale_all_dim", float, 0.0)
    return YarnScaling(
        factor=factor,
        original_max_position=original,
        attention_factor=_take_positive(fields, "attention_factor", _yarn_attention_factor(factor, *scales)),
        beta_fast=_take_positive(fields, "beta_fast", 32.0),
        beta_slow=_take_positive(fields, "beta_slow", 1.0),
        truncate=fields.take("truncate", bool, True),
        mscale=scales[0],
        mscale_all_dim=scales[1],
    )


def _yarn_attention_factor(factor: float, mscale: float, mscale_all_dim: float) -> float:
    if mscale and mscale_all_dim:
        return yarn_factor(factor, mscale) / yarn_factor(factor, mscale_all_dim)
    return yarn_factor(factor)


def _read_longrope(fields: Fields, outer: _Outer) -> LongRopeScaling:
    original = _original(fields, outer)
    factor = _take_positive(fields, "factor", outer.max_position / original)
    short, long = (fields.take_list(f"{name}_factor", float) for name in ("short", "long"))
    for name, factors in (("short_factor", short), ("long_factor", long)):
        if not all(value > 0 for value in factors):
            raise ConfigError(f"{fields.where}: {name} is {factors!r}; expected numbers above 0.")
    return LongRopeScaling(
        short=tuple(short),
        long=tuple(long),
        original_max_position=original,
        attention_factor=_take_positive(fields, "attention_factor", _longrope_attention_factor(factor, original)),
    )


def _longrope_attention_factor(factor: float, original: int) -> float:
    """Source: arXiv:2402.13753, appendix; as in https://huggingface.co/microsoft/Phi-3-mini-128k-instruct."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


_READERS = {
    "default": _read_default,
    "linear": _read_linear,
    "dynamic": _read_dynamic,
    "llama3": _read_llama3,
    "yarn": _read_yarn,
    "longrope": _read_longrope,
    "su": _read_longrope,  # its name in the first Phi-3 folders
}


def rope_fields(full: RopeConfig, sliding: RopeConfig, defaults: RopeDefaults, max_position: int) -> dict[str, Any]:
    """The older spelling, which every version of transformers reads. `take_ropes` gives the two back."""
    assert sliding == full or (defaults.local_theta is not None and sliding.scaling is None)
    fields: dict[str, Any] = {"rope_theta": full.theta, "rope_scaling": _scaling_fields(full.scaling, max_position)}
    if defaults.scaling and full.scaling is None:
        fields["rope_scaling"] = {"rope_type": "default"}
    if full.fraction != 1:
        fields["partial_rotary_factor"] = full.fraction
    if defaults.local_key is not None:
        fields[defaults.local_key] = sliding.theta
    if defaults.original_max_position is not None:
        original = getattr(full.scaling, "original_max_position", defaults.original_max_position)
        fields["original_max_position_embeddings"] = original
        if fields["rope_scaling"]:  # Phi-3's own code, and transformers 4, want these three keys alone
            fields["rope_scaling"].pop("original_max_position_embeddings", None)
            fields["rope_scaling"]["type"] = fields["rope_scaling"].pop("rope_type")
    return fields


def _scaling_fields(scaling: RopeScaling | None, max_position: int) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, DynamicScaling):  # its original length is max_position_embeddings
        return {"rope_type": "dynamic", "factor": scaling.factor}
    fields: dict[str, Any] = {"original_max_position_embeddings": scaling.original_max_position}
    if isinstance(scaling, Llama3Scaling):
        fields |= {"rope_type": "llama3", "factor": scaling.factor}
        return fields | {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if isinstance(scaling, YarnScaling):
        fields |= {"rope_type": "yarn", "factor": scaling.factor}
        fields |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        fields |= {} if scaling.truncate else {"truncate": False}
        scales = {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim}
        fields |= {name: scale for name, scale in scales.items() if scale}
        default = _yarn_attention_factor(scaling.factor, **scales)
    else:
        fields |= {"rope_type": "longrope", "short_factor": list(scaling.short), "long_factor": list(scaling.long)}
        default = _longrope_attention_factor(
            max_position / scaling.original_max_position, scaling.original_max_position
        )
    return fields if scaling.attention_factor == default else fields | {"attention_factor": scaling.attention_factor}
