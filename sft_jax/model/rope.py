"""Where a token stands -> the angles by which its queries and keys are turned, for each way to stretch a context.

A pair of dims (i, i + R/2) of a head turns by `position * frequency[i]`, R being the dims that turn. A scaling slows
the pairs so that a longer context looks like the one that the model was trained on. Two of them look at how long the
text is: they take the length of the token's own segment, so that packing changes nothing.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sft_jax.typing import Array, Float, Int


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """All pairs `factor` times as slow. Source: arXiv:2306.15595, equation 4."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class DynamicScaling:
    """A base that grows with the segment once it is longer than `original_max_position`, so that the slowest pair is
    slowed in proportion and the fastest not at all. Source: "Dynamic NTK", arXiv:2309.00071, section 3.1."""

    factor: float
    original_max_position: int


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Pairs that turn less than `low_freq_factor` times in the original context are slowed by `factor`, those that turn
    more than `high_freq_factor` times are kept, and between them the two are blended linearly.

    Source: https://github.com/meta-llama/llama-models, models/llama3/model.py.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """As Llama-3's, with the blend linear in the number of the pair. `attention_factor` multiplies queries and keys.

    Source: arXiv:2309.00071, section 3.2.
    """

    factor: float
    original_max_position: int
    attention_factor: float
    beta_fast: float = 32.0
    """Pairs that turn more often than this in the original context are kept."""
    beta_slow: float = 1.0
    """Pairs that turn less often than this are slowed by the whole factor."""
    truncate: bool = True
    """Whether the ends of the blend are rounded outwards to whole pairs."""
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    """0: unused. With both, `attention_factor` is their quotient; and latent attention, of which few dims turn, has its
    scores multiplied by `latent_factor` instead."""

    @property
    def latent_factor(self) -> float:
        return yarn_factor(self.factor, self.mscale_all_dim) ** 2


def yarn_factor(factor: float, scale: float = 1.0) -> float:
    """By how much a stretch sharpens attention, through query and key each. Source: arXiv:2309.00071, equation 22."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


@dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """A divisor for each pair: `short` for a segment of at most `original_max_position` tokens, `long` for a longer
    one. `attention_factor` multiplies queries and keys in both cases. Source: arXiv:2402.13753."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_max_position: int
    attention_factor: float


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """The rotary positions of a layer."""

    theta: float
    fraction: float = 1.0
    """Share of a head's dims that turn, the first ones; the others keep no position."""
    scaling: RopeScaling | None = None

    @property
    def needs_lengths(self) -> bool:
        return isinstance(self.scaling, DynamicScaling | LongRopeScaling)

    def num_rotated(self, head_dim: int) -> int:
        return int(head_dim * self.fraction)


class Rope(NamedTuple):
    """Rotation of each position: cos and sin of its angles, for the R dims that turn."""

    cos: Float[Array, "B L R/2"]
    sin: Float[Array, "B L R/2"]


def rope_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position of each pair of dims, float64 [R / 2]; what depends on the length of a segment is not in it.

    theta = 10000 and R = 4 give [1, 0.01]: pair 0 turns once in 2 pi tokens, pair 1 once in 200 pi.
    Source: arXiv:2104.09864, section 3.2.
    """
    num_rotated = rope.num_rotated(head_dim)
    plain = rope.theta ** -(np.arange(0, num_rotated, 2, dtype=np.float64) / num_rotated)
    scaling = rope.scaling
    if isinstance(scaling, LinearScaling):
        return plain / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        turns = scaling.original_max_position * plain / (2 * math.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    elif isinstance(scaling, YarnScaling):
        kept = 1 - _yarn_ramp(scaling, rope.theta, num_rotated)
    else:
        return plain
    kept = np.clip(kept, 0, 1)
    return kept * plain + (1 - kept) * plain / scaling.factor


def _yarn_ramp(scaling: YarnScaling, theta: float, num_rotated: int) -> np.ndarray:
    """0 for the pairs that are kept, 1 for those slowed by the whole factor, not yet clipped to that range."""

    def pair_that_turns(times: float) -> float:
        wavelength = scaling.original_max_position / (2 * math.pi * times)
        return num_rotated * math.log(wavelength) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, num_rotated - 1)
    return (np.arange(num_rotated // 2) - low) / (high - low if high != low else 0.001)


def rope_for(
    positions: Int[Array, "B L"], lengths: Int[Array, "B L"] | None, rope: RopeConfig, head_dim: int, dtype: DTypeLike
) -> Rope:
    """The rotations at these positions, in at least float32: in bfloat16 positions above 256 run together.

    Args:
      lengths: of the segment of each token; read only where `rope.needs_lengths`.
    """
    wide = at_least_float32(dtype)
    frequencies = jnp.asarray(rope_frequencies(rope, head_dim), wide)[None, None, :]
    scaling, factor = rope.scaling, 1.0
    if isinstance(scaling, DynamicScaling | LongRopeScaling):
        assert lengths is not None
        over = lengths[:, :, None] > scaling.original_max_position
        if isinstance(scaling, LongRopeScaling):
            short, long = (jnp.asarray(divisors, wide)[None, None, :] for divisors in (scaling.short, scaling.long))
            frequencies = frequencies / jnp.where(over, long, short)
        else:
            ratio = lengths[:, :, None].astype(wide) / scaling.original_max_position
            growth = jnp.where(over, scaling.factor * ratio - (scaling.factor - 1), 1)
            pairs = np.arange(0, rope.num_rotated(head_dim), 2) / (rope.num_rotated(head_dim) - 2)
            frequencies = frequencies * growth ** -jnp.asarray(pairs, wide)[None, None, :]
    if isinstance(scaling, YarnScaling | LongRopeScaling):
        factor = scaling.attention_factor
    angles = positions[:, :, None].astype(wide) * frequencies
    return Rope(factor * jnp.cos(angles), factor * jnp.sin(angles))


def rotate(x: Float[Array, "B L N H"], rope: Rope | None) -> Float[Array, "B L N H"]:
    """Turn each pair (x[i], x[i + R / 2]) of the first R dims by its angle: the half-rotation convention of Hugging
    Face checkpoints. None: nothing turns."""
    if rope is None:
        return x
    half = rope.cos.shape[-1]
    first, second = (part.astype(rope.cos.dtype) for part in (x[..., :half], x[..., half : 2 * half]))
    cos, sin = rope.cos[:, :, None, :], rope.sin[:, :, None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return turned if 2 * half == x.shape[-1] else jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """Where bfloat16 is too coarse: float32, or float64 if that is what is computed in."""
    return jnp.promote_types(dtype, jnp.float32)
