"""Attention of rows that are split over the `context` axis: keys and values go round the ring of its devices.

Causal attention over contiguous shares would leave the first device idle and the last with twice the mean. So each row
is cut into 2C chunks for C devices, and device c works on chunks c and 2C - 1 - c; with C = 4

    device      0     1     2     3
    holds      0 1   2 3   4 5   6 7      as everything around attention does
    works on   0 7   1 6   2 5   3 4      its queries see the keys of every other device in two of four pairs of chunks

Each of its own chunks it sees causally, and by the second all of the first. Of a device before it in the ring both of
its chunks see all the first chunk; of one behind it the second of its own chunks sees both: the same work for all, in
kernels without a mask.

With a window, pairs of chunks may also lie wholly or partly outside of it, by how many chunks apart they are. Each of
the few masks has its kernel, of which a device runs the one that it needs, or none. No device meets another from which
all the queries of both are too far; with C = 16 and a window of no more than a chunk it meets its two neighbours alone:

    turn 1     comes the device before, whose first chunk its own first sees
    turn 14    in one move: nothing of what lies between is seen
    turn 15    comes the device behind, whose second chunk its own second sees

Every part's output comes with the log of its sum of exponentials, by which parts are joined, and sinks at the end. The
backward pass goes round once more: gradients of keys and values travel with them.

Source: Liu et al., Ring Attention with Blockwise Transformers, https://arxiv.org/abs/2310.01889
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from sft_jax.datatypes import ConfigError
from sft_jax.model.attention import Rows, Scores, is_interpreted
from sft_jax.model.remat import ATTENTION
from sft_jax.model.splash import choose_blocks
from sft_jax.sharding import BATCH_AXES
from sft_jax.typing import Array, Float

_AXIS = "context"


class _Ring(NamedTuple):
    """What is known when the program is traced."""

    size: int
    window: int | None
    softcap: float | None
    interpret: bool


class _Keys(NamedTuple):
    """What goes round: keys and values [2, b, K, S, H] of two chunks, and their segments [2, b, S]."""

    k: Any
    v: Any
    segment_ids: Any


class _Pair(NamedTuple):
    """Which of this device's two chunks of queries meets which of another's two of keys, and how many chunks back."""

    queries: Any
    keys: Any
    distance: Any


def attend_ring(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B L K H"],
    v: Float[Array, "B L K Hv"],
    rows: Rows,
    scores: Scores,
    sinks: Float[Array, " N"] | None,
    mesh: Mesh | AbstractMesh,
) -> Float[Array, "B L N Hv"]:
    """Arguments as in `attention.attend`; each row in equal shares over the axis `context` of the mesh.

    Raises:
      ConfigError: for what `splash` refuses.
    """
    interpret = is_interpreted("splash", "tpu", q, mesh)
    size, length = mesh.shape[_AXIS], q.shape[1]
    if length % (2 * size * 128):
        raise ConfigError(
            f"config.data.max_seq_len: is {length}; config.model.attention 'splash' over config.mesh.context = {size} "
            f"needs a multiple of {2 * size * 128}. Set {-(-length // (2 * size * 128)) * 2 * size * 128}."
        )
    ring = _Ring(size, scores.window, scores.softcap, interpret)

    def attend_local(q_BLNH: Any, k_BLKH: Any, v_BLKH: Any, segment_ids_BL: Any, sinks_N: Any) -> Any:
        heads_first = (jnp.swapaxes(x, 1, 2) for x in (q_BLNH * scores.scale, k_BLKH, v_BLKH))
        out_BLNH = jnp.swapaxes(_attend(ring, *heads_first, segment_ids_BL, sinks_N), 1, 2)
        return jnp.where(segment_ids_BL[:, :, None, None] != 0, out_BLNH, 0)  # padding sees padding in there

    heads, tokens = P(BATCH_AXES, _AXIS, "tensor", None), P(BATCH_AXES, _AXIS)
    specs = (heads, heads, heads, tokens, None if sinks is None else P("tensor"))
    return jax.shard_map(attend_local, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)(
        q, k, v, rows.segment_ids, sinks
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring: _Ring, q: Any, k: Any, v: Any, segment_ids: Any, sinks: Any) -> Any:
    return _attend_fwd(ring, q, k, v, segment_ids, sinks)[0]


def _attend_fwd(ring: _Ring, q: Any, k: Any, v: Any, segment_ids: Any, sinks: Any) -> Any:
    q, k, v = (_balance(x, ring, 2) for x in (q, k, v))
    own = _Keys(k, v, _balance(segment_ids, ring, 1))

    def meet(pair: _Pair, wide: Any, keys: _Keys) -> Any:
        args = _take((q, own.segment_ids), pair.queries), _take(keys, pair.keys)
        part, part_sum = _by_distance(ring, q.shape[3], pair.distance, _run, *args)
        out, log_sum = _take(wide, pair.queries)
        total = jnp.logaddexp(log_sum, part_sum)
        joined = out * jnp.exp(log_sum - total)[..., None] + part * jnp.exp(part_sum - total)[..., None]
        return _put(wide, (joined, total), pair.queries), keys

    on_itself = functools.partial(_run, ring, _make_mask(ring, 0, q.shape[3]))
    out, log_sum = jax.vmap(on_itself)((q, own.segment_ids), own)
    out, log_sum = _go_round(ring, q.shape[3], meet, (out.astype(jnp.float32), log_sum), own)[0]
    if sinks is not None:
        total = jnp.logaddexp(log_sum, sinks.astype(jnp.float32)[None, None, :, None])
        out, log_sum = out * jnp.exp(log_sum - total)[..., None], total
    out, log_sum = checkpoint_name((out.astype(q.dtype), log_sum), ATTENTION)
    return _restore(out, ring, 2), (q, own, sinks, out, log_sum)


def _attend_bwd(ring: _Ring, saved: Any, out_grad: Any) -> Any:
    q, own, sinks, out, log_sum = saved
    out_grad = _balance(out_grad, ring, 2)
    given = (q, own.segment_ids, out, log_sum, out_grad)

    def meet(pair: _Pair, q_grad: Any, moving: Any) -> Any:
        keys, key_grads = moving
        args = _take(given, pair.queries), _take(keys, pair.keys)
        q_part, *key_parts = _by_distance(ring, q.shape[3], pair.distance, _run_back, *args)
        q_grad = _put(q_grad, _take(q_grad, pair.queries) + q_part, pair.queries)
        added = jax.tree.map(jnp.add, _take(key_grads, pair.keys), key_parts)
        return q_grad, (keys, _put(key_grads, added, pair.keys))

    on_itself = functools.partial(_run_back, ring, _make_mask(ring, 0, q.shape[3]))
    q_grad, *key_grads = (grad.astype(jnp.float32) for grad in jax.vmap(on_itself)(given, own))
    q_grad, (_, key_grads) = _go_round(ring, q.shape[3], meet, q_grad, (own, key_grads))
    grads = (q_grad, *_pass_on(key_grads, ring))  # home
    q_grad, k_grad, v_grad = (_restore(grad, ring, 2) for grad in grads)
    sinks_grad = None
    if sinks is not None:
        taken = jnp.exp(sinks.astype(jnp.float32)[None, None, :, None] - log_sum)  # the sink's share, [2, b, N, S]
        mixed_grad = jnp.sum(out.astype(jnp.float32) * out_grad, axis=-1)
        sinks_grad = -jnp.sum(taken * mixed_grad, axis=(0, 1, 3)).astype(sinks.dtype)
    return q_grad.astype(q.dtype), k_grad.astype(own.k.dtype), v_grad.astype(own.v.dtype), None, sinks_grad


_attend.defvjp(_attend_fwd, _attend_bwd)


# --- One pair of chunks -----------------------------------------------------------------------------------------------


def _by_distance(ring: _Ring, chunk: int, distance: Any, run: Callable[..., Any], *args: Any) -> Any:
    """`run` by the mask of queries on keys so many chunks back, at least one."""
    masks = [_make_mask(ring, back, chunk) for back in range(1, 2 * ring.size)]
    kinds = list(dict.fromkeys(masks))
    which = jnp.array([kinds.index(mask) for mask in masks])[distance - 1]
    return jax.lax.switch(which, [functools.partial(run, ring, mask) for mask in kinds], *args)


def _make_mask(ring: _Ring, distance: int, chunk: int) -> mask_lib.Mask | None:
    """Of the queries of a chunk on the keys of the one so many before it; None: they see nothing."""
    shape = (chunk, chunk)
    if distance > _farthest(ring, chunk):
        return None
    if ring.window is None or (distance + 1) * chunk <= ring.window:
        return mask_lib.FullMask(shape) if distance else mask_lib.CausalMask(shape)
    return mask_lib.LocalMask(shape, (ring.window - 1, None if distance else 0), distance * chunk)


def _farthest(ring: _Ring, chunk: int) -> int:
    """How many chunks back the first query of a chunk sees a key."""
    most = 2 * ring.size - 1
    return most if ring.window is None else min(most, (ring.window - 2) // chunk + 1)


def _make_kernel(ring: _Ring, num_heads: int, mask: mask_lib.Mask) -> Any:
    window = ring.window if isinstance(mask, mask_lib.LocalMask) else None
    return kernel_lib.make_splash_mha(
        mask_lib.MultiHeadMask([mask] * num_heads),
        block_sizes=choose_blocks(mask.shape[0], window),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=ring.softcap,
        save_residuals=True,
        interpret=ring.interpret,
    )


def _run(ring: _Ring, mask: mask_lib.Mask | None, given: Any, keys: _Keys) -> tuple[Any, Any]:
    """(mixed values [b, N, S, H], log of the sums of exponentials [b, N, S]). Where a query sees no key, the first is
    finite and the second so low that nothing of it is left when it is joined."""
    q, segment_ids = given
    if mask is None:
        out = jnp.zeros((*q.shape[:3], keys.v.shape[3]), q.dtype)
        return out, jnp.full(q.shape[:3], kernel_lib.DEFAULT_MASK_VALUE, jnp.float32)
    kernel = _make_kernel(ring, q.shape[1], mask)

    def run_row(q: Any, ids: Any, keys: _Keys) -> Any:
        out, (log_sum,) = kernel(q, keys.k, keys.v, kernel_lib.SegmentIds(ids, keys.segment_ids))
        # Of a block of queries with no block of keys the kernel divides nothing by nothing.
        return jnp.where(jnp.isfinite(log_sum)[..., None], out, 0), log_sum

    return jax.vmap(run_row)(q, segment_ids, keys)


def _run_back(ring: _Ring, mask: mask_lib.Mask | None, given: Any, keys: _Keys) -> tuple[Any, Any, Any]:
    """Gradients of q, k and v by these keys alone; of what is given, mixed values and the log of their sum are those of
    all keys together, which is what the kernel's own rule for its gradient would not take: hence its private name."""
    q, segment_ids, out, log_sum, out_grad = given
    if mask is None:
        return jnp.zeros_like(q), jnp.zeros_like(keys.k), jnp.zeros_like(keys.v)
    kernel = _make_kernel(ring, q.shape[1], mask)
    static = {**kernel.kwargs, "save_residuals": False}

    def run_row(q: Any, ids: Any, keys: _Keys, out: Any, log_sum: Any, out_grad: Any) -> Any:
        ids = kernel_lib.SegmentIds(ids, keys.segment_ids)
        residuals = (q, keys.k, keys.v, ids, None, out, log_sum, kernel.dq_mask_info, kernel.dkv_mask_info)
        return kernel_lib._splash_attention_bwd(**static, res=residuals, do=out_grad)[3:6]

    grads: tuple[Any, Any, Any] = jax.vmap(run_row)(q, segment_ids, keys, out, log_sum, out_grad)
    return grads


