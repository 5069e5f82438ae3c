"""Attention of packed rows by jax's TPU kernel "splash": causal, with segments, windows, soft-caps, grouped heads and
sinks. Queries, keys and values in, mixed values out, as `attention.reference` gives them. No score matrix exists.

Each device runs the kernel on its own rows and heads, under `shard_map`. The kernel skips the blocks that no query may
see by the causal mask or the window; segments are told apart inside the blocks that are left. On a CPU it is
interpreted: right, and slow.

Source: jax.experimental.pallas.ops.tpu.splash_attention
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from sft_jax.datatypes import ConfigError
from sft_jax.model.attention import Rows, Scores, is_interpreted
from sft_jax.model.remat import ATTENTION
from sft_jax.sharding import BATCH_AXES
from sft_jax.typing import Array, Float

_LANES = 128  # of a TPU's vector registers: blocks are multiples of it
_LARGEST_BLOCK = 1024
# Bytes of a kernel's block tables that fit the scalar memory with what else is there, of 1 MiB on v4 and later.
_LARGEST_TABLES = 512 * 1024


def attend_splash(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B L K H"],
    v: Float[Array, "B L K Hv"],
    rows: Rows,
    scores: Scores,
    sinks: Float[Array, " N"] | None,
    mesh: Mesh | AbstractMesh | None,
) -> Float[Array, "B L N Hv"]:
    """Arguments as in `attention.attend`.

    Raises:
      ConfigError: for a length, a dtype or a platform that the kernel is not made for.
    """
    interpret = is_interpreted("splash", "tpu", q, mesh)
    blocks = choose_blocks(q.shape[1], scores.window)
    run = functools.partial(_attend_local, scores=scores, blocks=blocks, interpret=interpret)
    if mesh is not None:
        heads, tokens = P(BATCH_AXES, None, "tensor", None), P(BATCH_AXES, None)
        specs = (heads, heads, heads, tokens, None if sinks is None else P("tensor"))
        # The kernel does not say over which axes its results vary, so that nothing could be checked.
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    return run(q, k, v, rows.segment_ids, sinks)


def choose_blocks(length: int, window: int | None) -> kernel_lib.BlockSizes:
    """Tiles of the kernel for rows of `length`: the largest up to 1,024 that divides it, so that each key is read from
    memory as seldom as may be; with a window no larger than it needs, since whole blocks are computed. Scores are made
    up to 512 keys at a time, which bounds what a tile needs. The backward pass makes the gradients of keys and values
    and those of queries by two kernels: one for both would need memory for length / block gradients of all queries.

    A row of 8,192: tiles of 1,024 x 1,024; of 1,280: 640 x 640; with a window of 512: 512 x 512.

    Raises:
      ConfigError: the length is no multiple of 128, or needs larger tables than a TPU core's scalar memory holds.
    """
    if length % _LANES:
        raise ConfigError(
            f"config.data.max_seq_len: is {length}; config.model.attention 'splash' needs a multiple of {_LANES}. "
            f"Set {-(-length // _LANES) * _LANES}."
        )
    largest = _LARGEST_BLOCK if window is None else min(_LARGEST_BLOCK, max(256, -(-window // _LANES) * _LANES))
    block = _largest_divisor(length, largest)
    num_blocks = length // block
    table_bytes = 3 * num_blocks**2 * (1 if num_blocks < 128 else 2)  # of int8 or int16: three tables, all heads alike
    if table_bytes > _LARGEST_TABLES and window is None:
        raise ConfigError(
            f"config.data.max_seq_len: is {length}, which config.model.attention 'splash' cuts into {num_blocks} "
            f"blocks of {block}, whose tables ({table_bytes:,} bytes) no TPU core's scalar memory holds. Choose a "
            f"length that {_LARGEST_BLOCK} divides, or a shorter one."
        )
    compute = _largest_divisor(block, 512)
    return kernel_lib.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=compute,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=compute,
        block_q_dq=block,
        block_kv_dq=block,
    )


def _largest_divisor(length: int, largest: int) -> int:
    """The largest multiple of 128 that divides `length` and is at most `largest`."""
    return next(size for size in range(largest - largest % _LANES, 0, -_LANES) if length % size == 0)


def _attend_local(
    q: Any, k: Any, v: Any, segment_ids: Any, sinks: Any, scores: Scores, blocks: Any, interpret: bool
) -> Any:
    """The rows and heads of one device."""
    length, num_heads = q.shape[1:3]
    # Positions count up in a segment, so that their distance is that of the places in the row.
    mask: mask_lib.Mask = mask_lib.CausalMask((length, length))
    if scores.window is not None:
        mask = mask_lib.LocalMask((length, length), (scores.window - 1, 0), 0)
    kernel = kernel_lib.make_splash_mha(
        mask_lib.MultiHeadMask([mask] * num_heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=scores.softcap,
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )

    def attend_row(q_NLH: Any, k_KLH: Any, v_KLH: Any, ids_L: Any) -> Any:
        return kernel(q_NLH, k_KLH, v_KLH, kernel_lib.SegmentIds(ids_L, ids_L), sinks)

    q_BNLH, k_BKLH, v_BKLH = (jnp.swapaxes(x, 1, 2) for x in (q * scores.scale, k, v))
    out_BLNH = jnp.swapaxes(jax.vmap(attend_row)(q_BNLH, k_BKLH, v_BKLH, segment_ids), 1, 2)
    return jnp.where(segment_ids[:, :, None, None] != 0, out_BLNH, 0)  # padding sees padding in there
