"""An optimizer -> the same, whose moments are kept in a dtype of choice; in bfloat16 they are rounded at random.

A moment moves by a small share of itself, and neighbours in bfloat16 lie up to 1/128 apart: rounded to the nearest, a
moment that moves by less than half of that stays where it is, however often. So it is rounded up or down by a draw, the
nearer of the two more often, and is right in the mean:

    1 + 1/512 lies a quarter of the way from 1 to the next, 1 + 1/128: three draws of four give 1, one gives the next

What bfloat16 holds stays as it is. The draw follows from the seed, the number of updates, the moment's path and the
element's place in it, so that no mesh and no resume changes it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sft_jax.model.adapter_use import fold_in_path
from sft_jax.typing import Array, Float, Key

# Keys of noise and dropout are folded from the same seed and a row's number, which is below 2^31.
_NO_ROW = 2**32 - 1
_LARGEST = float(jnp.finfo(jnp.bfloat16).max)


class RoundedState(NamedTuple):
    """`count` numbers the updates; floats of `inner` are bfloat16."""

    count: Any
    inner: Any


def keep_moments(inner: optax.GradientTransformation, dtype: str, seed: int) -> optax.GradientTransformation:
    """`inner`, with moments in `dtype`. It computes in `dtype` or in float32, whichever is wider, whatever dtype
    gradients and parameters have."""
    wide = jnp.promote_types(dtype, jnp.float32)

    def init_wide(params: Any) -> Any:
        return inner.init(_cast_floats(params, wide))

    def update_wide(grads: Any, state: Any, params: Any) -> Any:
        return inner.update(_cast_floats(grads, wide), state, _cast_floats(params, wide))

    def init(params: Any) -> RoundedState:
        return RoundedState(jnp.zeros((), jnp.int32), _cast_floats(init_wide(params), jnp.bfloat16))

    def update(grads: Any, state: RoundedState, params: Any) -> tuple[Any, RoundedState]:
        directions, new = update_wide(grads, _cast_floats(state.inner, wide), params)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _NO_ROW), state.count)

        def narrow(path: Any, leaf: Array) -> Array:
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                return leaf
            own_key = fold_in_path(key, jax.tree_util.keystr(path, simple=True, separator="."))
            return round_at_random(leaf, own_key)

        return directions, RoundedState(state.count + 1, jax.tree_util.tree_map_with_path(narrow, new))

    if wide == jnp.dtype(dtype):
        return optax.GradientTransformation(init_wide, update_wide)
    return optax.GradientTransformation(init, update)


def round_at_random(x: Float[Array, "..."], key: Key[Array, ""]) -> Array:
    """float32 -> bfloat16, one of the two neighbours of each element, the mean over keys being x itself."""
    # A bfloat16 is the upper half of a float32: what is added to the lower half carries as often as it should.
    lower = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    word = jax.lax.bitcast_convert_type(x, jnp.uint32) + lower
    upper = jax.lax.bitcast_convert_type((word >> 16).astype(jnp.uint16), jnp.bfloat16)
    # NaN and infinity would carry into other numbers.
    return jnp.where(jnp.abs(x) < _LARGEST, upper, x.astype(jnp.bfloat16))


def _cast_floats(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree)
