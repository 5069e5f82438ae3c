"""Hidden states -> the experts of each token, their weights, and the sums that say how evenly they are chosen.

The balance loss of a segment of n tokens with E experts, k of them per token, is

    E / (k n^2) * sum_e chosen[e] * share[e]

with chosen[e] the tokens that chose expert e and share[e] the sum of their shares (scores that add up to 1): 1 where
both are even, E / k where all tokens put everything on the same experts. It is no mean over tokens, so it is taken for
each segment alone and weighed by the segment's tokens: then packing, microbatches and meshes change nothing.
Source: DeepSeek-V3 (arXiv:2412.19437), equations 17 to 20; there a sequence is what a segment is here.

Two experts, one each, two tokens that both choose the first, with shares (.75, .25) and (.5, .5):
2 / (1 * 4) * (2 * 1.25 + 0 * .75) = 1.25.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from sft_jax.model.moe_config import MoeConfig
from sft_jax.model.rope import at_least_float32
from sft_jax.typing import Array, Float, Int, Key


def dtype_among(path: str, others: DTypeLike) -> np.dtype:
    """The dtype of a parameter where others are `others`: the correction, which decides near ties, is never narrower
    than float32."""
    return np.dtype(at_least_float32(others) if path.endswith(".router.correction") else others)


class Choice(NamedTuple):
    """The experts of each token."""

    experts: Int[Array, "B L k"]
    weights: Float[Array, "B L k"]
    shares: Float[Array, "B L E"]
    logits: Float[Array, "B L E"]


class TokenWeights(NamedTuple):
    """Which tokens there are and which count in the router's losses."""

    segment_ids: Int[Array, "B L"]
    weights: Float[Array, "B L"] | None
    """None: no token counts."""


class RouterSums(NamedTuple):
    """Sums over tokens, which are divided once, in the step."""

    balance: Float[Array, "*layers"]  # of weighted tokens: the balance loss of their segments
    z_loss: Float[Array, "*layers"]  # of weighted tokens: logsumexp(logits)^2
    chosen: Float[Array, "*layers E"]  # how often each expert was chosen by any token that is no padding


class Router(nnx.Module):
    """One linear map, in at least float32: near ties, bfloat16 would choose others from one kernel to the next."""

    def __init__(self, moe: MoeConfig, embed_dim: int, stddev: float, key: Key[Array, ""], dtype: DTypeLike):
        self.moe = moe
        self.kernel = nnx.Param(stddev * jax.random.normal(key, (embed_dim, moe.num_experts), dtype))
        if moe.router_bias:
            self.bias = nnx.Param(jnp.zeros(moe.num_experts, dtype))
        if moe.correction_bias:
            self.correction = nnx.Param(jnp.zeros(moe.num_experts, at_least_float32(dtype)))

    def __call__(self, x: Float[Array, "B L D"]) -> Choice:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        kernel = self.kernel[...].astype(wide)
        logits = jnp.einsum("bld,de->ble", x.astype(wide), kernel, precision=jax.lax.Precision.HIGHEST)
        if self.moe.router_bias:
            logits = logits + self.bias[...].astype(wide)[None, None, :]
        correction = self.correction[...].astype(wide) if self.moe.correction_bias else None
        return choose_experts(logits, correction, self.moe)


def choose_experts(logits: Float[Array, "B L E"], correction: Float[Array, " E"] | None, moe: MoeConfig) -> Choice:
    """The best experts by score. Gradients flow through the weights, not through the choice.

    Source: Mixtral (arXiv:2401.04088), section 2.1; groups and correction: DeepSeek-V3 (arXiv:2412.19437), 2.1.2.
    """
    if moe.scores == "sigmoid":
        scores = jax.nn.sigmoid(logits)
        shares, ranked = scores / jnp.sum(scores, axis=-1, keepdims=True), scores
    else:
        scores = shares = jax.nn.softmax(logits, axis=-1)
        ranked = logits if correction is None else scores  # in the order of the scores, with fewer ties
    if correction is not None:
        ranked = ranked + correction[None, None, :]
    if moe.num_groups > 1:
        ranked = _leave_best_groups(ranked, moe)
    _, experts = jax.lax.top_k(jax.lax.stop_gradient(ranked), moe.experts_per_token)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if moe.normalize_weights:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return Choice(experts, weights * moe.weights_multiplier, shares, logits)


def _leave_best_groups(ranked: Float[Array, "B L E"], moe: MoeConfig) -> Float[Array, "B L E"]:
    """Minus infinity outside a token's best groups: a group is as good as its best two experts together."""
    grouped = ranked.reshape(*ranked.shape[:2], moe.num_groups, -1)
    group_scores = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
    _, best = jax.lax.top_k(group_scores, moe.groups_per_token)
    is_best = jnp.any(best[..., None] == jnp.arange(moe.num_groups)[None, None, None, :], axis=-2)
    return jnp.where(is_best[..., None], grouped, -jnp.inf).reshape(ranked.shape)


def sum_router(choice: Choice, tokens: TokenWeights) -> RouterSums:
    """What the choices of all tokens add up to. Padding is in none of it, whatever its numbers are."""
    num_experts, length = choice.shares.shape[-1], tokens.segment_ids.shape[1]
    per_token = choice.experts.shape[-1]
    live_BL = tokens.segment_ids != 0
    chosen_BLE = jnp.sum(choice.experts[..., None] == jnp.arange(num_experts)[None, None, None, :], axis=-2)
    chosen_BLE = jnp.where(live_BL[..., None], chosen_BLE, 0).astype(choice.shares.dtype)
    weights_BL = jnp.zeros(live_BL.shape) if tokens.weights is None else jnp.where(live_BL, tokens.weights, 0)
    weights_BL = weights_BL.astype(choice.shares.dtype)
    shares_BLE = jnp.where(live_BL[..., None], choice.shares, 0) * weights_BL[..., None]

    def per_segment(values: Array) -> Array:  # row 0 is that of padding, whose values are 0
        add = lambda row, ids: jax.ops.segment_sum(row, ids, num_segments=length + 1)  # noqa: E731
        return jax.vmap(add)(values, tokens.segment_ids)

    size_BS = per_segment(weights_BL)
    overlap_BS = jnp.sum(per_segment(chosen_BLE * weights_BL[..., None]) * per_segment(shares_BLE), axis=-1)
    # n * E / (k n^2) * overlap; a segment of no weight counts for nothing
    balance_BS = num_experts / per_token * overlap_BS / jnp.where(size_BS > 0, size_BS, 1)
    log_z_BL = jax.nn.logsumexp(jnp.where(live_BL[..., None], choice.logits, 0), axis=-1)
    return RouterSums(jnp.sum(balance_BS), jnp.sum(weights_BL * log_z_BL**2), jnp.sum(chosen_BLE, axis=(0, 1)))


def join_sums(stacks: Sequence[RouterSums | None]) -> RouterSums | None:
    """Those of some stacks of layers, each with its layers in front -> of all layers that have a router."""
    found = [sums for sums in stacks if sums is not None]
    return RouterSums(*(jnp.concatenate(parts) for parts in zip(*found, strict=True))) if found else None
