"""The step of a mixture of experts in float64, with both losses of the router: the invariants of test_step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_step
from test_step import B, assert_same_update, make_batch, make_config, make_params, one_step, relative, unpack

from sft_jax.config_schema import MeshConfig
from sft_jax.datatypes import ConfigError
from sft_jax.model.families import LayerConfig, LayerGroup
from sft_jax.model.moe_config import MoeConfig
from sft_jax.model.rope import RopeConfig
from sft_jax.training.metrics import StepMeter
from sft_jax.training.step import narrow_kernels, sum_batch_loss

MIXTURE = MoeConfig(
    num_experts=8, experts_per_token=3, expert_dim=8, scores="sigmoid", weights_multiplier=2.0, correction_bias=True,
    num_groups=4, groups_per_token=2, shared_dim=16,
)  # fmt: skip
DENSE = LayerConfig(rope=RopeConfig(theta=100.0))
LAYERS = (LayerGroup((DENSE,), 1), LayerGroup((dataclasses.replace(DENSE, moe=MIXTURE),), 2))
LOSSES = {"router_balance_weight": 0.3, "router_z_loss_weight": 0.05}


@pytest.fixture(autouse=True)
def _mixture(monkeypatch):
    monkeypatch.setattr(test_step, "MODEL", dataclasses.replace(test_step.MODEL, layers=LAYERS))
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def reference():
    """By `router_tokens`: one device, one microbatch, the packed batch."""
    cache = {}

    def step(tokens):
        if tokens not in cache:
            cache[tokens] = one_step(make_config(loss=LOSSES | {"router_tokens": tokens}), make_batch())
        return cache[tokens]

    return step


def assert_same_router(one, other):
    for name in ("router/balance", "router/z_loss", "router/largest_load", "router/idle_fraction"):
        np.testing.assert_allclose(one[2][name], other[2][name], rtol=1e-9)


@pytest.mark.parametrize(
    "axes",
    [
        {"expert": 8}, {"fsdp": 2, "tensor": 2, "expert": 2}, {"context": 4, "expert": 2},
        *(pytest.param(axes, marks=pytest.mark.slow) for axes in (
            {"replica": 8}, {"fsdp": 8}, {"context": 8}, {"tensor": 8}, {"replica": 2, "tensor": 4},
            {"fsdp": 2, "expert": 4}, {"replica": 2, "fsdp": 2, "expert": 2}, {"context": 2, "tensor": 2, "expert": 2},
        )),
    ],
    ids=str,
)  # fmt: skip
def test_a_mesh_changes_nothing(axes, reference):
    other = one_step(make_config(loss=LOSSES), make_batch(), MeshConfig(**({"fsdp": 1} | axes)))
    assert_same_update(other, reference("all"))
    assert_same_router(other, reference("all"))


@pytest.mark.parametrize("tokens", ["all", "supervised"])
def test_microbatches_and_packing_change_nothing(tokens, reference):
    losses = LOSSES | {"router_tokens": tokens}
    for config, batch in (
        (make_config(loss=losses, batch={"grad_accum_steps": 4}), make_batch()),
        (make_config(loss=losses), unpack(make_batch())),
    ):
        other = one_step(config, batch)
        assert_same_update(other, reference(tokens))
        assert_same_router(other, reference(tokens))


def test_the_losses_are_added_and_count_the_tokens_that_are_asked_for(reference):
    """SGD without momentum shows the gradient: that of the cross-entropy, and of the means of the two losses."""
    sgd = {"name": "sgd", "b1": 0.0, "weight_decay": 0.0, "grad_clip_norm": 0.0}
    batch, params = make_batch(), make_params()
    for tokens, weights in (("all", (batch.segment_ids != 0).astype(float)), ("supervised", batch.loss_weights)):
        config = make_config(loss=LOSSES | {"router_tokens": tokens}, optimizer=sgd)

        def loss(p, scale, config=config):
            options = dict(config=config, model=test_step.MODEL, mesh=None, noise_seed=None, router_scale=scale)
            return sum_batch_loss(p, {}, batch, **options)

        scale = jnp.asarray(float(batch.loss_weights.sum()) / float(weights.sum()))
        (total, sums), grads = jax.value_and_grad(loss, has_aux=True)(params, scale)
        balance, z_loss = (float(jnp.mean(part)) for part in (sums.router.balance, sums.router.z_loss))
        expected = sums.loss_sum + scale * (0.3 * balance + 0.05 * z_loss)
        np.testing.assert_allclose(total, expected, rtol=1e-12)
        before, after, metrics = one_step(config, batch)
        grads = {path: grad / batch.loss_weights.sum() for path, grad in grads.items()}
        assert relative(after.params, {path: before.params[path] - 1e-2 * grad for path, grad in grads.items()}) < 1e-9
        np.testing.assert_allclose(metrics["router/balance"], balance / float(weights.sum()), rtol=1e-9)
    assert reference("all")[2]["loss"] == pytest.approx(reference("supervised")[2]["loss"], rel=1e-12)
    assert relative(reference("all")[1].params, reference("supervised")[1].params) > 1e-4


def test_the_correction_is_never_trained(reference):
    before, after, metrics = reference("all")
    path = "layers.1.0.mlp.router.correction"
    np.testing.assert_array_equal(before.params[path], after.params[path])
    assert 1 < metrics["router/largest_load"] < 8
    assert 0 <= metrics["router/idle_fraction"] < 1
    record = StepMeter(["a", "b"], flops_per_token=1).add(metrics)
    assert {name: record[name] for name in metrics if name.startswith("router/")} == {
        name: float(value) for name, value in metrics.items() if name.startswith("router/")
    }
    assert B == 8


def test_a_model_without_experts_has_no_such_losses(monkeypatch):
    monkeypatch.setattr(test_step, "MODEL", dataclasses.replace(test_step.MODEL, layers=LAYERS[:1]))
    with pytest.raises(
        ConfigError, match=r"config.loss.router_z_loss_weight: is 0.05, and the model .llama. has no exp"
    ):
        one_step(make_config(loss={"router_z_loss_weight": 0.05}), make_batch())


def test_kernels_of_experts_and_routers_are_not_narrowed():
    config = make_config(model={"param_dtype": "float32", "compute_dtype": "bfloat16"}, loss=LOSSES)
    params = {path: value.astype(jnp.float32) for path, value in make_params().items()}

    def loss(params):
        return sum_batch_loss(
            params, {}, make_batch(), config=config, model=test_step.MODEL, mesh=None, noise_seed=None,
            router_scale=jnp.float32(1),
        )[0]  # fmt: skip

    narrow = narrow_kernels(params, "bfloat16")
    kernels = {path for path in params if path.endswith(".kernel")}
    wide = {path for path in kernels if ".router." in path or ".experts." in path}
    assert len(wide) == 4
    assert {path for path in params if narrow[path].dtype == jnp.bfloat16} == kernels - wide
    grad = jax.jit(jax.value_and_grad(loss))
    for one, other in zip(*map(jax.tree.leaves, (grad(params), grad(narrow))), strict=True):
        assert np.array_equal(one, other.astype(one.dtype))
