"""How adapters are run: their scale, and while training dropout of what they read.

Each map, layer and row has a draw of its own. Keys follow from the seed and the global row alone, so neither the mesh
nor microbatches change what is dropped.
"""

import zlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sft_jax.typing import Array, Float, Key

DROPOUT_KEYS = "dropout_keys"


class AdapterDropout(NamedTuple):
    """Dropout while training. Keys are folded from the seed and the global row, as EmbeddingNoise's are."""

    keys: Key[Array, " B"]
    rate: float


class AdapterUse(NamedTuple):
    """How adapters are run: what they add is multiplied by `scale`."""

    scale: float
    dropout: AdapterDropout | None = None


def stack_keys(params: Mapping[str, Array], dropout: AdapterDropout) -> dict[str, Array]:
    """A key for each adapter of each layer and each row, stacked as its kernels are: [layers, B]."""
    keys = {}
    for path, value in params.items():
        module, name = path.rsplit(".", 1)
        if name == "lora_a":
            of_module = jax.vmap(lambda key, path=path: fold_in_path(key, path))(dropout.keys)
            of_layer = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))
            keys[f"{module}.{DROPOUT_KEYS}"] = of_layer(of_module, jnp.arange(len(value)))
    return keys


def drop(x_TI: Float[Array, "T I"], keys: Key[Array, " B"], rate: float) -> Float[Array, "T I"]:
    """Inverted dropout of the tokens of B rows, one row after the other."""
    of_row = (len(x_TI) // len(keys), x_TI.shape[1])
    kept_BLI = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, of_row))(keys)
    return jnp.where(kept_BLI.reshape(x_TI.shape), x_TI / (1 - rate), 0)


def fold_in_path(key: Key[Array, ""], path: str) -> Key[Array, ""]:
    """A key of its own for each path, whatever other paths there are."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))
