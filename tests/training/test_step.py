"""The step's invariants, in float64: packing, microbatches, meshes and bad numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.config_schema import (
    BatchConfig,
    Config,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from sft_jax.model import gradient_sums
from sft_jax.model.families import LayerConfig, TransformerConfig, same_layers
from sft_jax.model.gradient_sums import Torus
from sft_jax.model.param_dims import logical_dims
from sft_jax.model.rope import RopeConfig
from sft_jax.model.transformer import abstract_params
from sft_jax.sharding import Batch, build_mesh, shardings_for, spec_for
from sft_jax.training.optimizer import build_optimizer, build_schedule
from sft_jax.training.state import abstract_state, init_state, split_params
from sft_jax.training.step import make_eval_step, make_train_step, narrow_kernels, sum_batch_loss

MODEL = TransformerConfig(
    vocab_size=48, layers=same_layers(2, LayerConfig(rope=RopeConfig(theta=100.0))), embed_dim=16, mlp_dim=24,
    num_heads=16, num_kv_heads=8, head_dim=4, norm_eps=1e-5, tie_embeddings=True, max_position=64,
    initializer_range=0.3,
)  # fmt: skip
B, L = 8, 16


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def make_config(**sections):
    model = ModelConfig(preset="testbed", param_dtype="float64", compute_dtype="float64", remat="none")
    base = Config(
        model=model,
        batch=BatchConfig(batch_size=B),
        loss=LossConfig(chunk_tokens=7, z_loss_weight=1e-3, label_smoothing=0.05),
        optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, accum_dtype="float64", moment_dtype="float64"),
        schedule=ScheduleConfig(name="constant", warmup_steps=0),
    )
    changed = {name: dataclasses.replace(getattr(base, name), **fields) for name, fields in sections.items()}
    return dataclasses.replace(base, **changed)


def make_batch(seed=0, rows=B):
    """Rows of two segments and padding, with very unequal supervision from row to row."""
    rng = np.random.default_rng(seed)
    segment_ids, positions = np.zeros((rows, L), np.int32), np.zeros((rows, L), np.int32)
    for row in range(rows):
        first, second = rng.integers(3, 9), rng.integers(2, 7)
        segment_ids[row, :first], segment_ids[row, first : first + second] = 1, 2
        positions[row, :first], positions[row, first : first + second] = np.arange(first), np.arange(second)
    weights = rng.choice([0.0, 0.5, 1.0], size=(rows, L)) * (segment_ids != 0)
    weights[1::2] *= rng.random((rows // 2, L)) < 0.1
    weights[0, 0] = 1.0
    ids = lambda: rng.integers(0, MODEL.vocab_size, (rows, L), dtype=np.int32)  # noqa: E731
    batch = Batch(
        ids(),
        ids(),
        weights.astype(np.float32),
        segment_ids,
        positions,
        segment_ids % 2,
        np.arange(rows, dtype=np.int32),
    )
    return jax.tree.map(jnp.asarray, batch)


def make_params():
    """Drawn with numpy: compiling jax's random draws takes longer than all the rest."""
    rng = np.random.default_rng(1)
    draw = lambda path, shape: np.ones(shape) if path.endswith("scale") else rng.normal(scale=0.3, size=shape)  # noqa: E731
    return {path: jnp.asarray(draw(path, leaf.shape)) for path, leaf in abstract_params(MODEL, "float64").items()}


def make_state(config, mesh, freeze=()):
    params = make_params()
    shardings = shardings_for(mesh, {p: logical_dims(p) for p in params}, {p: v.shape for p, v in params.items()})
    trainable, frozen = split_params({p: jax.device_put(v, shardings[p]) for p, v in params.items()}, freeze)
    return init_state(trainable, build_optimizer(config.optimizer, seed=0)), frozen


def one_step(config, batch, mesh_config=None, freeze=()):
    """(state before, state after, metrics), on the host."""
    mesh = build_mesh(mesh_config or MeshConfig(fsdp=1), None if mesh_config else jax.devices()[:1])
    state, frozen = make_state(config, mesh, freeze)
    schedule = build_schedule(config.schedule, config.optimizer.learning_rate, 10)
    place = lambda x: jax.device_put(x, jax.NamedSharding(mesh, spec_for(("batch", "seq")[: x.ndim])))  # noqa: E731
    step = jax.jit(
        make_train_step(config, MODEL, build_optimizer(config.optimizer, seed=0), schedule, mesh, num_sources=2)
    )
    return jax.device_get((state, *step(state, frozen, jax.tree.map(place, batch))))


@functools.lru_cache
def reference_step(neftune_alpha=0.0, tie_embeddings=True):
    """One device, one microbatch, the packed batch. MODEL is set by the caller to what `tie_embeddings` says."""
    return one_step(make_config(model={"neftune_alpha": neftune_alpha}), make_batch())


def relative(tree, other):
    def of(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300)

    return max(jax.tree.leaves(jax.tree.map(of, tree, other)))


