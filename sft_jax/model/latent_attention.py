"""Multi-head latent attention: keys and values are made from one short vector per token.

    x [D] -> latent [kv_rank] -> norm -> for each head, an unturned part of its key and its value
    x [D] -> the turned part of the key [rope_dim], the same for all heads

Queries are made from x at once or through a short vector of their own. Heads have the parts in this order: the dims
that turn first, then those that keep no position, as `rope.rotate` wants them; checkpoints have them last. Scores are
sums over dims, so that the same order for queries and keys changes nothing.

Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

from sft_jax.model.families import TransformerConfig
from sft_jax.model.latent_config import LatentConfig
from sft_jax.model.layers import Attend, RMSNorm
from sft_jax.model.linear import Linear
from sft_jax.sharding import constrain
from sft_jax.typing import Array, Float, Key

# Of the norms of latents, whatever the model's own is. Source: DeepSeek-V3's inference/model.py, RMSNorm
_NORM_EPS = 1e-6


class LatentAttention(nnx.Module):
    """Every head has a key and a value of its own, expanded from the latent; so does a cache hold them."""

    def __init__(self, config: TransformerConfig, latent: LatentConfig, key: Key[Array, ""], dtype: DTypeLike):
        keys, dim, bias = jax.random.split(key, 5), (config.embed_dim,), latent.use_bias
        stddev, num_heads = config.initializer_range, config.num_heads
        self.latent, query_in = latent, dim
        if latent.query_rank is not None:
            query_in = (latent.query_rank,)
            self.query_down = Linear(dim, query_in, stddev, keys[0], dtype, bias)
            self.query_norm = RMSNorm(latent.query_rank, _NORM_EPS, dtype)
        self.query = Linear(query_in, (num_heads, latent.head_dim), stddev, keys[1], dtype)
        self.kv_down = Linear(dim, (latent.kv_rank + latent.rope_dim,), stddev, keys[2], dtype, bias)
        self.kv_norm = RMSNorm(latent.kv_rank, _NORM_EPS, dtype)
        self.kv_up = Linear((latent.kv_rank,), (num_heads, latent.plain_dim + latent.value_dim), stddev, keys[3], dtype)
        self.out = Linear((num_heads, latent.value_dim), dim, stddev, keys[4], dtype, bias)

    def __call__(
        self, x: Float[Array, "B L D"], attend: Attend, mesh: Mesh | AbstractMesh | None
    ) -> tuple[Float[Array, "B L D"], Any]:
        """`attend` turns the first `rope_dim` dims of the queries and keys that it is given."""
        q = self.query(self.query_norm(self.query_down(x, mesh)) if hasattr(self, "query_down") else x, mesh)
        q_plain, q_rope = jnp.split(q, [self.latent.plain_dim], axis=-1)
        latent_BLR, k_rope_BLH = jnp.split(self.kv_down(x, mesh), [self.latent.kv_rank], axis=-1)
        kv = self.kv_up(self.kv_norm(latent_BLR), mesh)
        k_plain, v = jnp.split(kv, [self.latent.plain_dim], axis=-1)
        k_rope = jnp.broadcast_to(k_rope_BLH[:, :, None, :], (*k_plain.shape[:-1], self.latent.rope_dim))
        q, k = (self._join(*parts) for parts in ((q_rope, q_plain), (k_rope, k_plain)))
        q, k, v = (constrain(heads, mesh, "batch", "seq", "heads", None) for heads in (q, k, v))
        mixed, carried = attend(q, k, v)
        return self.out(mixed, mesh), carried

    def _join(self, rope: Float[Array, "B L N R"], plain: Float[Array, "B L N P"]) -> Float[Array, "B L N H"]:
        """Those that turn first, in halves: pairs (0, 1), (2, 3) become (0, 2), (1, 3)."""
        halves = [rope[..., 0::2], rope[..., 1::2]] if self.latent.interleaved else [rope]
        return jnp.concatenate([*halves, plain], axis=-1)
