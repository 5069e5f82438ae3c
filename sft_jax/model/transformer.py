"""Token ids, positions and segments of packed rows -> hidden states [B, L, D] after the final norm. Never logits: the
loss and the sampler multiply by `output_head` as much as they need.

Parameters travel as a flat dict by dotted path, layers stacked in front:

    embed.embedding                              [V, D]
    layers.attention_norm.scale                  [layers, D]
    layers.attention.{query, key, value}.kernel  [layers, D, N or K, H]
    layers.attention.out.kernel                  [layers, N, H, D]
    layers.mlp_norm.scale                        [layers, D]
    layers.mlp.{gate, up}.kernel                 [layers, D, F]
    layers.mlp.down.kernel                       [layers, F, D]
    final_norm.scale                             [D]
    head.kernel                                  [V, D]          only where the embedding is not tied
"""

import functools
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

from sft_jax.datatypes import ConfigError
from sft_jax.model.attention import Rows, attend
from sft_jax.model.families import TransformerConfig
from sft_jax.model.layers import DecoderLayer, RMSNorm, rope_for
from sft_jax.model.linear import DROPOUT_KEYS, OPTIONAL, Linear
from sft_jax.sharding import constrain
from sft_jax.typing import Array, Float, Int, Key

Params = dict[str, Array]

# The logical dims of every parameter; sharding.RULES maps them to mesh axes. Each path matches exactly one pattern.
LOGICAL_DIMS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed\.embedding", ("vocab", "embed")),
    (r"head\.kernel", ("vocab", "embed")),
    (r"final_norm\.scale", ("norm",)),
    (r"layers\.(attention|mlp)_norm\.scale", ("layers", "norm")),
    (r"layers\.attention\.query\.kernel", ("layers", "embed", "heads", "head_dim")),
    (r"layers\.attention\.(key|value)\.kernel", ("layers", "embed", "kv_heads", "head_dim")),
    (r"layers\.attention\.out\.kernel", ("layers", "heads", "head_dim", "embed")),
    (r"layers\.mlp\.(gate|up)\.kernel", ("layers", "embed", "mlp")),
    (r"layers\.mlp\.down\.kernel", ("layers", "mlp", "embed")),
)


def logical_dims(path: str) -> tuple[str | None, ...]:
    """The logical dims of the parameter at a dotted path."""
    found = [dims for pattern, dims in LOGICAL_DIMS if re.fullmatch(pattern, path)]
    assert len(found) == 1, f"{path} matches {len(found)} patterns of LOGICAL_DIMS; expected exactly one"
    return found[0]


class EmbeddingNoise(NamedTuple):
    """NEFTune: noise on the input embeddings while training. One key per global row, so that neither the mesh nor the
    number of microbatches changes the draw."""

    keys: Key[Array, " B"]
    alpha: float


class AdapterDropout(NamedTuple):
    """Dropout of what adapters read, while training. Keys as in EmbeddingNoise, from which every map draws its own."""

    keys: Key[Array, " B"]
    rate: float


class KVCache(NamedTuple):
    """Keys and values of one sequence per row; the token at position p lies in slot p.

    A query at position p sees slots 0 to p, all written by then; what lies beyond is left over from padding, or empty.
    """

    keys: Float[Array, "layers B M K H"]
    values: Float[Array, "layers B M K H"]


class Embedding(nnx.Module):
    """A vector for each token id."""

    def __init__(self, config: TransformerConfig, key: Key[Array, ""], dtype: DTypeLike):
        shape = (config.vocab_size, config.embed_dim)
        self.embedding = nnx.Param(config.initializer_range * jax.random.normal(key, shape, dtype))

    def __call__(
        self, ids: Int[Array, "B L"], dtype: DTypeLike, mesh: Mesh | AbstractMesh | None
    ) -> Float[Array, "B L D"]:
        table = constrain(self.embedding[...].astype(dtype), mesh, "vocab", None)
        # An id outside the vocabulary becomes NaN, which the step reports; clamping would train on another token.
        return constrain(table.at[ids].get(mode="fill", fill_value=jnp.nan), mesh, "batch", "seq", None)


