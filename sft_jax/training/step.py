"""One optimizer step: batch in, new state and metrics out. The only place that divides by `weight_sum`."""

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh

from sft_jax.config_schema import Config, LossConfig
from sft_jax.datatypes import ConfigError
from sft_jax.model.adapter_use import AdapterDropout, AdapterUse
from sft_jax.model.families import TransformerConfig, find_moe
from sft_jax.model.router import RouterSums
from sft_jax.model.transformer import EmbeddingNoise, Params, forward_and_route, output_head
from sft_jax.sharding import Batch, constrain
from sft_jax.training.loss import LossSums, sum_cross_entropy
from sft_jax.training.state import TrainState
from sft_jax.training.update import update_all, update_by_layers
from sft_jax.typing import Array

Metrics = dict[str, Array]
StepFn = Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]
GradientFn = Callable[[Params, Params, Batch], tuple[Params, LossSums]]


def make_train_step(
    config: Config,
    model: TransformerConfig,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh | AbstractMesh | None,
    num_sources: int = 1,
) -> StepFn:
    """`(state, frozen, batch) -> (state, metrics)`, to be jitted with the state donated.

    Gradients of *sums* are added over microbatches and divided once by the global weight, so microbatches, packing and
    the mesh do not change the update. Losses of routers over all tokens have another divisor: their sums are multiplied
    by the quotient of the two. A step whose loss, gradient or update is not finite changes nothing but `step`
    and `num_skipped`: old values are selected, not multiplied by zero, so that NaN cannot leak.
    """
    check_router_losses(config.loss, model)
    sum_grads = make_gradients(config, model, mesh)

    def train_step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, sums = sum_grads(state.params, frozen, batch)
        grads = jax.tree.map(lambda grad: grad / sums.weight_sum, grads)
        loss = sums.loss_sum / sums.weight_sum

        grad_norm = optax.tree.norm(grads)
        clip = config.optimizer.grad_clip_norm
        scale = jnp.minimum(1.0, clip / jnp.maximum(grad_norm, 1e-12)) if clip else 1.0
        grads = jax.tree.map(lambda grad: grad * scale, grads)

        learning_rate = jnp.asarray(schedule(state.num_updates))
        # A loss whose square overflows is none.
        finite = jnp.isfinite(loss * loss) & jnp.isfinite(grad_norm)
        update = update_by_layers if config.optimizer.offload else update_all
        params, opt_state, finite = update(
            optimizer, grads, state.opt_state, state.params, learning_rate=learning_rate, finite=finite
        )
        new = TrainState(
            step=state.step + 1,
            num_updates=state.num_updates + finite,
            num_skipped=jnp.where(finite, 0, state.num_skipped + 1),
            params=params,
            opt_state=opt_state,
        )
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "num_skipped": new.num_skipped,
            "num_tokens": jnp.sum(batch.segment_ids != 0),
            "padding_fraction": jnp.mean(batch.segment_ids == 0),
            **source_sums(sums, batch, num_sources),
            **(router_metrics(sums.router, jnp.sum(router_weights(batch, config))) if sums.router else {}),
        }
        return new, metrics

    return train_step


def make_gradients(config: Config, model: TransformerConfig, mesh: Mesh | AbstractMesh | None) -> GradientFn:
    """`(params, frozen, batch) -> (gradients of loss_sum over the batch, its LossSums)`."""
    sum_loss = partial(sum_batch_loss, config=config, model=model, mesh=mesh, noise_seed=config.run.seed)

    def sum_grads(params: Params, frozen: Params, batch: Batch) -> tuple[Params, LossSums]:
        router_weight = jnp.sum(router_weights(batch, config))
        router_scale = jnp.sum(batch.loss_weights.astype(router_weight.dtype)) / router_weight
        return _accumulate_grads(partial(sum_loss, router_scale=router_scale), params, frozen, batch, config, mesh)

    return sum_grads


def make_eval_step(
    config: Config, model: TransformerConfig, mesh: Mesh | AbstractMesh | None, num_sources: int = 1
) -> Callable[[Params, Params, Batch], Metrics]:
    """`(params, frozen, batch) -> source_sums`: plain cross-entropy, with no smoothing, z-loss or noise counted."""
    sum_loss = partial(sum_batch_loss, config=config, model=model, mesh=mesh, noise_seed=None)

    def eval_step(params: Params, frozen: Params, batch: Batch) -> Metrics:
        return source_sums(sum_loss(params, frozen, batch)[1], batch, num_sources)

    return eval_step


def sum_batch_loss(
    params: Params,
    frozen: Params,
    batch: Batch,
    *,
    config: Config,
    model: TransformerConfig,
    mesh: Mesh | AbstractMesh | None,
    noise_seed: int | None,
    router_scale: Array | None = None,
) -> tuple[Array, LossSums]:
    """(loss_sum with the router's losses, LossSums) of one microbatch.

    Args:
      noise_seed: noise is keyed by it and the global row, so no mesh or microbatch changes it; None: no noise.
      router_scale: multiplies the router's losses; None: they are left out.
    """
    dtype = jnp.dtype(config.model.compute_dtype)
    every = {**params, **frozen}
    noise, adapters = None, AdapterUse(config.lora.scale)
    if noise_seed is not None:
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(noise_seed)))(batch.rows)
        noise = EmbeddingNoise(keys, config.model.neftune_alpha) if config.model.neftune_alpha else None
        if config.lora.dropout:
            adapters = AdapterUse(config.lora.scale, AdapterDropout(keys, config.lora.dropout))
    hidden, router = forward_and_route(
        every,
        model,
        batch.inputs,
        batch.positions,
        batch.segment_ids,
        router_weights=None if router_scale is None else router_weights(batch, config),
        compute_dtype=dtype,
        remat=config.model.remat,
        attention=config.model.attention,
        mesh=mesh,
        noise=noise,
        adapters=adapters,
    )
    head = output_head(every).astype(dtype)
    sums = sum_cross_entropy(hidden, head, batch.targets, batch.loss_weights, config.loss, mesh, model.logit_shape)
    sums = dataclasses.replace(sums, router=router)
    if router is None or router_scale is None:
        return sums.loss_sum, sums
    balance, z_loss = jnp.mean(router.balance), jnp.mean(router.z_loss)  # over layers
    router_loss = config.loss.router_balance_weight * balance + config.loss.router_z_loss_weight * z_loss
    return sums.loss_sum + router_scale * router_loss, sums