def assert_same_update(one, other, bound=1e-9):
    for name in ("loss", "grad_norm", "weight_sum", "nll_sum", "correct_sum"):
        np.testing.assert_allclose(one[2][name], other[2][name], rtol=bound)
    assert relative(one[1].opt_state, other[1].opt_state) < bound  # the first moment is the gradient, clipped
    assert relative(one[1].params, other[1].params) < bound
    before = one[0].params
    change = {path: one[1].params[path] - before[path] for path in before}
    assert relative(change, {path: other[1].params[path] - before[path] for path in before}) < 1e3 * bound


@pytest.mark.parametrize(
    ("axes", "tie_embeddings"),
    [
        ({"replica": 8}, True), ({"fsdp": 8}, True), ({"context": 8}, True), ({"tensor": 8}, True),
        ({"expert": 8}, False), ({"fsdp": 2, "tensor": 4}, False),
        ({"replica": 2, "fsdp": 2, "tensor": 2}, True), ({"replica": 2, "fsdp": 2, "tensor": 2}, False),
        ({"fsdp": 2, "context": 4}, False), ({"context": 2, "tensor": 4}, True),
        ({"replica": 2, "context": 2, "tensor": 2}, False),
    ],
    ids=str,
)  # fmt: skip
def test_a_mesh_changes_nothing(axes, tie_embeddings, monkeypatch):
    monkeypatch.setitem(globals(), "MODEL", dataclasses.replace(MODEL, tie_embeddings=tie_embeddings))
    config, batch = make_config(), make_batch()
    mesh = MeshConfig(**({"fsdp": 1} | axes))
    assert_same_update(one_step(config, batch, mesh), reference_step(tie_embeddings=tie_embeddings))


@pytest.mark.parametrize(
    ("axes", "torus"),
    [
        ({"fsdp": 8}, Torus((2, 4), (True, True))), ({"fsdp": 4, "tensor": 2}, Torus((4,), (True,))),
        ({"fsdp": 8}, Torus((2, 2, 2), (False, True, True))),
    ],
    ids=str,
)  # fmt: skip
def test_sums_that_go_round_a_torus_change_nothing(axes, torus, monkeypatch):
    reference = reference_step()
    monkeypatch.setattr(gradient_sums, "find_torus", lambda mesh: torus)
    assert_same_update(one_step(make_config(), make_batch(), MeshConfig(**axes)), reference)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("mesh", [None, MeshConfig(fsdp=2, tensor=4)])
def test_microbatches_change_nothing(parts, mesh):
    noise = {"neftune_alpha": 5.0}
    config = make_config(batch={"grad_accum_steps": parts}, model=noise)
    assert_same_update(one_step(config, make_batch(), mesh), reference_step(neftune_alpha=5.0))


@pytest.mark.parametrize("remat", ["dots", "attention", "full", "offload", "offload_attention"])
@pytest.mark.parametrize("mesh", [None, MeshConfig(fsdp=4, tensor=2)])
def test_remat_changes_nothing(remat, mesh):
    assert_same_update(one_step(make_config(model={"remat": remat}), make_batch(), mesh), reference_step())


def unpack(batch):
    """Every segment in a row of its own."""
    rows = {f.name: [] for f in dataclasses.fields(Batch)}
    for row in range(len(batch.inputs)):
        for segment in (1, 2):
            at = np.flatnonzero(np.asarray(batch.segment_ids[row]) == segment)
            for name in rows:
                if name == "rows":
                    rows[name].append(row)
                    continue
                out = np.zeros(L, getattr(batch, name).dtype)
                out[: len(at)] = np.asarray(getattr(batch, name))[row, at]
                rows[name].append(out)
    return Batch(**{name: jnp.asarray(np.stack(values)) for name, values in rows.items()})


def test_packing_changes_nothing():
    assert_same_update(one_step(make_config(), unpack(make_batch())), reference_step())


def test_a_token_changes_only_its_own_segment():
    batch = make_batch()
    params = make_params()
    nll = lambda b: sum_batch_loss(params, {}, b, config=make_config(), model=MODEL, mesh=None, noise_seed=None)[1].nll  # noqa: E731
    all_on = dataclasses.replace(batch, loss_weights=(batch.segment_ids != 0).astype(jnp.float32))
    changed = dataclasses.replace(all_on, inputs=all_on.inputs.at[2, 0].add(1) % MODEL.vocab_size)
    moved = nll(all_on) != nll(changed)
    assert bool(jnp.all(moved[2] == (batch.segment_ids[2] == 1)))
    assert not bool(jnp.any(jnp.delete(moved, 2, axis=0)))


def test_updates_by_hand():
    """SGD without momentum: the change is learning rate * clipped gradient of loss_sum / weight_sum."""
    config = make_config(optimizer={"name": "sgd", "b1": 0.0, "weight_decay": 0.0, "grad_clip_norm": 0.05})
    batch = make_batch()
    before, after, metrics = one_step(config, batch)
    loss = lambda p: sum_batch_loss(p, {}, batch, config=config, model=MODEL, mesh=None, noise_seed=None)[0]  # noqa: E731
    grads = jax.grad(loss)(before.params)
    grads = jax.tree.map(lambda g: g / batch.loss_weights.sum(), grads)
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in grads.values()))
    assert norm > 0.05
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-9)
    expected = {path: before.params[path] - 1e-2 * 0.05 / norm * grad for path, grad in grads.items()}
    assert relative(after.params, expected) < 1e-12
    assert metrics["weight_sum"].sum() == batch.loss_weights.sum()