class Transformer(nnx.Module):
    """The decoder. Layers are one stacked module, run by `jax.lax.scan`."""

    def __init__(self, config: TransformerConfig, key: Key[Array, ""], dtype: DTypeLike):
        embed_key, layers_key, head_key = jax.random.split(key, 3)
        self.config = config
        self.embed = Embedding(config, embed_key, dtype)
        layer_keys = jax.random.split(layers_key, config.num_layers)
        self.layers = jax.vmap(lambda layer_key: DecoderLayer(config, layer_key, dtype))(layer_keys)
        self.final_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype)
        if not config.tie_embeddings:  # laid out as the embedding is, [V, D]; a tied head reads the embedding itself
            std = config.initializer_range
            self.head = Linear((config.vocab_size,), (config.embed_dim,), std, head_key, dtype)

    def __call__(
        self,
        inputs: Int[Array, "B L"],
        rows: Rows,
        *,
        compute_dtype: DTypeLike,
        remat: str,
        attention: str,
        mesh: Mesh | AbstractMesh | None,
        noise: EmbeddingNoise | None,
    ) -> Float[Array, "B L D"]:
        rope = rope_for(rows.positions, self.config, compute_dtype)
        x = self.embed(inputs, compute_dtype, mesh)
        if noise is not None:
            x = x + _draw_noise(noise, rows, x.shape[-1]).astype(x.dtype)

        def run_layer(x: Array, layer: DecoderLayer) -> tuple[Array, None]:
            return layer(x, rope, lambda q, k, v: (attend(attention, q, k, v, rows), None), mesh)

        x, _ = jax.lax.scan(_rematerialized(run_layer, remat), x, self.layers)
        return self.final_norm(x)

    def decode(
        self,
        inputs: Int[Array, "B L"],
        positions: Int[Array, "B L"],
        cache: KVCache,
        *,
        compute_dtype: DTypeLike,
        attention: str,
        mesh: Mesh | AbstractMesh | None,
    ) -> tuple[Float[Array, "B L D"], KVCache]:
        batch, num_slots = cache.keys.shape[1:3]
        row, slot = jnp.arange(batch)[:, None], positions
        slots = jnp.broadcast_to(jnp.arange(num_slots)[None], (batch, num_slots))
        rows, kv_rows = (Rows(places, jnp.ones_like(places)) for places in (positions, slots))
        rope = rope_for(positions, self.config, compute_dtype)

        def run_layer(carry: tuple[Array, Array, Array], scanned: tuple[DecoderLayer, Array]) -> tuple[Any, None]:
            x, keys, values = carry
            layer, i = scanned

            def attend_cached(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
                all_keys = keys.at[i, row, slot].set(k.astype(keys.dtype))
                all_values = values.at[i, row, slot].set(v.astype(values.dtype))
                return attend(attention, q, all_keys[i], all_values[i], rows, kv_rows), (all_keys, all_values)

            x, (keys, values) = layer(x, rope, attend_cached, mesh)
            return (x, keys, values), None

        carry = (self.embed(inputs, compute_dtype, mesh), cache.keys, cache.values)
        (x, keys, values), _ = jax.lax.scan(run_layer, carry, (self.layers, jnp.arange(self.config.num_layers)))
        return self.final_norm(x), KVCache(keys, values)


def _draw_noise(noise: EmbeddingNoise, rows: Rows, embed_dim: int) -> Float[Array, "B L D"]:
    """Uniform in +-alpha / sqrt(n * D), with n the tokens of the segment. Source: arXiv:2310.05914, algorithm 1."""
    length = rows.segment_ids.shape[1]
    draw = functools.partial(jax.random.uniform, shape=(length, embed_dim), minval=-1.0, maxval=1.0)
    segment_length = jnp.sum(rows.segment_ids[:, :, None] == rows.segment_ids[:, None, :], axis=-1)
    scale = jnp.where(rows.segment_ids != 0, noise.alpha / jnp.sqrt(segment_length * embed_dim), 0)
    return scale[:, :, None] * jax.vmap(draw)(noise.keys)


def _rematerialized(body: Callable[..., Any], name: str) -> Callable[..., Any]:
    """What the backward pass of a scanned layer recomputes (config.model.remat)."""
    if name == "none":
        return body
    if name == "dots":  # keeps the outputs of the projections, not of attention's products
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return jax.checkpoint(body, policy=policy, prevent_cse=False)
    if name == "full":
        return jax.checkpoint(body, prevent_cse=False)
    raise ConfigError(f"config.model.remat: is {name!r}; expected none, dots or full.")


def _abstract(config: TransformerConfig) -> Transformer:
    return jax.eval_shape(lambda: Transformer(config, jax.random.key(0), jnp.float32))


def _linears_of(model: Transformer) -> dict[str, Linear]:
    """The linear maps of the layers by path. The head is none: its matrix is multiplied elsewhere."""
    found = {".".join(map(str, path)): module for path, module in nnx.iter_modules(model) if isinstance(module, Linear)}
    return {path: found[path] for path in sorted(found) if path.startswith("layers.")}


@functools.lru_cache
def linears(config: TransformerConfig) -> dict[str, Linear]:
    """The linear maps of the layers by path, such as `layers.attention.query`, with shapes for arrays."""
    return _linears_of(_abstract(config))


@functools.lru_cache
def _graphdef(config: TransformerConfig, paths: frozenset[str], lora_dropout: float) -> Any:
    """The module's structure, without any array: linear maps have what the parameters at `paths` give them."""
    model = _abstract(config)
    for path, linear in _linears_of(model).items():
        for name in OPTIONAL:
            wanted = f"{path}.{name}" in paths
            if wanted and not hasattr(linear, name):
                setattr(linear, name, nnx.Param(jax.ShapeDtypeStruct((), jnp.float32)))
            elif hasattr(linear, name) and not wanted:
                delattr(linear, name)
        linear.lora_scale, linear.lora_dropout = config.lora_scale, lora_dropout
    return nnx.split(model)[0]


def _merge(
    params: Mapping[str, Array], config: TransformerConfig, dropout: AdapterDropout | None = None
) -> Transformer:
    if dropout is not None:
        params = {**params, **_dropout_keys(params, dropout)}
    state = nnx.from_flat_state([(_path_parts(path), nnx.Param(value)) for path, value in params.items()])
    return nnx.merge(_graphdef(config, frozenset(params), 0.0 if dropout is None else dropout.rate), state)


def _path_parts(path: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in path.split("."))


def _dropout_keys(params: Mapping[str, Array], dropout: AdapterDropout) -> Params:
    """A key for each adapter of each layer and each row, stacked as its kernels are: [layers, B]."""
    keys = {}
    for path, value in params.items():
        module, name = path.rsplit(".", 1)
        if name == "lora_a":
            of_module = jax.vmap(lambda key, path=path: fold_in_path(key, path))(dropout.keys)
            of_layer = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))
            keys[f"{module}.{DROPOUT_KEYS}"] = of_layer(of_module, jnp.arange(len(value)))
    return keys


