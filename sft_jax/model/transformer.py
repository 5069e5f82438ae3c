"""Token ids, positions and segments of packed rows -> hidden states [B, L, D] after the final norm. Never logits: the
loss and the sampler multiply by `output_head` as much as they need.

Parameters travel as a flat dict by dotted path. Layers come in groups that repeat a pattern (families.py), and the
layers at one place of a group's pattern are stacked in front. A model of like layers has one group of one place, 0.0:

    embed.embedding                                  [V, D]
    layers.0.0.attention_norm.scale                  [repeats, D]
    layers.0.0.attention.{query, key, value}.kernel  [repeats, D, N or K, H]
    layers.0.0.attention.out.kernel                  [repeats, N, H, D]
    layers.0.0.mlp_norm.scale                        [repeats, D]
    layers.0.0.mlp.{gate, up}.kernel                 [repeats, D, F]
    layers.0.0.mlp.down.kernel                       [repeats, F, D]
    final_norm.scale                                 [D]
    head.kernel                                      [V, D]          only where the embedding is not tied

and where the family has them, biases, norms of queries and keys, norms after attention and MLP, sinks, and

    layers.0.0.mlp.router.kernel                     [repeats, D, E]
    layers.0.0.mlp.experts.{gate, up}.kernel         [repeats, E, D, F]
    layers.0.0.mlp.experts.down.kernel               [repeats, E, F, D]
    layers.0.0.mlp.shared.{gate, up, down}.kernel    as those of an MLP
    layers.0.0.attention.query_down.kernel           [repeats, D, query_rank]     latent attention, with its query from
    layers.0.0.attention.query.kernel                [repeats, query_rank, N, H]
    layers.0.0.attention.kv_down.kernel              [repeats, D, kv_rank + rope_dim]
    layers.0.0.attention.kv_up.kernel                [repeats, kv_rank, N, plain_dim + value_dim]
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

from sft_jax.model.adapter_use import AdapterUse, stack_keys
from sft_jax.model.attention import Rows, Scores, attend, segment_lengths
from sft_jax.model.decoder_layer import DecoderLayer
from sft_jax.model.families import LayerConfig, TransformerConfig, list_layers
from sft_jax.model.gradient_sums import look_up
from sft_jax.model.layers import Attend, make_norm
from sft_jax.model.linear import OPTIONAL, Linear
from sft_jax.model.param_dims import logical_dims
from sft_jax.model.remat import rematerialized
from sft_jax.model.rope import Rope, RopeConfig, rope_for, rotate
from sft_jax.model.router import RouterSums, TokenWeights, join_sums
from sft_jax.sharding import constrain
from sft_jax.typing import Array, Float, Int, Key

Params = dict[str, Array]


class EmbeddingNoise(NamedTuple):
    """NEFTune: noise on the input embeddings while training. One key per global row, so that neither the mesh nor the
    number of microbatches changes the draw."""

    keys: Key[Array, " B"]
    alpha: float


class KVCache(NamedTuple):
    """Keys (turned by their positions) and values of one sequence per row, for the layers at one place of a group; the
    token at position p lies in slot p.

    A query at position p sees slots 0 to p, all written by then; what lies beyond is left over from padding, or empty.
    """

    keys: Float[Array, "repeats B M K H"]
    values: Float[Array, "repeats B M K Hv"]


Cache = tuple[tuple[KVCache, ...], ...]  # by group and place


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
        return constrain(look_up(table, ids, mesh), mesh, "batch", "seq", None)


class Transformer(nnx.Module):
    """The decoder. The layers at one place of a group are one stacked module; `jax.lax.scan` runs the repeats."""

    def __init__(self, config: TransformerConfig, key: Key[Array, ""], dtype: DTypeLike):
        embed_key, layers_key, head_key = jax.random.split(key, 3)
        self.config = config
        self.embed = Embedding(config, embed_key, dtype)
        keys, groups = jax.random.split(layers_key, config.num_layers), []
        for group in config.layers:
            group_keys, keys = jnp.split(keys, [group.repeats * len(group.pattern)])
            stacks = []
            for place, layer in enumerate(group.pattern):
                make_stack = jax.vmap(functools.partial(DecoderLayer, config, layer, dtype=dtype))
                stacks.append(make_stack(group_keys[place :: len(group.pattern)]))
            groups.append(nnx.List(stacks))
        self.layers = nnx.List(groups)
        self.final_norm = make_norm(config, config.embed_dim, dtype)
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
        router_weights: Float[Array, "B L"] | None,
    ) -> tuple[Float[Array, "B L D"], RouterSums | None]:
        ropes = self._ropes(rows.positions, functools.partial(segment_lengths, rows), compute_dtype)
        x = self._embed(inputs, compute_dtype, mesh)
        if noise is not None:
            x = x + _draw_noise(noise, rows, x.shape[-1]).astype(x.dtype)

        def make_attend(layer: LayerConfig) -> Attend:
            rope, scores = ropes[layer.rope], self._scores(layer)

            def attend_rows(q: Array, k: Array, v: Array, sinks: Array | None = None) -> tuple[Array, None]:
                turned = rotate(q, rope), rotate(k, rope)
                return attend(attention, *turned, v, rows, scores, sinks=sinks, mesh=mesh), None

            return attend_rows

        tokens, all_sums = TokenWeights(rows.segment_ids, router_weights), []
        for group, places in zip(self.config.layers, self.layers, strict=True):
            run_layers = [
                rematerialized(functools.partial(_run_layer, make_attend(layer), tokens, mesh), remat)
                for layer in group.pattern
            ]

            def run_pattern(x: Array, layers: Any, run_layers: Any = run_layers) -> tuple[Array, list[Any]]:
                sums = []
                for run_layer, layer in zip(run_layers, layers, strict=True):
                    x, layer_sums = run_layer(x, layer)
                    sums.append(layer_sums)
                return x, sums

            x, sums = jax.lax.scan(run_pattern, x, tuple(places))
            all_sums += sums
        return self.final_norm(x), join_sums(all_sums)

    def decode(
        self,
        inputs: Int[Array, "B L"],
        positions: Int[Array, "B L"],
        lengths: Int[Array, " B"],
        cache: Cache,
        *,
        compute_dtype: DTypeLike,
        attention: str,
        mesh: Mesh | AbstractMesh | None,
    ) -> tuple[Float[Array, "B L D"], Cache]:
        batch, num_slots = cache[0][0].keys.shape[1:3]
        row, slot = jnp.arange(batch)[:, None], positions
        slots = jnp.broadcast_to(jnp.arange(num_slots)[None], (batch, num_slots))
        rows, kv_rows = (Rows(places, jnp.ones_like(places)) for places in (positions, slots))
        ropes = self._ropes(positions, lambda: jnp.broadcast_to(lengths[:, None], positions.shape), compute_dtype)

        def make_attend(layer: LayerConfig, stack: KVCache, repeat: Array) -> Attend:
            rope, scores = ropes[layer.rope], self._scores(layer)

            def attend_cached(q: Array, k: Array, v: Array, sinks: Array | None = None) -> tuple[Array, KVCache]:
                turned = rotate(k, rope).astype(stack.keys.dtype)
                keys = stack.keys.at[repeat, row, slot].set(turned)
                values = stack.values.at[repeat, row, slot].set(v.astype(stack.values.dtype))
                seen = keys[repeat], values[repeat]
                mixed = attend(attention, rotate(q, rope), *seen, rows, scores, kv_rows, sinks)
                return mixed, KVCache(keys, values)

            return attend_cached

        tokens = TokenWeights(rows.segment_ids, None)
        x, new_cache = self._embed(inputs, compute_dtype, mesh), []
        for group, places, stacks in zip(self.config.layers, self.layers, cache, strict=True):

            def run_pattern(carry: Any, scanned: Any, pattern: Any = group.pattern) -> tuple[Any, None]:
                (x, stacks), (layers, repeat) = carry, scanned
                new_stacks = []
                for config, layer, stack in zip(pattern, layers, stacks, strict=True):
                    x, new_stack, _ = layer(x, make_attend(config, stack, repeat), tokens, mesh)
                    new_stacks.append(new_stack)
                return (x, tuple(new_stacks)), None

            (x, stacks), _ = jax.lax.scan(run_pattern, (x, stacks), (tuple(places), jnp.arange(group.repeats)))
            new_cache.append(stacks)
        return self.final_norm(x), tuple(new_cache)

    def _embed(self, inputs: Array, compute_dtype: DTypeLike, mesh: Mesh | AbstractMesh | None) -> Array:
        x = self.embed(inputs, compute_dtype, mesh)
        return x if self.config.embedding_multiplier == 1 else x * self.config.embedding_multiplier

    def _scores(self, layer: LayerConfig) -> Scores:
        scale = self.config.attention_scale or self.config.head_dim**-0.5
        return Scores(scale, layer.window, self.config.attention_softcap)

    def _ropes(
        self, positions: Array, lengths: Callable[[], Array], compute_dtype: DTypeLike
    ) -> dict[RopeConfig | None, Rope | None]:
        """The rotations of each kind of layer, made once."""
        ropes: dict[RopeConfig | None, Rope | None] = {None: None}
        for layer in list_layers(self.config):
            if layer.rope is not None and layer.rope not in ropes:
                own_lengths = lengths() if layer.rope.needs_lengths else None
                ropes[layer.rope] = rope_for(
                    positions, own_lengths, layer.rope, self.config.rope_head_dim, compute_dtype
                )
        return ropes


def _run_layer(
    attend: Attend, tokens: TokenWeights, mesh: Mesh | AbstractMesh | None, x: Array, layer: DecoderLayer
) -> tuple[Array, RouterSums | None]:
    x, _, sums = layer(x, attend, tokens, mesh)
    return x, sums


def _draw_noise(noise: EmbeddingNoise, rows: Rows, embed_dim: int) -> Float[Array, "B L D"]:
    """Uniform in +-alpha / sqrt(n * D), with n the tokens of the segment. Source: arXiv:2310.05914, algorithm 1."""
    length = rows.segment_ids.shape[1]
    draw = functools.partial(jax.random.uniform, shape=(length, embed_dim), minval=-1.0, maxval=1.0)
    scale = jnp.where(rows.segment_ids != 0, noise.alpha / jnp.sqrt(segment_lengths(rows) * embed_dim), 0)
    return scale[:, :, None] * jax.vmap(draw)(noise.keys)


def _abstract(config: TransformerConfig) -> Transformer:
    return jax.eval_shape(lambda: Transformer(config, jax.random.key(0), jnp.float32))


def _linears_of(model: Transformer) -> dict[str, Linear]:
    """The linear maps of the layers by path. The head is none: its matrix is multiplied elsewhere."""
    found = {".".join(map(str, path)): module for path, module in nnx.iter_modules(model) if isinstance(module, Linear)}
    return {path: found[path] for path in sorted(found) if path.startswith("layers.")}


@functools.lru_cache
def linears(config: TransformerConfig) -> dict[str, Linear]:
    """The linear maps of the layers by path, such as `layers.0.0.attention.query`, with shapes for arrays."""
    return _linears_of(_abstract(config))


@functools.lru_cache
def _graphdef(config: TransformerConfig, paths: frozenset[str], lora_scale: float, lora_dropout: float) -> Any:
    """The module's structure, without any array: linear maps have what the parameters at `paths` give them."""
    model = _abstract(config)
    for path, linear in _linears_of(model).items():
        names = {name for name in OPTIONAL if f"{path}.{name}" in paths}
        linear.hold(names, logical_dims(f"{path}.kernel")[1:], lora_scale, lora_dropout)
    return nnx.split(model)[0]


