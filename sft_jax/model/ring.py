"""Attention of rows that are split over the `context` axis: keys and values go round the ring of its devices.

Causal attention over contiguous shares would leave the first device idle and the last with twice the mean. So each row
is cut into 2C chunks for C devices, and device c works on chunks c and 2C - 1 - c; with C = 4

    device      0     1     2     3
    holds      0 1   2 3   4 5   6 7      as everything around attention does
    works on   0 7   1 6   2 5   3 4      its queries see the keys of every other device in two of four pairs of chunks

Its own keys a device's queries see causally. Of a device before it in the ring they see all the first chunk, of one
behind it the second of its own chunks sees both: the same work for all, in kernels without a mask.

Every part's output comes with the log of its sum of exponentials, by which parts are joined. The backward pass goes
round once more: gradients of keys and values travel with them.

Source: Liu et al., Ring Attention with Blockwise Transformers, https://arxiv.org/abs/2310.01889
"""

import functools
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
    softcap: float | None
    interpret: bool


class _Keys(NamedTuple):
    """What goes round: keys and values [b, K, M, H], and their segments [b, M]."""

    k: Any
    v: Any
    segment_ids: Any


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
      ConfigError: for windows and sinks, and for what `splash` refuses.
    """
    interpret = is_interpreted("splash", "tpu", q, mesh)
    size, length = mesh.shape[_AXIS], q.shape[1]
    if scores.window is not None or sinks is not None:
        what = "windows" if scores.window is not None else "attention sinks"
        raise ConfigError(
            f"config.mesh.context: is {size}, and this model has {what}, which the ring of config.model.attention "
            "'splash' does not do. Set it to 1, or config.model.attention to 'reference'."
        )
    if length % (2 * size * 128):
        raise ConfigError(
            f"config.data.max_seq_len: is {length}; config.model.attention 'splash' over config.mesh.context = {size} "
            f"needs a multiple of {2 * size * 128}. Set {-(-length // (2 * size * 128)) * 2 * size * 128}."
        )
    ring = _Ring(size, scores.softcap, interpret)

    def attend_local(q_BLNH: Any, k_BLKH: Any, v_BLKH: Any, segment_ids_BL: Any) -> Any:
        heads_first = (jnp.swapaxes(x, 1, 2) for x in (q_BLNH * scores.scale, k_BLKH, v_BLKH))
        out_BLNH = jnp.swapaxes(_attend(ring, *heads_first, segment_ids_BL), 1, 2)
        return jnp.where(segment_ids_BL[:, :, None, None] != 0, out_BLNH, 0)  # padding sees padding in there

    heads, tokens = P(BATCH_AXES, _AXIS, "tensor", None), P(BATCH_AXES, _AXIS)
    specs = (heads, heads, heads, tokens)
    return jax.shard_map(attend_local, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)(
        q, k, v, rows.segment_ids
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring: _Ring, q: Any, k: Any, v: Any, segment_ids: Any) -> Any:
    return _attend_fwd(ring, q, k, v, segment_ids)[0]


def _attend_fwd(ring: _Ring, q: Any, k: Any, v: Any, segment_ids: Any) -> Any:
    q, k, v = (_balance(x, ring, 2) for x in (q, k, v))
    segment_ids = _balance(segment_ids, ring, 1)
    own = _Keys(k, v, segment_ids)
    out, log_sum = _run(_causal(ring, q), q, segment_ids, own)
    wide = (out.astype(jnp.float32), log_sum)

    def take_turn(carry: Any, turn: Any) -> Any:
        (out, log_sum), keys = carry
        keys = _pass_on(keys, ring)
        is_before = turn <= jax.lax.axis_index(_AXIS)
        before, behind = (functools.partial(run, ring) for run in (_from_before, _from_behind))
        part, part_sum = jax.lax.cond(is_before, before, behind, q, segment_ids, keys)
        total = jnp.logaddexp(log_sum, part_sum)
        joined = out * jnp.exp(log_sum - total)[..., None] + part * jnp.exp(part_sum - total)[..., None]
        return ((joined, total), keys), None

    (((out, log_sum), _), _) = jax.lax.scan(take_turn, (wide, own), jnp.arange(1, ring.size))
    out, log_sum = checkpoint_name((out.astype(q.dtype), log_sum), ATTENTION)
    return _restore(out, ring, 2), (q, own, out, log_sum)


def _attend_bwd(ring: _Ring, saved: Any, out_grad: Any) -> Any:
    q, own, out, log_sum = saved
    out_grad = _balance(out_grad, ring, 2)
    grads = _run_back(_causal(ring, q), q, own.segment_ids, own, out, log_sum, out_grad)
    q_grad, *key_grads = (grad.astype(jnp.float32) for grad in grads)

    def take_turn(carry: Any, turn: Any) -> Any:
        q_grad, key_grads, keys = carry
        keys, key_grads = _pass_on(keys, ring), _pass_on(key_grads, ring)
        is_before = turn <= jax.lax.axis_index(_AXIS)
        before, behind = (functools.partial(run, ring) for run in (_back_from_before, _back_from_behind))
        parts = jax.lax.cond(is_before, before, behind, q, own.segment_ids, keys, out, log_sum, out_grad)
        q_grad, *key_grads = (grad + part for grad, part in zip((q_grad, *key_grads), parts, strict=True))
        return (q_grad, key_grads, keys), None

    carry = (q_grad, key_grads, own)
    (q_grad, key_grads, _), _ = jax.lax.scan(take_turn, carry, jnp.arange(1, ring.size))
    grads = (q_grad, *_pass_on(key_grads, ring))  # home
    q_grad, k_grad, v_grad = (_restore(grad, ring, 2) for grad in grads)
    return q_grad.astype(q.dtype), k_grad.astype(own.k.dtype), v_grad.astype(own.v.dtype), None


_attend.defvjp(_attend_fwd, _attend_bwd)


# --- One pair of devices ----------------------------------------------------------------------------------------------


def _from_before(ring: _Ring, q: Any, segment_ids: Any, keys: _Keys) -> Any:
    """All queries on the first chunk of keys of a device before this one."""
    keys = _Keys(_half(keys.k, 0, 2), _half(keys.v, 0, 2), _half(keys.segment_ids, 0, 1))
    out, log_sum = _run(_full(ring, q, keys), q, segment_ids, keys)
    return out.astype(jnp.float32), log_sum


def _from_behind(ring: _Ring, q: Any, segment_ids: Any, keys: _Keys) -> Any:
    """The second chunk of queries on all keys of a device behind this one."""
    late = _half(q, 1, 2)
    out, log_sum = _run(_full(ring, late, keys), late, _half(segment_ids, 1, 1), keys)
    nothing = jnp.full_like(log_sum, kernel_lib.DEFAULT_MASK_VALUE)
    return _after_zeros(out), jnp.concatenate([nothing, log_sum], axis=2)


def _back_from_before(ring: _Ring, q: Any, segment_ids: Any, keys: _Keys, out: Any, log_sum: Any, out_grad: Any) -> Any:
    keys = _Keys(_half(keys.k, 0, 2), _half(keys.v, 0, 2), _half(keys.segment_ids, 0, 1))
    q_grad, *key_grads = _run_back(_full(ring, q, keys), q, segment_ids, keys, out, log_sum, out_grad)
    before_zeros = (jnp.concatenate([grad, jnp.zeros_like(grad)], axis=2) for grad in key_grads)
    return tuple(grad.astype(jnp.float32) for grad in (q_grad, *before_zeros))


def _back_from_behind(ring: _Ring, q: Any, segment_ids: Any, keys: _Keys, out: Any, log_sum: Any, out_grad: Any) -> Any:
    late, out, log_sum, out_grad = (_half(x, 1, 2) for x in (q, out, log_sum, out_grad))
    kernel = _full(ring, late, keys)
    q_grad, *key_grads = _run_back(kernel, late, _half(segment_ids, 1, 1), keys, out, log_sum, out_grad)
    return _after_zeros(q_grad), *(grad.astype(jnp.float32) for grad in key_grads)


def _after_zeros(x: Any) -> Any:
    return jnp.concatenate([jnp.zeros_like(x), x], axis=2).astype(jnp.float32)


def _causal(ring: _Ring, q: Any) -> Any:
    length = q.shape[2]
    return _make_kernel(ring, q.shape[1], mask_lib.CausalMask((length, length)), length // 2)


def _full(ring: _Ring, q: Any, keys: _Keys) -> Any:
    shape = (q.shape[2], keys.k.shape[2])
    return _make_kernel(ring, q.shape[1], mask_lib.FullMask(shape), min(shape))


def _make_kernel(ring: _Ring, num_heads: int, mask: mask_lib.Mask, chunk: int) -> Any:
    return kernel_lib.make_splash_mha(
        mask_lib.MultiHeadMask([mask] * num_heads),
        block_sizes=choose_blocks(chunk, None),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=ring.softcap,
        save_residuals=True,
        interpret=ring.interpret,
    )


def _run(kernel: Any, q: Any, segment_ids: Any, keys: _Keys) -> tuple[Any, Any]:
    """(mixed values [b, N, L, H], log of the sums of exponentials [b, N, L]). Where a query sees no key, the first is
    finite and the second so low that nothing of it is left when it is joined."""

    def run_row(q: Any, ids: Any, keys: _Keys) -> Any:
        out, (log_sum,) = kernel(q, keys.k, keys.v, kernel_lib.SegmentIds(ids, keys.segment_ids))
        return out, log_sum

    return jax.vmap(run_row)(q, segment_ids, keys)


def _run_back(kernel: Any, q: Any, segment_ids: Any, keys: _Keys, out: Any, log_sum: Any, out_grad: Any) -> Any:
    """Gradients of q, k and v by these keys alone; `out` and `log_sum` are those of all keys together, which is what
    the kernel's own rule for its gradient would not take: hence its private name."""
    static = {**kernel.kwargs, "save_residuals": False}

    def run_row(q: Any, ids: Any, keys: _Keys, out: Any, log_sum: Any, out_grad: Any) -> Any:
        ids = kernel_lib.SegmentIds(ids, keys.segment_ids)
        residuals = (q, keys.k, keys.v, ids, None, out, log_sum, kernel.dq_mask_info, kernel.dkv_mask_info)
        return kernel_lib._splash_attention_bwd(**static, res=residuals, do=out_grad)[3:6]

    return jax.vmap(run_row)(q, segment_ids, keys, out, log_sum, out_grad)


# --- Around the ring --------------------------------------------------------------------------------------------------


def _pass_on(tree: Any, ring: _Ring) -> Any:
    """To the next device: after t turns, what came from t devices before."""
    return jax.lax.ppermute(tree, _AXIS, [(c, (c + 1) % ring.size) for c in range(ring.size)])


def _half(x: Any, which: int, dim: int) -> Any:
    return jnp.split(x, 2, axis=dim)[which]


def _balance(x: Any, ring: _Ring, dim: int) -> Any:
    """The two chunks that this device holds of a row -> the two that it works on. The even chunks of all devices go to
    different devices, and so do the odd ones."""
    even, odd = (jax.lax.ppermute(_half(x, which, dim), _AXIS, _moves(ring.size, which)) for which in (0, 1))
    low_is_even = jax.lax.axis_index(_AXIS) % 2 == 0
    first, second = jnp.where(low_is_even, even, odd), jnp.where(low_is_even, odd, even)
    return jnp.concatenate([first, second], axis=dim)


def _restore(x: Any, ring: _Ring, dim: int) -> Any:
    """The way back."""
    first, second = _half(x, 0, dim), _half(x, 1, dim)
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