def check_router_losses(config: LossConfig, model: TransformerConfig) -> None:
    """Raises ConfigError for a weight that nothing would have."""
    for name in ("router_balance_weight", "router_z_loss_weight"):
        if getattr(config, name) and find_moe(model) is None:
            raise ConfigError(
                f"config.loss.{name}: is {getattr(config, name)}, and the model ({model.family}) has no experts. Set "
                "it to 0."
            )


def router_weights(batch: Batch, config: Config) -> Array:
    """How much each token counts in the router's losses, [B, L]."""
    counted = batch.loss_weights if config.loss.router_tokens == "supervised" else batch.segment_ids != 0
    return counted.astype(jnp.promote_types(config.model.compute_dtype, jnp.float32))


def router_metrics(sums: RouterSums, weight: Array) -> Metrics:
    """Means over tokens and layers of the two losses, unweighted; and the load of experts, as multiples of an even one:
    the largest of any layer, and the share of experts that no token chose."""
    even = jnp.sum(sums.chosen, axis=-1, keepdims=True) / sums.chosen.shape[-1]
    return {
        "router/balance": jnp.mean(sums.balance) / weight,
        "router/z_loss": jnp.mean(sums.z_loss) / weight,
        "router/largest_load": jnp.max(sums.chosen / even),
        "router/idle_fraction": jnp.mean(sums.chosen == 0),
    }


def source_sums(sums: LossSums, batch: Batch, num_sources: int) -> Metrics:
    """Sums of weight, weighted nll and weighted hits for each source, [num_sources] each."""

    def per_source(values: Array) -> Array:
        masked = [jnp.where(batch.source_ids == source, values, 0) for source in range(num_sources)]
        return jnp.stack([jnp.sum(part, dtype=sums.nll.dtype) for part in masked])

    weights = batch.loss_weights
    return {
        "weight_sum": per_source(weights),
        "nll_sum": per_source(weights * sums.nll),
        "correct_sum": per_source(weights * sums.correct),
    }


def narrow_kernels(params: Params, compute_dtype: str) -> Params:
    """The layers' kernels in the dtype that they multiply in, so that their gradients, which have that precision, are
    held in that dtype too: in half the memory, with the same values. Each is read once; the router's in float32, and
    gradients of experts' come in float32 and would be rounded."""

    def narrow(path: str, param: Array) -> Array:
        is_kernel = re.fullmatch(r"layers\.(?!.*\.(router|experts)\.).*\.kernel", path)
        wider = param.dtype.itemsize > jnp.dtype(compute_dtype).itemsize
        return param.astype(compute_dtype) if is_kernel and wider else param

    return {path: narrow(path, param) for path, param in params.items()}


def _accumulate_grads(
    sum_loss: Any, params: Params, frozen: Params, batch: Batch, config: Config, mesh: Mesh | AbstractMesh | None
) -> tuple[Params, LossSums]:
    """Gradients of loss_sum over the whole batch, and its LossSums, microbatch by microbatch.

    Microbatch a of A takes rows a, A + a, 2A + a, ...: neighbours live on one device, so each device keeps its rows.
    """
    dtype = jnp.dtype(config.optimizer.accum_dtype)
    grad_fn = jax.grad(sum_loss, has_aux=True)
    params = narrow_kernels(params, config.model.compute_dtype)
    parts = config.batch.grad_accum_steps
    if parts == 1:
        grads, sums = grad_fn(params, frozen, batch)
        return jax.tree.map(lambda grad: grad.astype(dtype), grads), sums

    def split(rows: Array) -> Array:
        stacked = rows.reshape(-1, parts, *rows.shape[1:]).swapaxes(0, 1)
        return constrain(stacked, mesh, None, "batch", *["seq"] * (rows.ndim - 1))

    def add(total: Params, micro: Batch) -> tuple[Params, LossSums]:
        grads, sums = grad_fn(params, frozen, micro)
        return jax.tree.map(lambda t, grad: t + grad.astype(dtype), total, grads), sums

    zeros = {path: jnp.zeros(param.shape, dtype) for path, param in params.items()}
    grads, stacked = jax.lax.scan(add, zeros, jax.tree.map(split, batch))

    def join(rows: Array) -> Array:
        joined = rows.swapaxes(0, 1).reshape(-1, *rows.shape[2:])
        return constrain(joined, mesh, "batch", "seq")

    return grads, LossSums(
        loss_sum=jnp.sum(stacked.loss_sum),
        weight_sum=jnp.sum(stacked.weight_sum),
        nll=join(stacked.nll),
        correct=join(stacked.correct),
        router=jax.tree.map(partial(jnp.sum, axis=0), stacked.router),
    )