def _merge(params: Mapping[str, Array], config: TransformerConfig, adapters: AdapterUse | None = None) -> Transformer:
    assert adapters is not None or not any(path.endswith(".lora_a") for path in params), "adapters without a scale"
    scale, dropout = adapters or AdapterUse(1.0)
    if dropout is not None:
        params = {**params, **stack_keys(params, dropout)}
    state = nnx.from_flat_state([(_keys(path), nnx.Param(value)) for path, value in params.items()])
    return nnx.merge(_graphdef(config, frozenset(params), scale, 0.0 if dropout is None else dropout.rate), state)


def _keys(path: str) -> tuple[str | int, ...]:
    """`layers.0.1.mlp` -> ("layers", 0, 1, "mlp")."""
    return tuple(int(part) if part.isdigit() else part for part in path.split("."))


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
    adapters: AdapterUse | None = None,
) -> Float[Array, "B L D"]:
    """Hidden states of packed rows, in compute_dtype. Those of padding are finite and depend on no token.

    Args:
      remat: what the backward pass recomputes, by a name of remat.py.
      attention: the kernel's name.
      mesh: pins the activations' shardings; None leaves them to the compiler.
      noise: NEFTune, while training.
      adapters: needed where `params` hold adapters.

    Raises:
      ConfigError: for an unknown `remat` or `attention`.
    """
    options: dict[str, Any] = dict(
        compute_dtype=compute_dtype, remat=remat, attention=attention, mesh=mesh, noise=noise, adapters=adapters
    )
    return forward_and_route(params, config, inputs, positions, segment_ids, router_weights=None, **options)[0]


