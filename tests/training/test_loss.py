"""The chunked, sharded loss against a dense one written out, in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.config_schema import LossConfig, MeshConfig
from sft_jax.sharding import build_mesh
from sft_jax.training.loss import sum_cross_entropy

B, L, D, V = 8, 12, 16, 64
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]


def make_inputs(seed=0):
    rng = np.random.default_rng(seed)
    weights = rng.choice([0.0, 0.5, 1.0, 2.0], size=(B, L), p=[0.5, 0.1, 0.3, 0.1])
    weights[1] = 0.0  # with 8 shards of the batch, one has nothing to do
    return (
        jnp.asarray(rng.normal(size=(B, L, D))),
        jnp.asarray(rng.normal(size=(V, D))),
        jnp.asarray(rng.integers(0, V, size=(B, L)), jnp.int32),
        jnp.asarray(weights),
    )


def dense_loss(hidden, head, targets, weights, config):
    logits = hidden @ head.T
    log_z = jax.nn.logsumexp(logits, axis=-1)
    log_p = logits - log_z[..., None]
    nll = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    s = config.label_smoothing
    loss = (1 - s) * nll - s * log_p.mean(axis=-1) + config.z_loss_weight * log_z**2
    return jnp.sum(weights * loss), nll


def relative(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


@pytest.mark.parametrize("chunk_tokens", [1, 5, 32, 1000])
@pytest.mark.parametrize(("z_loss_weight", "label_smoothing"), [(0.0, 0.0), (1e-2, 0.0), (0.0, 0.1), (1e-2, 0.1)])
def test_equals_the_dense_loss_and_its_gradients(chunk_tokens, z_loss_weight, label_smoothing):
    with jax.enable_x64(True):
        inputs = make_inputs()
        config = LossConfig(chunk_tokens=chunk_tokens, z_loss_weight=z_loss_weight, label_smoothing=label_smoothing)
        (expected, nll), grads = jax.value_and_grad(dense_loss, argnums=(0, 1), has_aux=True)(*inputs, config)
        sums = sum_cross_entropy(*inputs, config)
        got = jax.grad(lambda h, w: 3 * sum_cross_entropy(h, w, *inputs[2:], config).loss_sum, argnums=(0, 1))(
            *inputs[:2]
        )
        assert relative(sums.loss_sum, expected) < 1e-12
        assert relative(sums.weight_sum, inputs[3].sum()) == 0
        np.testing.assert_allclose(sums.nll, jnp.where(inputs[3] != 0, nll, 0), rtol=1e-12)
        for a, b in zip(got, grads, strict=True):
            assert relative(a, 3 * b) < 1e-12


@pytest.mark.parametrize("shape", MESHES)
def test_a_mesh_changes_nothing(shape):
    with jax.enable_x64(True):
        inputs = make_inputs()
        config = LossConfig(chunk_tokens=5, z_loss_weight=1e-2, label_smoothing=0.1)
        mesh = build_mesh(MeshConfig(**dict(zip(("replica", "fsdp", "tensor"), shape, strict=True))))

        def loss(hidden, head, mesh):
            sums = sum_cross_entropy(hidden, head, *inputs[2:], config, mesh)
            return sums.loss_sum, sums

        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
        (expected, sums_1), grads_1 = run(*inputs[:2], None)
        (got, sums_n), grads_n = run(*inputs[:2], mesh)
        assert relative(got, expected) < 1e-12
        np.testing.assert_allclose(sums_n.nll, sums_1.nll, rtol=1e-12)
        np.testing.assert_array_equal(sums_n.correct, sums_1.correct)
        for a, b in zip(grads_n, grads_1, strict=True):
            assert relative(a, b) < 1e-12


def test_correct_marks_the_likeliest_token():
    hidden, head, targets, weights = make_inputs()
    sums = sum_cross_entropy(hidden, head, targets, weights, LossConfig())
    likeliest = jnp.argmax(hidden @ head.T, axis=-1) == targets
    np.testing.assert_array_equal(sums.correct, likeliest & (weights != 0))
    best = sum_cross_entropy(hidden, head, jnp.argmax(hidden @ head.T, axis=-1), weights, LossConfig())
    np.testing.assert_array_equal(best.correct, weights != 0)


def compiled_text(mesh, config):
    hidden, head, targets, weights = make_inputs()
    loss = lambda h, w: sum_cross_entropy(h, w, targets, weights, config, mesh).loss_sum  # noqa: E731
    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, head).compile().as_text()


@pytest.mark.parametrize(
    ("axes", "allowed"),
    [
        ({"fsdp": 8}, None),
        # Neighbours along `tensor`, as XLA writes them before and since jax 0.12.
        ({"fsdp": 4, "tensor": 2}, r"\{\{0,1\},\{2,3\},\{4,5\},\{6,7\}\}|mesh\[[^]]*\] \{'tensor'\}"),
    ],
)
def test_no_collective_over_the_batch_inside_the_loop(axes, allowed):
    """Shards run different numbers of chunks: a collective over a batch axis in the loop would never complete."""
    text = compiled_text(build_mesh(MeshConfig(**axes)), LossConfig(chunk_tokens=5))
    bodies = set(re.findall(r"body=%?([\w.-]+)", text))
    assert bodies, "the loss is not a loop any more: look at what this test should inspect"
    computations = {m[1]: m[2] for m in re.finditer(r"^%?([\w.-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S)}
    assert "all-reduce" in text or "reduce-scatter" in text
    lines = [line for body in bodies for line in computations[body].splitlines()]
    collectives = [line for line in lines if re.search(r" (all-|reduce-scatter|collective-)[\w-]*\(", line)]
    assert bool(collectives) == bool(allowed)
    for line in collectives:
        assert re.search(f"replica_groups=({allowed}),", line), line


def test_no_array_of_all_logits():
    text = compiled_text(None, LossConfig(chunk_tokens=5))
    assert f"[5,{V}]" in text
    assert f"[{B * L},{V}]" not in text
    assert f"[{B},{L},{V}]" not in text
