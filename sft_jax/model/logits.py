"""What a model does to the products of hidden states and head before they are logits."""

from typing import NamedTuple

import jax.numpy as jnp

from sft_jax.typing import Array, Float


class LogitShape(NamedTuple):
    """logit = c * tanh(product / divisor / c), with c the soft-cap; without one, product / divisor."""

    divisor: float = 1.0
    softcap: float | None = None

    def apply(self, products: Float[Array, "*dims V"]) -> Float[Array, "*dims V"]:
        logits = products / self.divisor if self.divisor != 1 else products
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)

    def pull_back(self, grads: Float[Array, "*dims V"], logits: Float[Array, "*dims V"]) -> Float[Array, "*dims V"]:
        """Gradients of `logits` -> gradients of the products they were made from."""
        if self.softcap is not None:
            grads = grads * (1 - jnp.square(logits / self.softcap))  # tanh' = 1 - tanh^2
        return grads / self.divisor if self.divisor != 1 else grads


PLAIN_LOGITS = LogitShape()
