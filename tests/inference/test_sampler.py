import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.datatypes import ConfigError, DataError
from sft_jax.inference.sampler import choose_tokens, generate, score_tokens
from sft_jax.model.families import LayerConfig, TransformerConfig, same_layers
from sft_jax.model.rope import RopeConfig
from sft_jax.model.transformer import forward, init_params, output_head

CONFIG = TransformerConfig(
    vocab_size=32, layers=same_layers(2, LayerConfig(rope=RopeConfig(theta=100.0))), embed_dim=16, mlp_dim=24,
    num_heads=4, num_kv_heads=2, head_dim=4, norm_eps=1e-5, tie_embeddings=False, max_position=64,
    initializer_range=0.4,
)  # fmt: skip
PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8], [30, 2], [4, 4, 4, 4, 4]]  # with 8 new tokens each fits 16 slots


@pytest.fixture(scope="module")
def params():
    return jax.jit(partial(init_params, CONFIG, dtype=jnp.float32))(jax.random.key(0))


@pytest.fixture(scope="module")
def logits_of(params):
    """Logits [L, V] of a whole sequence, with no cache. Padded to one length, so that it compiles once."""

    @jax.jit
    def run(ids, segment_ids):
        options = {"compute_dtype": jnp.float32, "remat": "none", "attention": "reference"}
        hidden = forward(params, CONFIG, ids[None], jnp.arange(32)[None], segment_ids[None], **options)
        return hidden[0] @ output_head(params).T

    def pad_and_run(ids):
        padded = np.zeros((2, 32), np.int32)
        padded[0, : len(ids)], padded[1, : len(ids)] = ids, 1
        return np.asarray(run(*padded))[: len(ids)]

    return pad_and_run


run_generate = partial(generate, stop_ids=(), max_new_tokens=8, compute_dtype=jnp.float32)


def test_greedy_equals_running_the_whole_row_each_time(params, logits_of):
    for prompt, answer in zip(PROMPTS, run_generate(params, CONFIG, PROMPTS), strict=True):
        ids = list(prompt)
        for _ in range(8):
            ids.append(int(np.argmax(logits_of(ids)[-1])))
        assert answer.ids == tuple(ids[len(prompt) :])
        assert not answer.stopped


def test_a_stop_id_ends_its_row_and_is_left_out(params):
    free = run_generate(params, CONFIG, PROMPTS)
    stop = free[2].ids[4]
    stopped = run_generate(params, CONFIG, PROMPTS, stop_ids=(stop, free[0].ids[6]))
    assert any(answer.stopped for answer in stopped)
    for before, after in zip(free, stopped, strict=True):
        ends = [i for i, token in enumerate(before.ids) if token in (stop, free[0].ids[6])]
        assert after.stopped == bool(ends)
        assert after.ids == before.ids[: ends[0] if ends else None]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.9}])
def test_the_batch_changes_no_answer(params, options):
    together = run_generate(params, CONFIG, PROMPTS, **options)
    assert together == run_generate(params, CONFIG, PROMPTS, batch_size=2, **options)
    assert together[:3] == run_generate(params, CONFIG, PROMPTS[:3], **options)


def test_samples_follow_the_seed(params):
    first, again, other = (
        run_generate(params, CONFIG, PROMPTS, temperature=1.0, top_p=0.9, seed=seed) for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other
    same_prompt = run_generate(params, CONFIG, [[5, 9, 3]] * 5, temperature=1.0, top_p=0.9)
    assert len({answer.ids for answer in same_prompt}) > 1


def test_each_step_draws_anew(params):
    uniform = {path: jnp.zeros_like(leaf) for path, leaf in params.items()}
    (answer, *_) = run_generate(uniform, CONFIG, PROMPTS, temperature=1.0, top_p=0.9)
    assert len(set(answer.ids)) > 3


def test_tokens_are_drawn_with_their_probabilities():
    probabilities = np.array([0.5, 0.3, 0.1, 0.06, 0.04])
    keys = jax.random.split(jax.random.key(0), 20_000)
    logits = jnp.tile(jnp.log(jnp.asarray(probabilities)), (20_000, 1))

    def frequencies(temperature, top_p):
        chosen = jax.jit(partial(choose_tokens, temperature=temperature, top_p=top_p))(logits, keys)
        return np.bincount(chosen, minlength=5) / 20_000

    np.testing.assert_allclose(frequencies(1.0, 1.0), probabilities, atol=0.015)
    squared = probabilities**2 / np.sum(probabilities**2)
    np.testing.assert_allclose(frequencies(0.5, 1.0), squared, atol=0.015)
    np.testing.assert_allclose(frequencies(1.0, 0.7), [0.625, 0.375, 0, 0, 0], atol=0.015)
    np.testing.assert_allclose(frequencies(1.0, 0.81), np.array([5, 3, 1, 0, 0]) / 9, atol=0.015)
    np.testing.assert_allclose(frequencies(1.0, 1e-6), [1, 0, 0, 0, 0])
    np.testing.assert_allclose(frequencies(0.0, 1.0), [1, 0, 0, 0, 0])


def test_scores_are_the_log_probabilities_of_the_next_ids(params, logits_of):
    sequences = [[5, 9, 3], [7], list(range(20)), [1, 1]]
    scores = score_tokens(params, CONFIG, sequences, compute_dtype=jnp.float32, batch_tokens=32)
    for ids, values in zip(sequences, scores, strict=True):
        expected = jax.nn.log_softmax(logits_of(ids))[np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(values, expected, atol=1e-5)
    assert score_tokens(params, CONFIG, [], compute_dtype=jnp.float32) == []


def test_logits_are_chunked_when_there_are_many_tokens(params):
    long = dataclasses.replace(CONFIG, max_position=2048)
    ids = np.random.default_rng(0).integers(0, 32, 1500).tolist()
    (alone,) = score_tokens(params, long, [ids], compute_dtype=jnp.float32)
    (head,) = score_tokens(params, long, [ids[:300]], compute_dtype=jnp.float32)
    assert alone.shape == (1499,)
    np.testing.assert_allclose(alone[:299], head, atol=1e-4)


@pytest.mark.parametrize(
    ("prompts", "options", "error", "named"),
    [
        ([[1], []], {}, DataError, "prompt 1: has no tokens"),
        ([[1, 32]], {}, DataError, "prompt 0: has ids 1 to 32"),
        ([[-1]], {}, DataError, "-1"),
        ([[1] * 60], {}, DataError, "60 tokens and 8 to generate"),
        ([[1]], {"max_new_tokens": 0}, ConfigError, "max_new_tokens 0"),
        ([[1]], {"temperature": -1.0}, ConfigError, "temperature -1.0"),
        ([[1]], {"temperature": 1.0, "top_p": 0.0}, ConfigError, "top_p 0.0"),
    ],
)
def test_what_cannot_be_generated_is_refused(params, prompts, options, error, named):
    with pytest.raises(error) as caught:
        run_generate(params, CONFIG, prompts, **options)
    assert named in str(caught.value)


def test_a_sequence_over_the_models_positions_is_not_scored(params):
    with pytest.raises(DataError, match="sequence 1: 65 tokens"):
        score_tokens(params, CONFIG, [[1], [1] * 65], compute_dtype=jnp.float32)
