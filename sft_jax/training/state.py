"""What a step changes (TrainState), what it only reads (frozen parameters), and where both live on the mesh."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from sft_jax.datatypes import ConfigError
from sft_jax.model.name_patterns import named_branches
from sft_jax.model.transformer import Params
from sft_jax.sharding import replicated
from sft_jax.training.update import shardings_of_moments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """`step` counts batches consumed and always advances; `num_updates` counts those that changed the parameters and
    drives the schedule; `num_skipped` counts skipped steps since the last update."""

    step: Any  # int32 scalar
    num_updates: Any  # int32 scalar
    num_skipped: Any  # int32 scalar
    params: Any  # Params that train
    opt_state: Any  # of those only


def split_params(params: Mapping[str, Any], freeze: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trainable, frozen): frozen are those whose path any pattern of `freeze` finds.

    Raises:
      ConfigError: a pattern, or a branch of one, finds nothing; or all of them everything.
    """
    for branch, named in named_branches(freeze):
        if not any(re.search(branch, path) for path in params):
            raise ConfigError(f"config.model.freeze: {named} finds no parameter. There are {', '.join(params)}.")
    frozen = {path for path in params if any(re.search(pattern, path) for pattern in freeze)}
    if len(frozen) == len(params):
        raise ConfigError("config.model.freeze: leaves no parameter to train. Take a pattern out.")
    return {p: v for p, v in params.items() if p not in frozen}, {p: params[p] for p in frozen}


def init_state(params: Params, optimizer: optax.GradientTransformation, offload: bool = False) -> TrainState:
    """The state before the first step, with optimizer state sharded like the parameters it belongs to.

    Args:
      offload: whether moments of layers are in the host's memory, as config.optimizer.offload says.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    mesh = next(iter(shardings.values())).mesh
    abstract = jax.eval_shape(optimizer.init, params)
    placed = _opt_shardings(optimizer, abstract, shardings, params, mesh, offload)
    opt_state = jax.jit(optimizer.init, out_shardings=placed)(params)
    # Three buffers, not one three times: the step is given them to overwrite.
    step, num_updates, num_skipped = (jax.device_put(jnp.zeros((), jnp.int32), replicated(mesh)) for _ in range(3))
    return TrainState(step, num_updates, num_skipped, params, opt_state)


def abstract_state(
    params: Mapping[str, jax.ShapeDtypeStruct],
    shardings: Mapping[str, NamedSharding],
    optimizer: optax.GradientTransformation,
    mesh: Mesh | AbstractMesh,
    offload: bool = False,
) -> TrainState:
    """Shapes, dtypes and shardings of `init_state`'s result, with no memory: for tracing, compiling and restoring."""
    shardings = {path: shardings[path] for path in params}  # of those that train
    params = {path: _with_sharding(leaf, shardings[path]) for path, leaf in params.items()}
    opt_state = jax.eval_shape(optimizer.init, params)
    opt_shardings = _opt_shardings(optimizer, opt_state, shardings, params, mesh, offload)
    placed = jax.tree.map(_with_sharding, opt_state, opt_shardings)
    zero = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    return TrainState(step=zero, num_updates=zero, num_skipped=zero, params=params, opt_state=placed)


def _opt_shardings(
    optimizer: optax.GradientTransformation,
    opt_state: Any,
    shardings: Mapping[str, NamedSharding],
    params: Mapping[str, Any],
    mesh: Mesh | AbstractMesh,
    offload: bool,
) -> Any:
    """A moment has its parameter's shape and sharding; counts and factored statistics are small and replicated."""
    of_moments = shardings_of_moments(shardings) if offload else dict(shardings)

    def of_param(leaf: Any, sharding: NamedSharding, param: Any) -> NamedSharding:
        return sharding if leaf.shape == param.shape else replicated(mesh)

    return optax.tree.map_params(
        optimizer, of_param, opt_state, of_moments, dict(params), transform_non_params=lambda _: replicated(mesh)
    )


def _with_sharding(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
