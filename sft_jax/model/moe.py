"""The MLP of a layer as a mixture of experts: hidden states -> what the chosen and the shared experts add, and sums
over the router's choices."""

import dataclasses

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

from sft_jax.model.experts import Experts
from sft_jax.model.families import TransformerConfig
from sft_jax.model.layers import Mlp
from sft_jax.model.moe_config import MoeConfig
from sft_jax.model.router import Router, RouterSums, TokenWeights, sum_router
from sft_jax.sharding import constrain
from sft_jax.typing import Array, Float, Key


class MoeMlp(nnx.Module):
    """sum_k weight[k] * expert[k](x), plus the shared experts' MLP where there is one."""

    def __init__(self, config: TransformerConfig, moe: MoeConfig, key: Key[Array, ""], dtype: DTypeLike):
        keys = jax.random.split(key, 3)
        self.router = Router(moe, config.embed_dim, config.initializer_range, keys[0], dtype)
        self.experts = Experts(config, moe, keys[1], dtype)
        if moe.shared_dim:
            self.shared = Mlp(dataclasses.replace(config, mlp_dim=moe.shared_dim), keys[2], dtype)

    def __call__(
        self, x: Float[Array, "B L D"], tokens: TokenWeights, mesh: Mesh | AbstractMesh | None
    ) -> tuple[Float[Array, "B L D"], RouterSums]:
        choice = self.router(x)
        y = self.experts(x, choice.experts, choice.weights, tokens.segment_ids != 0, mesh)
        if hasattr(self, "shared"):
            y = y + self.shared(x, mesh)
        return constrain(y, mesh, "batch", "seq", None), sum_router(choice, tokens)