# --- Around the ring --------------------------------------------------------------------------------------------------


def _go_round(ring: _Ring, chunk: int, meet: Callable[..., Any], staying: Any, moving: Any) -> tuple[Any, Any]:
    """`meet(pair, staying, moving)` -> (staying, moving) for each pair of chunks of which one may see the other, those
    of this device included; `moving` ends at the device before its own."""
    device = jax.lax.axis_index(_AXIS)

    def take_turn(carry: Any, turn: Any) -> Any:
        staying, moving = carry
        moving = _pass_on(moving, ring)
        other = (device - turn) % ring.size
        same = jnp.where(turn <= device, 0, 1)  # the first chunks of both, or the second
        for pair in (_Pair(1, 0, 2 * ring.size - 1 - device - other), _Pair(same, same, jnp.abs(device - other))):
            staying, moving = meet(pair, staying, moving)
        return (staying, moving), None

    carry = meet(_Pair(1, 0, 2 * (ring.size - device) - 1), staying, moving)
    # The nearest chunks of two devices are as far apart as the devices are in the row: turn, or size - turn.
    reach = _farthest(ring, chunk)
    skipped = ring.size - 1 - 2 * reach
    if skipped <= 0:
        return jax.lax.scan(take_turn, carry, jnp.arange(1, ring.size))[0]
    staying, moving = jax.lax.scan(take_turn, carry, jnp.arange(1, reach + 1))[0]
    carry = staying, _pass_on(moving, ring, skipped)
    return jax.lax.scan(take_turn, carry, jnp.arange(ring.size - reach, ring.size))[0]


