"""Hidden states and targets in, sums of cross-entropy out. No [B, L, V] array exists, forward or backward.

On each device positions are ordered with the supervised ones first, and only the chunks that hold any go through the
output head. With chunks of 2, most positions of weight 0 cost nothing:

    loss_weights   0 1 0 0 1 1      order   1 4 | 5 0 | 2 3      chunks run: 2 of 3

Each chunk makes its logits, their loss and its gradients at once, so the backward pass recomputes no logit: it scales
the stored gradients by the cotangent of `loss_sum`. The vocabulary may be split over the `tensor` axis.

Order matters in the collectives. The head is gathered before the loop and its gradient reduced after it; inside the
loop only the `tensor` axis communicates. Shards of the batch run different numbers of chunks, so a collective over a
batch axis in there would deadlock; along `tensor` the number is the same.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from sft_jax.config_schema import LossConfig
from sft_jax.model.gradient_sums import scatter_sum
from sft_jax.model.logits import PLAIN_LOGITS, LogitShape
from sft_jax.model.router import RouterSums
from sft_jax.sharding import BATCH_AXES
from sft_jax.typing import Array, Float, Int

TOKEN_AXES = (*BATCH_AXES, "context")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """Sums over all positions of the global batch. Their quotient is taken once, in the step."""

    loss_sum: Any  # scalar: weighted cross-entropy in nats, smoothing and z-loss included
    weight_sum: Any  # scalar
    nll: Any  # [B, L]: -log p(target), unweighted; 0 where the weight is 0
    correct: Any  # bool [B, L]: no token is likelier than the target; False where the weight is 0
    router: RouterSums | None = None  # over the choices of experts, where the model has any


def sum_cross_entropy(
    hidden: Float[Array, "B L D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "B L"],
    loss_weights: Float[Array, "B L"],
    config: LossConfig,
    mesh: Mesh | AbstractMesh | None = None,
    logit_shape: LogitShape = PLAIN_LOGITS,
) -> LossSums:
    """Weighted cross-entropy of `targets` under the logits of `hidden @ head.T`, in float32 or wider.

    Per position, with p the softmax, Z its normaliser, s `label_smoothing` and z `z_loss_weight`:

        weight * ((1 - s) * -log p[target] + s * mean_v(-log p[v]) + z * log(Z)^2)

    Gradients flow from `loss_sum` to `hidden` and `head`; nothing else is differentiable.

    Args:
      mesh: splits rows over the batch axes and the vocabulary over `tensor`; None: one device.
      logit_shape: how the model makes logits of the products.
    """
    return _sums(hidden, head, targets, loss_weights, config, mesh, logit_shape)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _sums(hidden: Any, head: Any, targets: Any, weights: Any, config: LossConfig, mesh: Any, shape: Any) -> LossSums:
    return _run(hidden, head, targets, weights, config, mesh, shape, with_grads=False)[0]


def _sums_fwd(hidden: Any, head: Any, targets: Any, weights: Any, config: LossConfig, mesh: Any, shape: Any) -> Any:
    return _run(hidden, head, targets, weights, config, mesh, shape, with_grads=True)


def _sums_bwd(config: LossConfig, mesh: Any, shape: Any, grads: tuple[Array, Array], cotangent: LossSums) -> Any:
    hidden_grad, head_grad = grads
    scale = cotangent.loss_sum
    return (hidden_grad * scale).astype(hidden_grad.dtype), (head_grad * scale).astype(head_grad.dtype), None, None


_sums.defvjp(_sums_fwd, _sums_bwd)


def _run(
    hidden: Any, head: Any, targets: Any, weights: Any, config: LossConfig, mesh: Any, shape: Any, with_grads: bool
) -> Any:
    """(LossSums, (gradient of hidden, gradient of head) or None), over the mesh or on one device."""
    local = partial(_local_sums, config=config, mesh=mesh, logit_shape=shape, with_grads=with_grads)
    if mesh is None:
        return local(hidden, head, targets, weights)
    tokens, vocab = P(BATCH_AXES, "context"), P("tensor", None)
    sums = LossSums(loss_sum=P(), weight_sum=P(), nll=tokens, correct=tokens)
    grads = (P(*tokens, None), P("tensor", "fsdp")) if with_grads else None
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(*tokens, None), vocab, tokens, tokens),
        out_specs=(sums, grads),
        check_vma=False,  # the collectives below are explicit, and nothing differentiates through them
    )(hidden, head, targets, weights)


def _local_sums(
    hidden_BLD: Any,
    head_VD: Any,
    targets_BL: Any,
    weights_BL: Any,
    config: LossConfig,
    mesh: Any,
    logit_shape: LogitShape,
    with_grads: bool,
) -> Any:
    """The work of one device: all of its positions against its rows of the head."""
    dtype = jnp.promote_types(hidden_BLD.dtype, jnp.float32)  # exponentials and sums of bfloat16 lose the loss
    shape, embed_dim = targets_BL.shape, hidden_BLD.shape[-1]
    hidden_TD = hidden_BLD.reshape(-1, embed_dim)
    targets_T, weights_T = targets_BL.reshape(-1), weights_BL.reshape(-1).astype(dtype)
    num_tokens, vocab_rows = len(targets_T), len(head_VD)
    parts = mesh.shape["tensor"] if mesh else 1
    first_id = jax.lax.axis_index("tensor") * vocab_rows if parts > 1 else 0
    vocab_size = vocab_rows * parts

    def over_vocab(reduce: Any, x: Array) -> Array:
        return reduce(x, "tensor") if parts > 1 else x

    chunk = min(config.chunk_tokens, num_tokens)
    supervised = weights_T != 0
    num_chunks = -(-jnp.sum(supervised) // chunk)
    # Supervised positions first; filled to whole chunks with an index past the end: reads there give 0, writes nothing.
    order = jnp.pad(jnp.argsort(~supervised, stable=True), (0, -num_tokens % chunk), constant_values=num_tokens)

    def run_chunk(i: Array, carry: dict[str, Array]) -> dict[str, Array]:
        picked = jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk)
        hidden_CD = hidden_TD.at[picked].get(mode="fill", fill_value=0)
        weights_C = weights_T.at[picked].get(mode="fill", fill_value=0)
        ids_C = targets_T.at[picked].get(mode="fill", fill_value=0) - first_id
        products_CV = jax.lax.dot_general(hidden_CD, head_VD, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
        logits_CV = logit_shape.apply(products_CV)

        max_C = over_vocab(jax.lax.pmax, jnp.max(logits_CV, axis=-1))
        exp_CV = jnp.exp(logits_CV - max_C[:, None])
        sum_C = over_vocab(jax.lax.psum, jnp.sum(exp_CV, axis=-1))
        log_z_C = max_C + jnp.log(sum_C)
        here_C = (ids_C >= 0) & (ids_C < vocab_rows)
        picked_logits_C = jnp.take_along_axis(logits_CV, jnp.clip(ids_C, 0, vocab_rows - 1)[:, None], axis=-1)[:, 0]
        target_C = over_vocab(jax.lax.psum, jnp.where(here_C, picked_logits_C, 0))
        nll_C = log_z_C - target_C
        loss_C = nll_C
        smoothing, z_weight = config.label_smoothing, config.z_loss_weight
        if smoothing:
            mean_C = over_vocab(jax.lax.psum, jnp.sum(logits_CV, axis=-1)) / vocab_size
            loss_C = (1 - smoothing) * nll_C + smoothing * (log_z_C - mean_C)
        if z_weight:
            loss_C = loss_C + z_weight * log_z_C**2
        live_C = weights_C != 0
        carry |= {
            "loss_sum": carry["loss_sum"] + jnp.sum(weights_C * loss_C),
            "nll": carry["nll"].at[picked].set(jnp.where(live_C, nll_C, 0), mode="drop"),
            "correct": carry["correct"].at[picked].set(live_C & (target_C >= max_C), mode="drop"),
        }
        if not with_grads:
            return carry
        # d loss / d logits = p * (1 + 2 z log Z) - (1 - s) * onehot(target) - s / V, each times the weight.
        factor_C = weights_C * (1 + 2 * z_weight * log_z_C) / sum_C
        is_target_CV = jnp.arange(vocab_rows)[None, :] == jnp.where(here_C, ids_C, -1)[:, None]
        grad_CV = exp_CV * factor_C[:, None] - jnp.where(is_target_CV, ((1 - smoothing) * weights_C)[:, None], 0)
        if smoothing:
            grad_CV = grad_CV - (smoothing / vocab_size * weights_C)[:, None]
        # Matmuls of the backward pass run in the compute dtype, like the forward.
        grad_CV = logit_shape.pull_back(grad_CV, logits_CV).astype(head_VD.dtype)
        hidden_grad_CD = over_vocab(jax.lax.psum, jnp.dot(grad_CV, head_VD, preferred_element_type=dtype))
        head_grad_VD = jax.lax.dot_general(grad_CV, hidden_CD, (((0,), (0,)), ((), ())), preferred_element_type=dtype)
        return carry | {
            "hidden_grad": carry["hidden_grad"].at[picked].set(hidden_grad_CD.astype(hidden_TD.dtype), mode="drop"),
            "head_grad": carry["head_grad"] + head_grad_VD,
        }

    start = {
        "loss_sum": jnp.zeros((), dtype),
        "nll": jnp.zeros(num_tokens, dtype),
        "correct": jnp.zeros(num_tokens, bool),
    }
    if with_grads:
        start |= {"hidden_grad": jnp.zeros_like(hidden_TD), "head_grad": jnp.zeros(head_VD.shape, dtype)}
    end = jax.lax.fori_loop(0, num_chunks, run_chunk, start)

    totals = jnp.stack([end["loss_sum"], jnp.sum(weights_T)])
    totals = jax.lax.psum(totals, TOKEN_AXES) if mesh else totals
    sums = LossSums(totals[0], totals[1], end["nll"].reshape(shape), end["correct"].reshape(shape))
    if not with_grads:
        return sums, None
    head_grad = end["head_grad"]
    if mesh:
        head_grad = scatter_sum(head_grad, 1, mesh)
    # The backward pass of the layers waits for both. Else the head's gradient is cut to this device's part only where
    # the optimizer reads it, and all of it stays in memory until then: 3.9 GiB of Llama-3.1-70B.
    return sums, jax.lax.optimization_barrier(
        (end["hidden_grad"].reshape(hidden_BLD.shape), head_grad.astype(head_VD.dtype))
    )
