"""Queries, keys, values and where their tokens stand -> mixed values. The kernel is chosen by name.

A token sees the tokens of its own segment at its own position or before. In a row that packs two examples of 3 and 2
tokens and one of padding, query (down) sees key (across):

    segment_ids  1 1 1 2 2 0
    positions    0 1 2 0 1 0

                 x . . . . .
                 x x . . . .
                 x x x . . .
                 . . . x . .
                 . . . x x .
                 . . . . . .      padding: its output is 0 and no gradient passes through it
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh

from sft_jax.datatypes import ConfigError
from sft_jax.model.remat import ATTENTION
from sft_jax.typing import Array, Bool, Float, Int

_MASKED = -1e30  # a score that exp() turns into 0; finite, so that a row of nothing else is no NaN


class Rows(NamedTuple):
    """Where tokens stand: the segment of each (0: padding), and its position in the segment."""

    positions: Int[Array, "B L"]
    segment_ids: Int[Array, "B L"]


class Scores(NamedTuple):
    """How scores are made of queries and keys, and which of them count."""

    scale: float
    """Multiplies the products of queries and keys."""
    window: int | None = None
    """A token sees this many tokens, itself the last; None: all before it."""
    softcap: float | None = None
    """Scores become c * tanh(score / c); None: they stay."""


def segment_lengths(rows: Rows) -> Int[Array, "B L"]:
    """For each token, the number of tokens in its segment."""
    return jnp.sum(rows.segment_ids[:, :, None] == rows.segment_ids[:, None, :], axis=-1)


def attend(
    name: str,
    q: Float[Array, "B L N H"],
    k: Float[Array, "B M K H"],
    v: Float[Array, "B M K Hv"],
    rows: Rows,
    scores: Scores,
    kv_rows: Rows | None = None,
    sinks: Float[Array, " N"] | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> Float[Array, "B L N Hv"]:
    """Attention by the kernel called `name` (config.model.attention). A kernel that cannot do what is asked says so.

    Args:
      rows: where the queries stand.
      kv_rows: where the keys stand; None: the queries and keys are the same packed rows, in which a segment is
        contiguous and its positions count up, so that no key to the right of a query is ever seen.
      sinks: for each head a score beside those of the tokens, which takes its share of attention and gives nothing.
      mesh: where rows and heads are split; None: one device.

    Raises:
      ConfigError: for an unknown name, or what that kernel cannot do.
    """
    if name == "reference":
        return checkpoint_name(reference(q, k, v, rows, scores, kv_rows, sinks), ATTENTION)
    if name not in ("splash", "pallas_gpu"):
        raise ConfigError(f"config.model.attention: is {name!r}; expected 'reference', 'splash' or 'pallas_gpu'.")
    if kv_rows is not None:
        raise ConfigError(
            f"config.model.attention: {name!r} is for packed rows, and these queries read a cache. Set 'reference'."
        )
    # Only now: Pallas is slow to import, and these need this module's types.
    if name == "pallas_gpu":
        from sft_jax.model.pallas_gpu import attend_pallas_gpu

        return attend_pallas_gpu(q, k, v, rows, scores, sinks, mesh)
    from sft_jax.model.ring import attend_ring
    from sft_jax.model.splash import attend_splash

    if mesh is not None and mesh.shape["context"] > 1:
        return attend_ring(q, k, v, rows, scores, sinks, mesh)
    return attend_splash(q, k, v, rows, scores, sinks, mesh)


def is_interpreted(name: str, made_for: str, q: Array, mesh: Mesh | AbstractMesh | None) -> bool:
    """Whether the kernel called `name`, made for the platform `made_for`, is interpreted: on a CPU.

    Raises:
      ConfigError: for another platform, or a dtype wider than those that kernels add up in.
    """
    # Of the devices that will run it: those of the mesh, which may be of a topology that is not here.
    platform = mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else jax.default_backend()
    if platform not in (made_for, "cpu"):
        raise ConfigError(
            f"config.model.attention: {name!r} is a {made_for.upper()} kernel, and the devices are {platform}. "
            "Set 'reference'."
        )
    if q.dtype.itemsize > 4:
        raise ConfigError(
            f"config.model.attention: {name!r} adds up in float32, and config.model.compute_dtype is {q.dtype}. "
            "Set float32 or bfloat16 there, or 'reference' here."
        )
    return platform == "cpu"


def reference(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B M K H"],
    v: Float[Array, "B M K Hv"],
    rows: Rows,
    scores: Scores,
    kv_rows: Rows | None = None,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B L N Hv"]:
    """Plain jax.numpy attention in blocks of queries, softmax in float32. Arguments as in `attend`.

    In packed rows a block reads only the keys from its window's start to its own end: nearly half of a full score
    matrix is never computed, and more of one with a window.
    """
    length, num_heads, head_dim = q.shape[1:]
    grouped = (k.shape[2], num_heads // k.shape[2])
    scaled = (q * scores.scale).reshape(*q.shape[:2], *grouped, head_dim)
    q_BKGLH, k_BKMH, v_BKMH = jnp.moveaxis(scaled, 1, 3), jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
    sinks_KG = None if sinks is None else sinks.reshape(grouped)
    block = max(128, -(-length // 8))  # at most 8 blocks, so that compilation stays short
    blocks = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        first, end = 0, k.shape[1]
        if kv_rows is None:
            first, end = max(0, start + 1 - scores.window) if scores.window else 0, stop
        mask_BLM = _sees(_cut(rows, start, stop), _cut(kv_rows or rows, first, end), scores.window)
        part = q_BKGLH[:, :, :, start:stop], k_BKMH[:, :, first:end], v_BKMH[:, :, first:end]
        blocks.append(_attend_block(*part, mask_BLM, scores.softcap, sinks_KG))
    out_BLNH = jnp.moveaxis(jnp.concatenate(blocks, axis=3), 3, 1).reshape(*q.shape[:3], v.shape[-1])
    return jnp.where(rows.segment_ids[:, :, None, None] != 0, out_BLNH, 0)


def _attend_block(
    q: Float[Array, "B K G L H"],
    k: Float[Array, "B K M H"],
    v: Float[Array, "B K M Hv"],
    mask: Bool[Array, "B L M"],
    softcap: float | None,
    sinks: Float[Array, "K G"] | None,
) -> Float[Array, "B K G L Hv"]:
    wide = jnp.promote_types(q.dtype, jnp.float32)  # exp and its sum need more than bfloat16's 8 bits
    scores = jnp.einsum("bkglh,bkmh->bkglm", q, k, preferred_element_type=wide)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask[:, None, None], scores, _MASKED)
    highest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.zeros((), wide)
    if sinks is not None:
        sink = sinks.astype(wide)[None, :, :, None, None]
        highest = jnp.maximum(highest, jax.lax.stop_gradient(sink))
        total = jnp.exp(sink - highest)
    weights = jnp.exp(scores - highest)
    total = total + jnp.sum(weights, axis=-1, keepdims=True)
    mixed = jnp.einsum("bkglm,bkmh->bkglh", weights.astype(v.dtype), v, preferred_element_type=wide)
    return (mixed / total).astype(q.dtype)


def _sees(queries: Rows, keys: Rows, window: int | None) -> Bool[Array, "B L M"]:
    distance = queries.positions[:, :, None] - keys.positions[:, None, :]
    seen = (queries.segment_ids[:, :, None] == keys.segment_ids[:, None, :]) & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def _cut(rows: Rows, start: int, stop: int) -> Rows:
    return Rows(rows.positions[:, start:stop], rows.segment_ids[:, start:stop])
