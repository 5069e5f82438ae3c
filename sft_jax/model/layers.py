"""The parts of a plain decoder layer: normalisation, attention heads, MLP.

Modules keep parameters in the dtype they were made with and compute in the dtype of their input. They are plain
pytrees: `jax.vmap` over keys makes a stack of layers and `jax.lax.scan` runs it. A layer knows nothing of positions,
masks, caches or kernels: it is handed `attend`, which turns queries, keys and values into the mixed values.
"""

import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

from sft_jax.model.families import TransformerConfig
from sft_jax.model.linear import Linear
from sft_jax.model.rope import at_least_float32
from sft_jax.sharding import constrain
from sft_jax.typing import Array, Float, Key


@runtime_checkable
class Attend(Protocol):
    """Queries [B, L, N, H], keys [B, L, K, H] and values [B, L, K, Hv], none of them turned by its position yet -> the
    mixed values [B, L, N, Hv], and what is carried on, such as a cache."""

    def __call__(self, q: Array, k: Array, v: Array, sinks: Array | None = None) -> tuple[Array, Any]: ...


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, over the last dim. Source: arXiv:1910.07467, equation 4."""

    def __init__(self, dim: int, eps: float, dtype: DTypeLike, adds_one: bool = False):
        self.eps = eps
        self.adds_one = adds_one
        self.scale = nnx.Param(jnp.zeros((dim,), dtype) if adds_one else jnp.ones((dim,), dtype))

    def __call__(self, x: Float[Array, "B L *heads D"]) -> Float[Array, "B L *heads D"]:
        wide = x.astype(at_least_float32(x.dtype))  # bfloat16 squares would lose the statistics
        scale = self.scale[...].astype(wide.dtype)
        scale = jnp.expand_dims(1 + scale if self.adds_one else scale, tuple(range(x.ndim - 1)))
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (normed * scale).astype(x.dtype)


def make_norm(config: TransformerConfig, dim: int, dtype: DTypeLike) -> RMSNorm:
    return RMSNorm(dim, config.norm_eps, dtype, config.norm_adds_one)


def normed(norm: RMSNorm | None, x: Array) -> Array:
    """X where there is no norm."""
    return x if norm is None else norm(x)


class Attention(nnx.Module):
    """Grouped-query attention: query heads n * G .. n * G + G - 1 share key/value head n."""

    def __init__(self, config: TransformerConfig, key: Key[Array, ""], dtype: DTypeLike):
        dim, std, keys = config.embed_dim, config.initializer_range, jax.random.split(key, 4)
        heads, kv_heads = (config.num_heads, config.head_dim), (config.num_kv_heads, config.head_dim)
        self.query = Linear((dim,), heads, std, keys[0], dtype, config.qkv_bias)
        self.key = Linear((dim,), kv_heads, std, keys[1], dtype, config.qkv_bias)
        self.value = Linear((dim,), kv_heads, std, keys[2], dtype, config.qkv_bias)
        self.out = Linear(heads, (dim,), std, keys[3], dtype, config.out_bias)
        self.norms_all_heads = config.qk_norm == "all"
        dims = (math.prod(shape) if self.norms_all_heads else config.head_dim for shape in (heads, kv_heads))
        norms = (None if config.qk_norm == "none" else make_norm(config, dim, dtype) for dim in dims)
        self.query_norm, self.key_norm = norms
        if config.attention_sinks:
            self.sinks = nnx.Param(jnp.zeros(config.num_heads, dtype))

    def __call__(
        self, x: Float[Array, "B L D"], attend: Attend, mesh: Mesh | AbstractMesh | None
    ) -> tuple[Float[Array, "B L D"], Any]:
        q = constrain(self._norm_heads(self.query_norm, self.query(x, mesh)), mesh, "batch", "seq", "heads", None)
        k = constrain(self._norm_heads(self.key_norm, self.key(x, mesh)), mesh, "batch", "seq", "kv_heads", None)
        v = constrain(self.value(x, mesh), mesh, "batch", "seq", "kv_heads", None)
        mixed_BLNH, carried = attend(q, k, v, self.sinks[...] if hasattr(self, "sinks") else None)
        return self.out(mixed_BLNH, mesh), carried

    def _norm_heads(self, norm: RMSNorm | None, x: Float[Array, "B L N H"]) -> Float[Array, "B L N H"]:
        return normed(norm, x.reshape(*x.shape[:2], -1)).reshape(x.shape) if self.norms_all_heads else normed(norm, x)


def activate(name: str, x: Array) -> Array:
    """The activation of a gate, by its name in a config."""
    return jax.nn.silu(x) if name == "silu" else jax.nn.gelu(x, approximate=True)


class Mlp(nnx.Module):
    """down(activation(gate(x)) * up(x)). Source: arXiv:2002.05202, SwiGLU and GEGLU."""

    def __init__(self, config: TransformerConfig, key: Key[Array, ""], dtype: DTypeLike):
        dim, hidden, std, keys = config.embed_dim, config.mlp_dim, config.initializer_range, jax.random.split(key, 3)
        self.activation = config.activation
        self.gate = Linear((dim,), (hidden,), std, keys[0], dtype, config.mlp_bias)
        self.up = Linear((dim,), (hidden,), std, keys[1], dtype, config.mlp_bias)
        self.down = Linear((hidden,), (dim,), std, keys[2], dtype, config.mlp_bias)

    def __call__(self, x: Float[Array, "B L D"], mesh: Mesh | AbstractMesh | None) -> Float[Array, "B L D"]:
        hidden_BLF = activate(self.activation, self.gate(x, mesh)) * self.up(x, mesh)
        return self.down(constrain(hidden_BLF, mesh, "batch", "seq", "mlp"), mesh)
