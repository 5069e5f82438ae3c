"""The parts of a decoder layer: normalisation, rotary positions, attention heads, MLP.

Modules keep parameters in the dtype they were made with and compute in the dtype of their input. They are plain
pytrees: `jax.vmap` over keys makes a stack of layers and `jax.lax.scan` runs it. A layer knows nothing of masks, caches
or kernels: it is handed `attend`, which turns queries, keys and values into the mixed values.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

from sft_jax.model.families import TransformerConfig
from sft_jax.model.linear import Linear
from sft_jax.sharding import constrain
from sft_jax.typing import Array, Float, Int, Key

# (q [B, L, N, H], k [B, L, K, H], v [B, L, K, H]) -> (out [B, L, N, H], what the kernel carries on, such as a cache)
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, over the last dim. Source: arXiv:1910.07467, equation 4."""

    def __init__(self, dim: int, eps: float, dtype: DTypeLike):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((dim,), dtype))

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        wide = x.astype(at_least_float32(x.dtype))  # bfloat16 squares would lose the statistics
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (normed * self.scale[...].astype(wide.dtype)[None, None, :]).astype(x.dtype)


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """Where bfloat16 is too coarse: float32, or float64 if that is what is computed in."""
    return jnp.promote_types(dtype, jnp.float32)


class Rope(NamedTuple):
    """Rotation of each position: cos and sin of its angles."""

    cos: Float[Array, "B L H/2"]
    sin: Float[Array, "B L H/2"]


def rope_frequencies(config: TransformerConfig) -> np.ndarray:
    """Radians per position of each pair of dims, float64 [H / 2], with Llama-3.1's scaling where the config has it.

    theta = 10000 and H = 4 give [1, 0.01]: pair 0 turns once in 2 pi tokens, pair 1 once in 200 pi. With scaling, a
    pair that turns more than high_freq_factor times in the original context keeps its frequency, one that turns less
    than low_freq_factor times is slowed by `factor`, and between them the two are blended linearly.

    Source: arXiv:2104.09864, section 3.2; scaling: https://github.com/meta-llama/llama-models, models/llama3/model.py.
    """
    frequencies = config.rope_theta ** -(np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def rope_for(positions: Int[Array, "B L"], config: TransformerConfig, dtype: DTypeLike) -> Rope:
    """The rotations at these positions, in at least float32: in bfloat16 positions above 256 run together."""
    frequencies = jnp.asarray(rope_frequencies(config), at_least_float32(dtype))
    angles = positions[:, :, None].astype(frequencies.dtype) * frequencies[None, None, :]
    return Rope(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "B L N H"], rope: Rope) -> Float[Array, "B L N H"]:
    """Turn each pair (x[i], x[i + H / 2]) by its angle: the half-rotation convention of Hugging Face checkpoints."""
    first, second = jnp.split(x.astype(rope.cos.dtype), 2, axis=-1)
    cos, sin = rope.cos[:, :, None, :], rope.sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention: query heads n * G .. n * G + G - 1 share key/value head n."""

    def __init__(self, config: TransformerConfig, key: Key[Array, ""], dtype: DTypeLike):
        dim, std, keys = config.embed_dim, config.initializer_range, jax.random.split(key, 4)
        heads, kv_heads = (config.num_heads, config.head_dim), (config.num_kv_heads, config.head_dim)
        self.query = Linear((dim,), heads, std, keys[0], dtype)
        self.key = Linear((dim,), kv_heads, std, keys[1], dtype)
        self.value = Linear((dim,), kv_heads, std, keys[2], dtype)
        self.out = Linear(heads, (dim,), std, keys[3], dtype)

    def __call__(
        self, x: Float[Array, "B L D"], rope: Rope, attend: Attend, mesh: Mesh | AbstractMesh | None
    ) -> tuple[Float[Array, "B L D"], Any]:
        q = constrain(rotate(self.query(x), rope), mesh, "batch", "seq", "heads", None)
        k = constrain(rotate(self.key(x), rope), mesh, "batch", "seq", "kv_heads", None)
        v = constrain(self.value(x), mesh, "batch", "seq", "kv_heads", None)
        mixed_BLNH, carried = attend(q, k, v)
        return self.out(mixed_BLNH), carried


class Mlp(nnx.Module):
    """down(silu(gate(x)) * up(x)). Source: arXiv:2002.05202, SwiGLU."""

    def __init__(self, config: TransformerConfig, key: Key[Array, ""], dtype: DTypeLike):
        dim, hidden, std, keys = config.embed_dim, config.mlp_dim, config.initializer_range, jax.random.split(key, 3)
        self.gate = Linear((dim,), (hidden,), std, keys[0], dtype)
        self.up = Linear((dim,), (hidden,), std, keys[1], dtype)
        self.down = Linear((hidden,), (dim,), std, keys[2], dtype)

    def __call__(self, x: Float[Array, "B L D"], mesh: Mesh | AbstractMesh | None) -> Float[Array, "B L D"]:
        hidden_BLF = jax.nn.silu(self.gate(x)) * self.up(x)
        return self.down(constrain(hidden_BLF, mesh, "batch", "seq", "mlp"))


class DecoderLayer(nnx.Module):
    """Attention and MLP, each normalised before and added to its input."""

    def __init__(self, config: TransformerConfig, key: Key[Array, ""], dtype: DTypeLike):
        attention_key, mlp_key = jax.random.split(key)
        self.attention_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype)
        self.attention = Attention(config, attention_key, dtype)
        self.mlp_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype)
        self.mlp = Mlp(config, mlp_key, dtype)

    def __call__(
        self, x: Float[Array, "B L D"], rope: Rope, attend: Attend, mesh: Mesh | AbstractMesh | None
    ) -> tuple[Float[Array, "B L D"], Any]:
        mixed, carried = self.attention(self.attention_norm(x), rope, attend, mesh)
        x = constrain(x + mixed, mesh, "batch", "seq", None)
        return constrain(x + self.mlp(self.mlp_norm(x), mesh), mesh, "batch", "seq", None), carried
