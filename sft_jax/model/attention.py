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

from sft_jax.datatypes import ConfigError
from sft_jax.typing import Array, Bool, Float, Int

_MASKED = -1e30  # a score that exp() turns into 0; finite, so that a row of nothing else is no NaN


class Rows(NamedTuple):
    """Where tokens stand: the segment of each (0: padding), and its position in the segment."""

    positions: Int[Array, "B L"]
    segment_ids: Int[Array, "B L"]


def attend(
    name: str,
    q: Float[Array, "B L N H"],
    k: Float[Array, "B M K H"],
    v: Float[Array, "B M K H"],
    rows: Rows,
    kv_rows: Rows | None = None,
) -> Float[Array, "B L N H"]:
    """Attention by the kernel called `name` (config.model.attention).

    Args:
      rows: where the queries stand.
      kv_rows: where the keys stand; None: the queries and keys are the same packed rows, in which a segment is
        contiguous and its positions count up, so that no key to the right of a query is ever seen.

    Raises:
      ConfigError: for an unknown name.
    """
    if name == "reference":
        return reference(q, k, v, rows, kv_rows)
    raise ConfigError(f"config.model.attention: is {name!r}; expected 'reference'.")


def reference(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B M K H"],
    v: Float[Array, "B M K H"],
    rows: Rows,
    kv_rows: Rows | None = None,
) -> Float[Array, "B L N H"]:
    """Plain jax.numpy attention in blocks of queries, softmax in float32. Arguments as in `attend`.

    In packed rows block i reads only the keys up to its own end: nearly half of a full score matrix is never computed.
    """
    length, num_heads, head_dim = q.shape[1:]
    num_kv_heads = k.shape[2]
    scaled = (q * head_dim**-0.5).reshape(*q.shape[:2], num_kv_heads, num_heads // num_kv_heads, head_dim)
    q_BKGLH, k_BKMH, v_BKMH = jnp.moveaxis(scaled, 1, 3), jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
    block = max(128, -(-length // 8))  # at most 8 blocks, so that compilation stays short
    blocks = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        end = stop if kv_rows is None else k.shape[1]
        mask_BLM = _sees(_cut(rows, start, stop), _cut(kv_rows or rows, 0, end))
        blocks.append(_attend_block(q_BKGLH[:, :, :, start:stop], k_BKMH[:, :, :end], v_BKMH[:, :, :end], mask_BLM))
    out_BLNH = jnp.moveaxis(jnp.concatenate(blocks, axis=3), 3, 1).reshape(q.shape)
    return jnp.where(rows.segment_ids[:, :, None, None] != 0, out_BLNH, 0)


def _attend_block(
    q: Float[Array, "B K G L H"], k: Float[Array, "B K M H"], v: Float[Array, "B K M H"], mask: Bool[Array, "B L M"]
) -> Float[Array, "B K G L H"]:
    wide = jnp.promote_types(q.dtype, jnp.float32)  # exp and its sum need more than bfloat16's 8 bits
    scores = jnp.einsum("bkglh,bkmh->bkglm", q, k, preferred_element_type=wide)
    scores = jnp.where(mask[:, None, None], scores, _MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    mixed = jnp.einsum("bkglm,bkmh->bkglh", weights.astype(v.dtype), v, preferred_element_type=wide)
    return (mixed / total).astype(q.dtype)


def _sees(queries: Rows, keys: Rows) -> Bool[Array, "B L M"]:
    same_segment = queries.segment_ids[:, :, None] == keys.segment_ids[:, None, :]
    return same_segment & (queries.positions[:, :, None] >= keys.positions[:, None, :])


def _cut(rows: Rows, start: int, stop: int) -> Rows:
    return Rows(rows.positions[:, start:stop], rows.segment_ids[:, start:stop])
