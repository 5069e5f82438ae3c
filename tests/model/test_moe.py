"""Mixtures of experts in float64: beside a plain loop, on meshes, with padding, packed and apart."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.config_schema import MeshConfig
from sft_jax.datatypes import ConfigError
from sft_jax.model import gradient_sums
from sft_jax.model.gradient_sums import Torus
from sft_jax.model.moe import MoeMlp
from sft_jax.model.moe_config import MoeConfig
from sft_jax.model.presets import PRESETS
from sft_jax.model.router import Choice, TokenWeights, choose_experts, sum_router
from sft_jax.sharding import build_mesh

D, B, L = 8, 8, 6
CONFIG = dataclasses.replace(PRESETS["testbed"], embed_dim=D, initializer_range=0.5)
VARIANTS = {
    "mixtral": MoeConfig(num_experts=4, experts_per_token=2, expert_dim=12),
    "qwen3_moe": MoeConfig(num_experts=8, experts_per_token=3, expert_dim=4, normalize_weights=False),
    "gpt_oss": MoeConfig(
        num_experts=4, experts_per_token=2, expert_dim=8, router_bias=True, expert_bias=True, clamp=1.0
    ),
    "deepseek_v3": MoeConfig(
        num_experts=8, experts_per_token=3, expert_dim=4, scores="sigmoid", weights_multiplier=2.5,
        correction_bias=True, num_groups=4, groups_per_token=2, shared_dim=8,
    ),
}  # fmt: skip
SEGMENT_IDS = jnp.asarray([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1]] * 4)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def make_params(moe: MoeConfig):
    """Every parameter random, biases too."""
    module = jax.eval_shape(lambda: MoeMlp(CONFIG, moe, jax.random.key(0), jnp.float64))
    rng, (structure, shapes) = np.random.default_rng(3), jax.tree.flatten(module)[::-1]
    return jax.tree.unflatten(structure, [jnp.asarray(rng.normal(scale=0.5, size=leaf.shape)) for leaf in shapes])


def make_inputs(seed=0):
    rng = np.random.default_rng(seed)
    weights = jnp.asarray(rng.random((B, L)) * (rng.random((B, L)) < 0.7))
    return jnp.asarray(rng.normal(size=(B, L, D))), TokenWeights(SEGMENT_IDS, weights)


def total(module, x, tokens, mesh=None):
    """A number that every output bears on."""
    y, sums = module(x, tokens, mesh)
    return jnp.sum(jnp.sin(y)) + 0.3 * sums.balance + 0.1 * sums.z_loss, (y, sums)


@partial(jax.jit, static_argnames="mesh")
def run(module, x, tokens, mesh=None):
    return jax.value_and_grad(total, (0, 1), has_aux=True)(module, x, tokens, mesh)


def relative(tree, other):
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return max(float(jnp.linalg.norm(a - b) / jnp.maximum(jnp.linalg.norm(b), 1e-300)) for a, b in pairs)


def plain(module, x, tokens):
    """Every expert on every token, weighed by 0 where it was not chosen."""
    moe, choice = module.router.moe, module.router(x)
    live = (tokens.segment_ids != 0)[..., None]
    y = jnp.zeros_like(x)
    for e in range(moe.num_experts):

        def apply(name, h, e=e):
            linear = getattr(module.experts, name)
            return h @ linear.kernel[...][e] + (linear.bias[...][e][None, None] if moe.expert_bias else 0)

        gate, up = apply("gate", x), apply("up", x)
        if moe.clamp:
            gate, up = jnp.minimum(gate, moe.clamp), jnp.maximum(jnp.minimum(up, moe.clamp), -moe.clamp) + 1
            hidden = gate / (1 + jnp.exp(-1.702 * gate)) * up
        else:
            hidden = gate / (1 + jnp.exp(-gate)) * up
        weight = jnp.sum(jnp.where(choice.experts == e, choice.weights, 0), axis=-1, keepdims=True)
        y = y + jnp.where(live, weight * apply("down", hidden), 0)
    if moe.shared_dim:
        y = y + module.shared(x, None)
    sums = sum_router(choice, tokens)
    return jnp.sum(jnp.sin(y)) + 0.3 * sums.balance + 0.1 * sums.z_loss, (y, sums)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_loop_over_experts_gives_the_same(name):
    module, (x, tokens) = make_params(VARIANTS[name]), make_inputs()
    assert (
        relative(run(module, x, tokens), jax.jit(jax.value_and_grad(plain, (0, 1), has_aux=True))(module, x, tokens))
        < 1e-12
    )


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize(
    "axes", [{"expert": 4, "fsdp": 2}, {"expert": 2, "fsdp": 2, "tensor": 2}, {"replica": 2, "tensor": 4}]
)
def test_a_mesh_changes_nothing(name, axes):
    module, (x, tokens) = make_params(VARIANTS[name]), make_inputs()
    assert (
        relative(run(module, x, tokens, build_mesh(MeshConfig(**({"fsdp": 1} | axes)))), run(module, x, tokens)) < 1e-9
    )


def test_sums_that_go_round_a_torus_change_nothing(monkeypatch):
    monkeypatch.setattr(gradient_sums, "find_torus", lambda mesh: Torus((2, 2), (True, True)))
    module, (x, tokens) = make_params(VARIANTS["gpt_oss"]), make_inputs()
    mesh = build_mesh(MeshConfig(fsdp=4, expert=2))
    assert relative(run(module, x, tokens, mesh), run(module, x, tokens)) < 1e-9


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_padding_reaches_nothing(name):
    module, (x, tokens) = make_params(VARIANTS[name]), make_inputs()
    (_, (y, sums)), grads = run(module, x, tokens)
    live = tokens.segment_ids != 0
    bad = jnp.where(live[..., None], x, 1e6)
    counted = TokenWeights(tokens.segment_ids, jnp.where(live, tokens.weights, 7.0))
    (_, (other_y, other_sums)), other_grads = run(module, bad, counted)
    assert relative(other_sums, sums) == 0
    np.testing.assert_array_equal(y[live], other_y[live])
    assert float(jnp.sum(sums.chosen)) == int(live.sum()) * VARIANTS[name].experts_per_token
    if name == "mixtral":  # without shared experts padding is 0, and nothing passes back through it
        assert not jnp.any(other_y[~live])
        assert relative(other_grads[0], grads[0]) < 1e-12


def test_experts_are_scanned_over_layers():
    moe = VARIANTS["deepseek_v3"]
    x, tokens = make_inputs()
    layers = [make_params(moe) for _ in range(2)]
    layers[1] = jax.tree.map(lambda leaf: 0.5 * leaf, layers[1])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    scanned, sums = jax.lax.scan(jax.checkpoint(lambda h, layer: layer(h, tokens, None)), x, stacked)
    one, first = layers[0](x, tokens, None)
    two, second = layers[1](one, tokens, None)
    assert relative(scanned, two) < 1e-12
    assert relative(sums, jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)) < 1e-12


def test_packing_changes_no_sum():
    moe = VARIANTS["deepseek_v3"]
    module, (x, tokens) = make_params(moe), make_inputs()
    packed = module(x, tokens, None)[1]
    apart = [
        module(x, TokenWeights((segment == SEGMENT_IDS).astype(jnp.int32), tokens.weights), None)[1]
        for segment in (1, 2)
    ]
    assert relative(packed, jax.tree.map(jnp.add, *apart)) < 1e-12


def test_balance_by_hand():
    """The example of router.py, with a third token that has no weight and a fourth that is padding."""
    shares = jnp.asarray([[[0.75, 0.25], [0.5, 0.5], [0.1, 0.9], [0.1, 0.9]]])
    choice = Choice(jnp.asarray([[[0], [0], [1], [1]]]), jnp.ones((1, 4, 1)), shares, jnp.log(3 * shares))
    sums = sum_router(choice, TokenWeights(jnp.asarray([[1, 1, 1, 0]]), jnp.asarray([[1.0, 1.0, 0.0, 1.0]])))
    np.testing.assert_allclose(sums.balance, 2 * 1.25)
    np.testing.assert_allclose(sums.z_loss, 2 * np.log(3) ** 2)
    np.testing.assert_array_equal(sums.chosen, [2, 1])


def test_groups_and_correction_by_hand():
    """Expert 0 is best but its group of two is not; the correction lifts expert 5 above 4, and its weight stays."""
    moe = dataclasses.replace(
        VARIANTS["deepseek_v3"], num_experts=6, num_groups=3, groups_per_token=1, experts_per_token=1
    )
    scores = jnp.asarray([[[0.9, 0.1, 0.3, 0.3, 0.7, 0.6]]])
    logits = jnp.log(scores / (1 - scores))
    correction = jnp.asarray([0.0, 0, 0, 0, 0, 0.2])
    moe_plain = dataclasses.replace(moe, normalize_weights=False)
    choice = choose_experts(logits, correction, moe_plain)
    assert choice.experts.tolist() == [[[5]]]
    np.testing.assert_allclose(choice.weights, [[[2.5 * 0.6]]])
    assert choose_experts(logits, None, moe_plain).experts.tolist() == [[[4]]]
    np.testing.assert_allclose(choose_experts(logits, correction, moe).weights, [[[2.5]]])


def test_the_router_is_float32_in_bfloat16_models():
    module = make_params(VARIANTS["gpt_oss"])
    x, tokens = make_inputs()
    y, _ = module(x.astype(jnp.bfloat16), tokens, None)
    assert y.dtype == jnp.bfloat16
    assert module.router(x.astype(jnp.bfloat16)).logits.dtype == jnp.float32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_groups=3), "groups of equal size"),
        (dict(num_groups=2, groups_per_token=3), "groups of equal size"),
        (dict(experts_per_token=9), "8 to choose from"),
        (dict(num_groups=8), "judged by its best two"),
        (dict(scores="tanh"), "softmax or sigmoid"),
        (dict(expert_dim=0), "expert_dim is 0"),
    ],
)  # fmt: skip
def test_wrong_configs_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        MoeConfig(**(dict(num_experts=8, experts_per_token=1, expert_dim=4) | fields))


def test_experts_have_the_models_activation():
    x, tokens = make_inputs()
    gelu_config = dataclasses.replace(CONFIG, activation="gelu_tanh")
    silu, gelu = (
        MoeMlp(config, VARIANTS["mixtral"], jax.random.key(0), jnp.float64)(x, tokens, None)[0]
        for config in (CONFIG, gelu_config)
    )
    assert jnp.max(jnp.abs(silu - gelu)) > 1e-3