def _pass_on(tree: Any, ring: _Ring, by: int = 1) -> Any:
    """To a device behind: after t turns, what came from t devices before."""
    return jax.lax.ppermute(tree, _AXIS, [(c, (c + by) % ring.size) for c in range(ring.size)])


def _take(tree: Any, which: Any) -> Any:
    """One of two chunks."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, which, keepdims=False), tree)


def _put(tree: Any, chunk: Any, which: Any) -> Any:
    return jax.tree.map(lambda x, part: jax.lax.dynamic_update_index_in_dim(x, part, which, 0), tree, chunk)


def _balance(x: Any, ring: _Ring, dim: int) -> Any:
    """The two chunks that this device holds of a row -> the two that it works on, stacked in front. The even chunks of
    all devices go to different devices, and so do the odd ones."""
    halves = enumerate(jnp.split(x, 2, axis=dim))
    even, odd = (jax.lax.ppermute(half, _AXIS, _moves(ring.size, which)) for which, half in halves)
    low_is_even = jax.lax.axis_index(_AXIS) % 2 == 0
    return jnp.stack([jnp.where(low_is_even, even, odd), jnp.where(low_is_even, odd, even)])


def _restore(x: Any, ring: _Ring, dim: int) -> Any:
    """The way back."""
    first, second = x
    low_is_even = jax.lax.axis_index(_AXIS) % 2 == 0
    even, odd = jnp.where(low_is_even, first, second), jnp.where(low_is_even, second, first)
    back = (
        jax.lax.ppermute(chunk, _AXIS, [(end, start) for start, end in _moves(ring.size, which)])
        for which, chunk in enumerate((even, odd))
    )
    return jnp.concatenate(list(back), axis=dim)


def _moves(size: int, which: int) -> list[tuple[int, int]]:
    """(from, to) of chunk 2 * device + which of every device."""
    chunks = [2 * device + which for device in range(size)]
    return [(device, min(chunk, 2 * size - 1 - chunk)) for device, chunk in enumerate(chunks)]
