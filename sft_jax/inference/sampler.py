"""Prompts -> generated ids, by cached decoding; sequences -> log-probabilities of their own tokens.

Shapes are rounded up to powers of two, so that a handful of compilations serves any set of prompts. What a prompt gets
depends on (parameters, prompt, seed, its number in the list) and not on the batch that it happens to share.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sft_jax.datatypes import ConfigError, DataError
from sft_jax.model.families import TransformerConfig
from sft_jax.model.transformer import Cache, decode, empty_cache, forward, output_head
from sft_jax.typing import Array, Bool, Float, Int, Key

_ATTENTION = "reference"  # every machine has it
_SHORTEST = 16
_LOGIT_TOKENS = 512  # tokens whose logits over the whole vocabulary exist at one time when scoring


@dataclass(frozen=True, slots=True)
class Generation:
    """What the model wrote after a prompt, without the stop token. `stopped` is False where max_new_tokens ended it."""

    ids: tuple[int, ...]
    stopped: bool


def generate(
    params: Mapping[str, Array],
    config: TransformerConfig,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    compute_dtype: DTypeLike,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
) -> list[Generation]:
    """Continue each prompt until a stop id or max_new_tokens.

    Args:
      temperature: divides the logits; 0 takes the likeliest token, and top_p and seed are not used.
      top_p: sample from the smallest set of tokens that holds this share of the probability; 1: from all.
      batch_size: prompts decoded together; no result depends on it.

    Raises:
      ConfigError: for an option out of range.
      DataError: for an empty prompt, an id outside the vocabulary, or more tokens than config.max_position.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise ConfigError(f"generate: max_new_tokens {max_new_tokens}, batch_size {batch_size}; expected at least 1.")
    if not 0 <= temperature < float("inf") or not 0 < top_p <= 1:
        raise ConfigError(f"generate: temperature {temperature}, top_p {top_p}; expected >= 0, and in (0, 1].")
    for i, prompt in enumerate(prompts):
        _check_ids(prompt, f"prompt {i}", config, max_new_tokens)

    results: dict[int, Generation] = {}
    row_key = partial(jax.random.fold_in, jax.random.key(seed))
    for numbers, ids, lengths in _batches(prompts, batch_size):
        longest = int(lengths.max()) + max_new_tokens
        rows = _decode_batch(
            params,
            config,
            ids,
            lengths,
            jax.vmap(row_key)(np.asarray(numbers + [0] * (len(ids) - len(numbers)))),
            np.asarray(stop_ids, np.int32),
            max_new_tokens,
            num_slots=_round_up(longest),
            temperature=float(temperature),
            top_p=float(top_p),
            compute_dtype=jnp.dtype(compute_dtype),
        )
        tokens, ends, stopped = jax.device_get((rows.tokens, rows.lengths, rows.stopped))
        for row, number in enumerate(numbers):
            new = tokens[row, lengths[row] : ends[row]].tolist()
            results[number] = Generation(tuple(new), bool(stopped[row]))
    return [results[i] for i in range(len(prompts))]


class _Rows(NamedTuple):
    """The state of a decoding loop. A row's tokens lie at their positions."""

    tokens: Int[Array, "B S"]
    lengths: Int[Array, " B"]
    stopped: Bool[Array, " B"]
    logits: Float[Array, "B V"]  # of the next token
    cache: Cache
    num_steps: Int[Array, ""]


@partial(jax.jit, static_argnames=("config", "num_slots", "temperature", "top_p", "compute_dtype"))
def _decode_batch(
    params: Mapping[str, Array],
    config: TransformerConfig,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    keys: Key[Array, " B"],
    stop_ids: Int[Array, " stops"],
    max_new_tokens: Int[Array, ""],
    *,
    num_slots: int,
    temperature: float,
    top_p: float,
    compute_dtype: DTypeLike,
) -> _Rows:
    """Read the right-padded prompts at once, then write token by token until every row has stopped. A row of length 0
    only fills the batch."""
    batch, width = prompts.shape
    head = output_head(params).astype(compute_dtype)
    row = jnp.arange(batch)
    run = partial(decode, params, config, compute_dtype=compute_dtype, attention=_ATTENTION)

    def write_next(rows: _Rows) -> _Rows:
        step_keys = jax.vmap(jax.random.fold_in)(keys, rows.lengths)
        chosen = choose_tokens(rows.logits, step_keys, temperature, top_p)
        stopped = rows.stopped | jnp.isin(chosen, stop_ids)
        tokens = rows.tokens.at[row, rows.lengths].set(jnp.where(stopped, 0, chosen))
        lengths = rows.lengths + ~stopped
        hidden, cache = run(chosen[:, None], rows.lengths[:, None], rows.lengths + 1, rows.cache)
        return _Rows(tokens, lengths, stopped, _logits(hidden[:, 0], head, config), cache, rows.num_steps + 1)

    positions = jnp.broadcast_to(jnp.arange(width)[None], (batch, width))
    hidden, cache = run(prompts, positions, lengths, empty_cache(config, batch, num_slots, compute_dtype))
    tokens = jnp.pad(prompts, ((0, 0), (0, num_slots - width)))
    logits = _logits(hidden[row, jnp.maximum(lengths - 1, 0)], head, config)
    first = _Rows(tokens, lengths, lengths == 0, logits, cache, jnp.array(0))
    return jax.lax.while_loop(
        lambda rows: (rows.num_steps < max_new_tokens) & ~jnp.all(rows.stopped), write_next, first
    )