def forward_and_route(
    params: Mapping[str, Array],
    config: TransformerConfig,
    inputs: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    segment_ids: Int[Array, "B L"],
    *,
    router_weights: Float[Array, "B L"] | None,
    compute_dtype: DTypeLike,
    remat: str,
    attention: str,
    mesh: Mesh | AbstractMesh | None = None,
    noise: EmbeddingNoise | None = None,
    adapters: AdapterUse | None = None,
) -> tuple[Float[Array, "B L D"], RouterSums | None]:
    """As `forward`, and the sums over the choices of all routers; None where the model has none.

    Args:
      router_weights: how much each token counts in the router's losses; None: none does.
    """
    model = _merge(params, config, adapters)
    rows = Rows(positions, segment_ids)
    options: dict[str, Any] = dict(
        compute_dtype=compute_dtype, remat=remat, attention=attention, mesh=mesh, noise=noise
    )
    return model(inputs, rows, router_weights=router_weights, **options)


def decode(
    params: Mapping[str, Array],
    config: TransformerConfig,
    inputs: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    lengths: Int[Array, " B"],
    cache: Cache,
    *,
    compute_dtype: DTypeLike,
    attention: str,
    mesh: Mesh | AbstractMesh | None = None,
) -> tuple[Float[Array, "B L D"], Cache]:
    """Hidden states of the next tokens of each row, which see what the cache holds and each other; and the new cache.

    Positions also say the slots. Filling with prompts of 3 and 2 tokens, then one step: the second row's padding takes
    slot 2, where nothing sees it before its next token is written over it.

        inputs     7 8 9   then  4
                   5 6 .         3
        positions  0 1 2         3
                   0 1 2         2
        lengths    3 2           4 3      tokens so far, which some ropes ask for
    """
    model = _merge(params, config)
    return model.decode(inputs, positions, lengths, cache, compute_dtype=compute_dtype, attention=attention, mesh=mesh)


def empty_cache(config: TransformerConfig, batch_size: int, num_slots: int, dtype: DTypeLike) -> Cache:
    """A cache of `num_slots` tokens a row with nothing in it."""

    def empty(repeats: int) -> KVCache:
        shape = (repeats, batch_size, num_slots, config.num_kv_heads)
        return KVCache(jnp.zeros((*shape, config.head_dim), dtype), jnp.zeros((*shape, config.value_dim), dtype))

    return tuple(tuple(empty(group.repeats) for _ in group.pattern) for group in config.layers)


def output_head(params: Mapping[str, Array]) -> Float[Array, "V D"]:
    """The matrix whose product with a hidden state is the logits: the embedding where it is tied."""
    return params["head.kernel"] if "head.kernel" in params else params["embed.embedding"]