def fold_in_path(key: Key[Array, ""], path: str) -> Key[Array, ""]:
    """A key of its own for each path, whatever other paths there are."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def init_params(config: TransformerConfig, key: Key[Array, ""], dtype: DTypeLike) -> Params:
    """Random parameters: matrices normal(0, initializer_range), scales 1. May be jitted with out_shardings."""
    state = nnx.state(Transformer(config, key, dtype))
    return {".".join(map(str, path)): variable[...] for path, variable in nnx.to_flat_state(state)}


def abstract_params(config: TransformerConfig, dtype: DTypeLike) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the parameters, without memory."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0), dtype))


def forward(
    params: Mapping[str, Array],
    config: TransformerConfig,
    inputs: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    segment_ids: Int[Array, "B L"],
    *,
    compute_dtype: DTypeLike,
    remat: str,
    attention: str,
    mesh: Mesh | AbstractMesh | None = None,
    noise: EmbeddingNoise | None = None,
    dropout: AdapterDropout | None = None,
) -> Float[Array, "B L D"]:
    """Hidden states of packed rows, in compute_dtype. Those of padding are finite and depend on no token.

    Args:
      remat: none, dots or full.
      attention: the kernel's name.
      mesh: pins the activations' shardings; None leaves them to the compiler.
      noise: NEFTune, while training.
      dropout: of adapters, while training.

    Raises:
      ConfigError: for an unknown `remat` or `attention`.
    """
    model = _merge(params, config, dropout)
    rows = Rows(positions, segment_ids)
    return model(inputs, rows, compute_dtype=compute_dtype, remat=remat, attention=attention, mesh=mesh, noise=noise)


def decode(
    params: Mapping[str, Array],
    config: TransformerConfig,
    inputs: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    cache: KVCache,
    *,
    compute_dtype: DTypeLike,
    attention: str,
    mesh: Mesh | AbstractMesh | None = None,
) -> tuple[Float[Array, "B L D"], KVCache]:
    """Hidden states of the next tokens of each row, which see what the cache holds and each other; and the new cache.

    Positions also say the slots. Filling with prompts of 3 and 2 tokens, then one step: the second row's padding takes
    slot 2, where nothing sees it before its next token is written over it.

        inputs     7 8 9   then  4
                   5 6 .         3
        positions  0 1 2         3
                   0 1 2         2
    """
    model = _merge(params, config)
    return model.decode(inputs, positions, cache, compute_dtype=compute_dtype, attention=attention, mesh=mesh)


def empty_cache(config: TransformerConfig, batch_size: int, num_slots: int, dtype: DTypeLike) -> KVCache:
    """A cache of `num_slots` tokens a row with nothing in it."""
    shape = (config.num_layers, batch_size, num_slots, config.num_kv_heads, config.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def output_head(params: Mapping[str, Array]) -> Float[Array, "V D"]:
    """The matrix whose product with a hidden state is the logits: the embedding where it is tied."""
    return params["head.kernel"] if "head.kernel" in params else params["embed.embedding"]