def choose_tokens(
    logits: Float[Array, "B V"], keys: Key[Array, " B"], temperature: float, top_p: float
) -> Int[Array, " B"]:
    """One token per row. Source of top_p: nucleus sampling, arXiv:1904.09751, section 3.1.

    Probabilities .5 .3 .1 .06 .04 and top_p .7 leave the first two: a token stays if those above it hold less than .7.
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        kept = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
        lowest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= lowest, logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def score_tokens(
    params: Mapping[str, Array],
    config: TransformerConfig,
    sequences: Sequence[Sequence[int]],
    *,
    compute_dtype: DTypeLike,
    batch_tokens: int = 8192,
) -> list[np.ndarray]:
    """For each sequence, log p (nats) of each id given those before it, [len(ids) - 1]: the first has no prediction.

    Args:
      batch_tokens: about how many tokens are run together; no result depends on it.

    Raises:
      DataError: for an empty sequence, an id outside the vocabulary, or more tokens than config.max_position.
    """
    for i, sequence in enumerate(sequences):
        _check_ids(sequence, f"sequence {i}", config, 0)
    longest = max(map(len, sequences), default=1)
    results: dict[int, np.ndarray] = {}
    for numbers, ids, lengths in _batches(sequences, max(1, batch_tokens // _round_up(longest))):
        scored = _score_batch(params, config, ids, lengths, compute_dtype=jnp.dtype(compute_dtype))
        for number, values, length in zip(numbers, jax.device_get(scored), lengths, strict=False):
            results[number] = values[: length - 1]
    return [results[i] for i in range(len(sequences))]


@partial(jax.jit, static_argnames=("config", "compute_dtype"))
def _score_batch(
    params: Mapping[str, Array],
    config: TransformerConfig,
    ids: Int[Array, "B L"],
    lengths: Int[Array, " B"],
    *,
    compute_dtype: DTypeLike,
) -> Float[Array, "B L"]:
    """Column i: log p of ids[:, i + 1]; the last column means nothing."""
    batch, length = ids.shape
    positions = jnp.broadcast_to(jnp.arange(length)[None], ids.shape)
    segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
    hidden_BLD = forward(
        params,
        config,
        ids,
        positions,
        segment_ids,
        compute_dtype=compute_dtype,
        remat="none",  # there is no backward pass
        attention=_ATTENTION,
    )
    head = output_head(params).astype(compute_dtype)

    def score_chunk(chunk: tuple[Array, Array]) -> Array:
        hidden_TD, targets_T = chunk
        logprobs_TV = jax.nn.log_softmax(_logits(hidden_TD, head, config))
        return jnp.take_along_axis(logprobs_TV, targets_T[:, None], axis=1)[:, 0]

    width = min(_LOGIT_TOKENS, batch * length)  # both are powers of two
    chunks = hidden_BLD.reshape(-1, width, config.embed_dim), jnp.roll(ids, -1, axis=1).reshape(-1, width)
    return jax.lax.map(score_chunk, chunks).reshape(batch, length)


def _logits(hidden: Float[Array, "T D"], head: Float[Array, "V D"], config: TransformerConfig) -> Float[Array, "T V"]:
    wide = jnp.promote_types(hidden.dtype, jnp.float32)  # ties and tails need more than bfloat16
    return config.logit_shape.apply(jnp.einsum("td,vd->tv", hidden, head, preferred_element_type=wide))


def _check_ids(ids: Sequence[int], where: str, config: TransformerConfig, max_new_tokens: int) -> None:
    if not ids:
        raise DataError(f"{where}: has no tokens. Give at least one, such as the tokenizer's bos.")
    if min(ids) < 0 or max(ids) >= config.vocab_size:
        raise DataError(f"{where}: has ids {min(ids)} to {max(ids)}; the vocabulary has 0 to {config.vocab_size - 1}.")
    if len(ids) + max_new_tokens > config.max_position:
        raise DataError(
            f"{where}: {len(ids)} tokens and {max_new_tokens} to generate are more than the model's "
            f"{config.max_position} positions. Shorten it, or generate fewer."
        )


def _batches(sequences: Sequence[Sequence[int]], batch_size: int) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """(numbers of the sequences, right-padded ids [B, L], lengths [B]), alike in length; B and L are powers of two."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        rows = [sequences[i] for i in numbers]
        ids = np.zeros((_round_up(len(rows), 1), _round_up(max(map(len, rows)))), np.int32)
        lengths = np.zeros(len(ids), np.int32)
        for row, sequence in enumerate(rows):
            ids[row, : len(sequence)] = sequence
            lengths[row] = len(sequence)
        yield numbers, ids, lengths


def _round_up(count: int, least: int = _SHORTEST) -> int:
    """The next power of two, at least `least`."""
    return max(least, 1 << (count - 1).bit_length())
