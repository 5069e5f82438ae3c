"""The update of an optimizer whose moments of the layers lie in the host's memory between steps: fetched, used and sent
back a layer at a time, in a loop that is the only order in which a compiler leaves such moves.

Whether a step counts is known only when all directions are. So they are made twice: moments are fetched twice, and sent
back once. No optimizer that remembers moments mixes the places of a parameter, so that a layer's are made as all are.
"""

import collections
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from sft_jax.datatypes import ConfigError
from sft_jax.sharding import HOST_MEMORY, to_device
from sft_jax.typing import Array


def shardings_of_moments(shardings: Mapping[str, NamedSharding]) -> dict[str, NamedSharding]:
    """Those of the parameters -> those of their moments: layers' are on the host.

    Raises:
      ConfigError: the devices have no such memory.
    """

    def move(path: str, sharding: NamedSharding) -> NamedSharding:
        try:
            return sharding.with_memory_kind(HOST_MEMORY) if _is_stacked(path) else sharding
        except ValueError as error:
            raise ConfigError(f"config.optimizer.offload: is True, and {error}. Set it to False.") from error

    return {path: move(path, sharding) for path, sharding in shardings.items()}


def update_all(
    optimizer: optax.GradientTransformation,
    grads: dict[str, Array],
    opt_state: Any,
    params: dict[str, Array],
    learning_rate: Array,
    finite: Array,
) -> tuple[dict[str, Array], Any, Array]:
    """(parameters, optimizer state, finite): the new ones where the given `finite` and all directions are, else the
    old. Directions too: a moment may overflow where loss and gradient did not."""
    directions, new_state = optimizer.update(grads, opt_state, params)
    new_params = jax.tree.map(partial(_subtract, learning_rate), params, directions)
    finite = finite & jnp.isfinite(optax.tree.norm(directions))
    chosen = jax.tree.map(partial(jnp.where, finite), (new_params, new_state), (params, opt_state))
    return *chosen, finite


def update_by_layers(
    optimizer: optax.GradientTransformation,
    grads: dict[str, Array],
    opt_state: Any,
    params: dict[str, Array],
    learning_rate: Array,
    finite: Array,
) -> tuple[dict[str, Array], Any, Array]:
    """The same, with the moments of layers on the host."""
    stacks = collections.defaultdict(list)
    for path, param in params.items():
        if _is_stacked(path):
            stacks[param.shape[0]].append(path)
    rest = [path for path in params if not _is_stacked(path)]
    directions, new_state = optimizer.update(_pick(grads, rest), _pick(opt_state, rest), _pick(params, rest))
    squares = _sum_squares(directions)

    def make_directions(i: Array, params: dict[str, Array], moments: Any) -> tuple[Any, ...]:
        held, own = to_device(_take(moments, i)), _take(params, i)
        own_grads = _take(_pick(grads, list(params)), i)
        directions, new = optimizer.update(own_grads, _with_moments(opt_state, held), own)
        return held, own, directions, _moments(new)

    def add(paths: list[str], i: Array, squares: Array) -> Array:
        return squares + _sum_squares(make_directions(i, _pick(params, paths), _moments(_pick(opt_state, paths)))[2])

    for num_layers, paths in stacks.items():
        squares = jax.lax.fori_loop(0, num_layers, partial(add, paths), squares)
    finite = finite & jnp.isfinite(squares)

    def choose(new: Any, old: Any) -> Any:
        return jax.tree.map(partial(jnp.where, finite), new, old)

    def apply(params: dict[str, Array], directions: dict[str, Array]) -> dict[str, Array]:
        return choose(jax.tree.map(partial(_subtract, learning_rate), params, directions), params)

    def write(i: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        held, own, directions, new = make_directions(i, *carry)
        written = apply(own, directions), jax.device_put(choose(new, held), jax.memory.Space.Host)
        return jax.tree.map(lambda x, row: jax.lax.dynamic_update_index_in_dim(x, row, i, 0), carry, written)

    new_params = apply(_pick(params, rest), directions)
    new_state = choose(new_state, _pick(opt_state, rest))
    for num_layers, paths in stacks.items():
        carry = _pick(params, paths), _moments(_pick(opt_state, paths))
        own, moments = jax.lax.fori_loop(0, num_layers, write, carry)
        new_params |= own
        joined = [old | new for old, new in zip(_moments(new_state), moments, strict=True)]
        new_state = _with_moments(new_state, joined)
    return {path: new_params[path] for path in params}, new_state, finite


def _subtract(learning_rate: Array, param: Array, direction: Array) -> Array:
    return param - (learning_rate * direction).astype(param.dtype)


def _is_stacked(path: str) -> bool:
    return path.startswith("layers.")


def _sum_squares(tree: Any) -> Array:
    return jnp.square(optax.tree.norm(tree)) if tree else jnp.zeros(())


def _take(tree: Any, i: Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _is_by_path(tree: Any) -> bool:
    return isinstance(tree, dict)


def _pick(tree: Any, paths: list[str]) -> Any:
    """Of every dict by path, those of `paths`."""
    pick = lambda leaf: {path: leaf[path] for path in paths} if _is_by_path(leaf) else leaf  # noqa: E731
    return jax.tree.map(pick, tree, is_leaf=_is_by_path)


def _moments(opt_state: Any) -> list[dict[str, Array]]:
    return [leaf for leaf in jax.tree.leaves(opt_state, is_leaf=_is_by_path) if _is_by_path(leaf)]


def _with_moments(opt_state: Any, moments: list[dict[str, Array]]) -> Any:
    rest = iter(moments)
    return jax.tree.map(lambda leaf: next(rest) if _is_by_path(leaf) else leaf, opt_state, is_leaf=_is_by_path)
