"""One layer of the decoder: attention and an MLP, each of the kind that its config says."""

from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

from sft_jax.model.families import LayerConfig, TransformerConfig
from sft_jax.model.latent_attention import LatentAttention
from sft_jax.model.layers import Attend, Attention, Mlp, RMSNorm, make_norm, normed
from sft_jax.model.moe import MoeMlp
from sft_jax.model.router import RouterSums, TokenWeights
from sft_jax.sharding import constrain
from sft_jax.typing import Array, Float, Key


class DecoderLayer(nnx.Module):
    """Attention and MLP, each added to its input, with a norm before, after, or on both sides."""

    def __init__(self, config: TransformerConfig, layer: LayerConfig, key: Key[Array, ""], dtype: DTypeLike):
        attention_key, mlp_key = jax.random.split(key)
        self.residual_multiplier = config.residual_multiplier

        def norm_for(*layouts: str) -> RMSNorm | None:
            return make_norm(config, config.embed_dim, dtype) if config.norms in layouts else None

        self.attention_norm, self.mlp_norm = norm_for("pre", "sandwich"), norm_for("pre", "sandwich")
        self.attention_post_norm, self.mlp_post_norm = norm_for("post", "sandwich"), norm_for("post", "sandwich")
        self.attention: Attention | LatentAttention
        if config.latent is None:
            self.attention = Attention(config, attention_key, dtype)
        else:
            self.attention = LatentAttention(config, config.latent, attention_key, dtype)
        self.mlp: Mlp | MoeMlp
        self.mlp = Mlp(config, mlp_key, dtype) if layer.moe is None else MoeMlp(config, layer.moe, mlp_key, dtype)

    def __call__(
        self, x: Float[Array, "B L D"], attend: Attend, tokens: TokenWeights, mesh: Mesh | AbstractMesh | None
    ) -> tuple[Float[Array, "B L D"], Any, RouterSums | None]:
        """The output, what `attend` carries on, and of a mixture of experts the sums over its choices."""
        mixed, carried = self.attention(normed(self.attention_norm, x), attend, mesh)
        x = self._add(x, normed(self.attention_post_norm, mixed), mesh)
        read, sums = normed(self.mlp_norm, x), None
        if isinstance(self.mlp, MoeMlp):
            hidden, sums = self.mlp(read, tokens, mesh)
        else:
            hidden = self.mlp(read, mesh)
        return self._add(x, normed(self.mlp_post_norm, hidden), mesh), carried, sums

    def _add(self, x: Array, more: Array, mesh: Mesh | AbstractMesh | None) -> Array:
        more = more if self.residual_multiplier == 1 else more * self.residual_multiplier
        return constrain(x + more, mesh, "batch", "seq", None)