@pytest.mark.parametrize(
    ("bad", "moment_dtype"),
    [("nan", "float64"), ("inf", "float64"), ("no supervised token", "float64"), ("inf", "bfloat16")],
)
def test_a_bad_step_changes_only_the_counters(bad, moment_dtype):
    config, batch = make_config(optimizer={"moment_dtype": moment_dtype}), make_batch()
    if bad == "no supervised token":
        batch = dataclasses.replace(batch, loss_weights=jnp.zeros_like(batch.loss_weights))
    else:
        batch = dataclasses.replace(batch, loss_weights=batch.loss_weights.at[3, 2].set(float(bad)))
    before, after, _ = one_step(config, batch)
    assert (int(after.step), int(after.num_updates), int(after.num_skipped)) == (1, 0, 1)
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, before.opt_state)


def test_a_good_step_advances_the_counters():
    _, after, metrics = reference_step()
    assert (int(after.step), int(after.num_updates), int(after.num_skipped)) == (1, 1, 0)
    assert metrics["learning_rate"] == 1e-2


def test_frozen_parameters_have_no_state_and_are_no_output():
    before, after, _ = one_step(make_config(), make_batch(), freeze=(r"^embed\.", r"mlp\.(up|down)"))
    free = {
        p for p in abstract_params(MODEL, "float64") if "embed" not in p and "mlp.up" not in p and "mlp.down" not in p
    }
    assert set(after.params) == free
    sizes = {leaf.shape for leaf in jax.tree.leaves(after)}
    assert (MODEL.vocab_size, MODEL.embed_dim) not in sizes
    assert relative({p: after.params[p] for p in free}, {p: before.params[p] for p in free}) > 0


def test_noise_is_drawn_in_training_only_and_follows_row_and_seed():
    noise = {"neftune_alpha": 5.0}
    batch, noisy = make_batch(), make_config(model=noise)
    other_rows = dataclasses.replace(batch, rows=batch.rows + B)
    losses = {
        "plain": reference_step()[2]["loss"],
        "noisy": reference_step(neftune_alpha=5.0)[2]["loss"],
        "rows": one_step(noisy, other_rows)[2]["loss"],
        "seed": one_step(make_config(model=noise, run={"seed": 1}), batch)[2]["loss"],
    }
    assert len({float(loss) for loss in losses.values()}) == 4, losses
    sums = [jax.jit(make_eval_step(c, MODEL, None, 2))(make_params(), {}, batch) for c in (noisy, make_config())]
    jax.tree.map(np.testing.assert_array_equal, *sums)


def test_source_sums_add_up():
    batch = make_batch()
    metrics = reference_step()[2]
    weights = [float(batch.loss_weights[batch.source_ids == source].sum()) for source in (0, 1)]
    np.testing.assert_allclose(metrics["weight_sum"], weights)
    assert metrics["nll_sum"].shape == (2,)


@pytest.mark.parametrize(
    ("name", "moment_dtype"),
    [("adamw", "float32"), ("adafactor", "float32"), ("adamw", "bfloat16"), ("lion", "bfloat16"), ("sgd", "bfloat16")],
)
def test_abstract_state_is_the_real_one(name, moment_dtype):
    config = make_config(optimizer={"name": name, "moment_dtype": moment_dtype})
    mesh = build_mesh(MeshConfig(fsdp=2, tensor=4))
    shapes = abstract_params(MODEL, "float64")
    shardings = shardings_for(mesh, {p: logical_dims(p) for p in shapes}, {p: s.shape for p, s in shapes.items()})
    abstract = abstract_state(shapes, shardings, build_optimizer(config.optimizer, seed=0), mesh)
    state, _ = make_state(config, mesh)
    describe = lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding.spec)  # noqa: E731
    assert jax.tree.map(describe, abstract) == jax.tree.map(describe, state)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim} == {moment_dtype}


def test_narrow_kernels_give_the_same_gradients_in_fewer_bytes():
    config = make_config(model={"param_dtype": "float32", "compute_dtype": "bfloat16"})
    params = {path: value.astype(jnp.float32) for path, value in make_params().items()}
    loss = functools.partial(sum_batch_loss, config=config, model=MODEL, mesh=None, noise_seed=None)
    grad = jax.jit(jax.grad(lambda params: loss(params, {}, make_batch())[0]))
    wide, narrow = grad(params), grad(narrow_kernels(params, "bfloat16"))
    kernels = {path for path in params if path.endswith(".kernel")}
    assert {path for path in params if narrow[path].dtype == jnp.bfloat16} == kernels
    for path in params:
        assert np.array_equal(wide[path], narrow[path].astype(jnp.float32)), path
    assert narrow_kernels(params, "float32") == params
