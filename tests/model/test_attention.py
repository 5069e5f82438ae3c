from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.datatypes import ConfigError
from sft_jax.model import attention
from sft_jax.model.attention import Rows, Scores, attend

SCORES = Scores(0.5)  # of heads of 4


@partial(jax.jit, static_argnames="scores")
def reference(q, k, v, rows, kv_rows=None, sinks=None, scores=SCORES):
    return attention.reference(q, k, v, rows, scores, kv_rows, sinks)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def make_qkv(batch, length, num_heads, num_kv_heads, head_dim, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(batch, length, heads, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


def pack_rows(*rows_of_lengths, length):
    """Rows of segments with these lengths, padded: pack_rows([3, 2], length=6)."""
    positions, segment_ids = np.zeros((2, len(rows_of_lengths), length), np.int32)
    for row, lengths in enumerate(rows_of_lengths):
        start = 0
        for number, n in enumerate(lengths, 1):
            positions[row, start : start + n] = np.arange(n)
            segment_ids[row, start : start + n] = number
            start += n
    return Rows(jnp.asarray(positions), jnp.asarray(segment_ids))


def attend_slowly(q, k, v, rows, kv_rows, window=None, softcap=None, sinks=None):
    """Query by query, from the definition."""
    q, k, v, positions, segments, kv_positions, kv_segments = map(np.asarray, (q, k, v, *rows, *kv_rows))
    groups = q.shape[2] // k.shape[2]
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for b, i, n in np.ndindex(q.shape[:3]):
        seen = (kv_segments[b] == segments[b, i]) & (kv_positions[b] <= positions[b, i]) & (segments[b, i] != 0)
        if window:
            seen &= kv_positions[b] > positions[b, i] - window
        if seen.any():
            scores = k[b, seen, n // groups] @ q[b, i, n] / np.sqrt(q.shape[3])
            scores = softcap * np.tanh(scores / softcap) if softcap else scores
            weights, sink = np.exp(scores - scores.max()), 0
            if sinks is not None:
                sink = np.exp(sinks[n] - scores.max())
            out[b, i, n] = weights @ v[b, seen, n // groups] / (weights.sum() + sink)
    return out


@pytest.mark.parametrize(("length", "packed"), [(6, [[3, 2], [6]]), (300, [[120, 70, 100], [130, 170]])])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_reference_follows_the_definition(length, packed, num_heads, num_kv_heads):
    q, k, v = make_qkv(2, length, num_heads, num_kv_heads, head_dim=4)
    rows = pack_rows(*packed, length=length)
    expected = attend_slowly(q, k, v, rows, rows)
    np.testing.assert_allclose(reference(q, k, v, rows), expected, atol=1e-12)
    np.testing.assert_allclose(reference(q, k, v, rows, rows), expected, atol=1e-12)


@pytest.mark.parametrize("options", [{"window": 1}, {"window": 7}, {"window": 130}, {"softcap": 0.7}, {"sinks": True},
                                     {"window": 90, "softcap": 2.0, "sinks": True}])  # fmt: skip
def test_windows_softcaps_and_sinks_follow_the_definition(options):
    q, k, v = make_qkv(2, 300, 4, 2, head_dim=4)
    v = v[..., :3]  # values may be narrower than keys
    rows = pack_rows([120, 70, 100], [130, 170], length=300)
    sinks = np.array([-1.0, 0.0, 1.0, 5.0]) if options.pop("sinks", False) else None
    expected = attend_slowly(q, k, v, rows, rows, sinks=sinks, **options)
    scores = SCORES._replace(**options)
    np.testing.assert_allclose(reference(q, k, v, rows, sinks=sinks, scores=scores), expected, atol=1e-12)
    np.testing.assert_allclose(reference(q, k, v, rows, rows, sinks=sinks, scores=scores), expected, atol=1e-12)


def test_queries_read_a_cache_of_other_length_and_order():
    q, k, v = make_qkv(2, 7, 4, 2, head_dim=4)
    q = q[:, :3]
    rows = Rows(jnp.array([[4, 5, 6], [2, 3, 9]]), jnp.array([[1, 1, 1], [1, 1, 0]]))
    kv_rows = Rows(jnp.array([[6, 5, 4, 3, 2, 1, 0]] * 2), jnp.array([[1, 1, 1, 1, 1, 1, 1], [1, 0, 0, 1, 1, 0, 1]]))
    np.testing.assert_allclose(reference(q, k, v, rows, kv_rows), attend_slowly(q, k, v, rows, kv_rows), atol=1e-12)


def test_padding_gives_zeros_and_takes_no_gradient():
    q, k, v = make_qkv(1, 6, 2, 2, head_dim=4)
    rows = pack_rows([3], length=6)

    def loss(q, k, v):  # deliberately reads the padding's outputs too
        return jnp.sum(jnp.sin(reference(q, k, v, rows) + 1))

    assert np.array_equal(reference(q, k, v, rows)[:, 3:], np.zeros((1, 3, 2, 4)))
    for grad in jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v):
        assert np.isfinite(grad).all()
        assert np.abs(grad[:, 1:3]).min() > 0
        assert np.array_equal(grad[:, 3:], np.zeros((1, 3, 2, 4)))


def test_a_batch_of_nothing_but_padding_is_finite():
    q, k, v = (1e4 * x for x in make_qkv(1, 5, 2, 1, head_dim=4))
    rows = pack_rows([], length=5)
    value, grads = jax.jit(jax.value_and_grad(lambda *qkv: reference(*qkv, rows).sum(), (0, 1, 2)))(q, k, v)
    assert value == 0
    assert all(np.array_equal(grad, np.zeros(grad.shape)) for grad in grads)


def test_large_scores_do_not_overflow():
    q, k, v = make_qkv(1, 5, 1, 1, head_dim=4)
    rows = pack_rows([5], length=5)
    out = reference(*(x.astype(jnp.float32) for x in (1e3 * q, 1e3 * k, v)), rows)
    np.testing.assert_allclose(out, attend_slowly(1e3 * q, 1e3 * k, v, rows, rows), atol=1e-5)


def test_bfloat16_keeps_the_softmax_in_float32():
    q, k, v = (x.astype(jnp.bfloat16) for x in make_qkv(1, 64, 2, 2, head_dim=16))
    rows = pack_rows([64], length=64)
    out = reference(8 * q, k, v, rows, scores=Scores(0.25))  # scores of about 8, where bfloat16 is off by 0.03
    assert out.dtype == jnp.bfloat16
    expected = attend_slowly(*(x.astype(jnp.float32) for x in (8 * q, k, v)), rows, rows)
    assert np.linalg.norm(out.astype(jnp.float32) - expected) / np.linalg.norm(expected) < 5e-3


def test_unknown_kernel_is_refused():
    q, k, v = make_qkv(1, 5, 1, 1, head_dim=4)
    with pytest.raises(ConfigError, match="'flush'"):
        attend("flush", q, k, v, pack_rows([5], length=5), SCORES)
