"""Adapters of experts, in float64: no effect at the start, the merged model's numbers, no mesh in the result."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.checkpoint.hf import open_sources, read_config
from sft_jax.checkpoint.param_source import ParamSource, read_box
from sft_jax.config_schema import (
    BatchConfig,
    Config,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from sft_jax.datatypes import ConfigError
from sft_jax.model import quantized
from sft_jax.model.adapter_use import AdapterUse
from sft_jax.model.families import LayerConfig, TransformerConfig, same_layers
from sft_jax.model.moe_config import MoeConfig
from sft_jax.model.rope import RopeConfig
from sft_jax.model.transformer import forward
from sft_jax.placed_model import ModelOnMesh, choose_modules
from sft_jax.sharding import Batch, build_mesh, spec_for
from sft_jax.training.optimizer import build_schedule
from sft_jax.training.state import init_state
from sft_jax.training.step import make_train_step

MOE = MoeConfig(num_experts=4, experts_per_token=2, expert_dim=32)
MODEL = TransformerConfig(
    family="qwen3_moe", vocab_size=48, embed_dim=64, mlp_dim=32, num_heads=4, num_kv_heads=2, head_dim=8,
    layers=same_layers(2, LayerConfig(rope=RopeConfig(theta=100.0), moe=MOE)), norm_eps=1e-5, tie_embeddings=True,
    max_position=64, initializer_range=0.2,
)  # fmt: skip
B, L = 8, 12


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def place(mesh=None, devices=1, **lora):
    config = Config(
        model=ModelConfig(param_dtype="float64", compute_dtype="float64"),
        batch=BatchConfig(batch_size=B),
        optimizer=OptimizerConfig(learning_rate=1e-2, accum_dtype="float64", moment_dtype="float64"),
        schedule=ScheduleConfig(name="constant", warmup_steps=0),
        lora=LoraConfig(rank=4, **{"targets": (".*",)} | lora),
    )
    return ModelOnMesh(config, MODEL, build_mesh(mesh or MeshConfig(fsdp=1), jax.devices()[:devices]))


def draw(params):
    """Adapters far from where they start."""
    rngs = {path: np.random.default_rng(number) for number, path in enumerate(sorted(params))}
    return {
        path: jax.device_put(rngs[path].normal(size=value.shape) * 0.3, value.sharding)
        for path, value in params.items()
    }


def make_batch():
    rng = np.random.default_rng(0)
    positions = np.broadcast_to(np.arange(L, dtype=np.int32), (B, L))
    segments = (positions < rng.integers(3, L, B)[:, None]).astype(np.int32)
    ids = lambda: rng.integers(0, MODEL.vocab_size, (B, L), dtype=np.int32)  # noqa: E731
    weights = (rng.random((B, L)) * segments).astype(np.float32)
    return Batch(ids(), ids(), weights, segments, positions, np.zeros_like(segments), np.arange(B, dtype=np.int32))


def run_model(params, scale=1.0):
    batch = jax.tree.map(jnp.asarray, make_batch())
    options = dict(compute_dtype="float64", remat="none", attention="reference", adapters=AdapterUse(scale))
    run = jax.jit(lambda p: forward(p, MODEL, batch.inputs, batch.positions, batch.segment_ids, **options))
    return np.asarray(run(params))


def one_step(placed):
    """(trained parameters after a step, its loss), on the host."""
    trainable, frozen = placed.open_params()
    schedule = build_schedule(placed.config.schedule, 1e-2, 10)
    step = jax.jit(make_train_step(placed.config, MODEL, placed.optimizer, schedule, placed.mesh))
    where = lambda x: jax.NamedSharding(placed.mesh, spec_for(("batch", "seq")[: x.ndim]))  # noqa: E731
    batch = jax.tree.map(lambda x: jax.device_put(x, where(x)), make_batch())
    state, metrics = step(init_state(draw(trainable), placed.optimizer), frozen, batch)
    return jax.device_get((state.params, metrics["loss"]))


def test_no_effect_at_the_start_and_the_merged_model_s_numbers():
    placed = place(alpha=8.0)
    trainable, frozen = placed.open_params()
    assert trainable["layers.0.0.mlp.experts.down.lora_a"].shape == (2, 4, 32, 4)
    start = run_model(trainable | frozen, 2.0)
    np.testing.assert_array_equal(start, run_model(frozen))
    trained = draw(trainable) | frozen
    adapted = run_model(trained, 2.0)
    assert np.abs(adapted - start).max() > 0.1
    np.testing.assert_allclose(run_model(placed.merge(trained)), adapted, atol=1e-10)


@pytest.mark.parametrize("axes", [{"expert": 4, "fsdp": 2}, {"expert": 2, "fsdp": 2, "tensor": 2}])
def test_no_mesh_changes_a_number(axes):
    expected, expected_loss = one_step(place())
    trained, loss = one_step(place(MeshConfig(**axes), 8))
    assert loss == pytest.approx(expected_loss, rel=1e-9)
    for path, values in expected.items():
        np.testing.assert_allclose(trained[path], values, rtol=1e-6, atol=1e-9, err_msg=path)


@pytest.mark.parametrize("form", quantized.FORMATS)
def test_quantized_experts_multiply_as_their_decoded_kernels(form):
    _, params = place().open_params()
    coded = dict(params)
    for name in ("gate", "up", "down"):
        module = f"layers.0.0.mlp.experts.{name}"
        kernel = np.asarray(coded.pop(f"{module}.kernel"))
        codes, scales = (make(kernel, 2, 32, form) for make in (quantized.encode, quantized.find_scales))
        coded |= {f"{module}.{form}": codes, f"{module}.scales": scales}
        params[f"{module}.kernel"] = quantized.decode(jnp.asarray(codes), jnp.asarray(scales), 2, form, "float64")
    np.testing.assert_allclose(run_model(coded), run_model(params), atol=1e-12)


class ArraySource(ParamSource):
    """An array, as a checkpoint would hold it."""

    def __init__(self, values):
        self.values = np.asarray(values)
        self.shape, self.dtype = self.values.shape, self.values.dtype

    def read(self, index, out):
        out[...] = self.values[index]


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_they_are_merged_on_the_way_to_disk(family, quantize):
    folder = Path(__file__).parents[1] / "parity/goldens" / family
    section = ModelConfig(path=str(folder), param_dtype="float64", frozen_dtype="float64")
    config = Config(model=section, lora=LoraConfig(rank=2, targets=(".*",), quantize=quantize))
    model, _ = read_config(folder)
    placed = ModelOnMesh(config, model, build_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))
    trainable, frozen = placed.open_params()
    trained = draw(trainable)
    merged = placed.merge(trained | frozen)
    sources = placed.merge_sources(open_sources(folder, model), {p: ArraySource(v) for p, v in trained.items()})
    assert sources.keys() == {f"{path}.kernel" for path in placed.kernels}
    for path, source in sources.items():
        values = read_box(source, tuple(slice(0, size) for size in source.shape), "float64")
        np.testing.assert_allclose(values, merged[path], atol=1e-6, err_msg=path)


class WatchedSource(ArraySource):
    """Keeps the shape of each box that is read."""

    def read(self, index, out):
        self.boxes = [*getattr(self, "boxes", []), out.shape]
        super().read(index, out)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_one_expert_is_merged_at_a_time(quantize):
    placed = place(quantize=quantize)
    rng = np.random.default_rng(0)
    kernel = WatchedSource(rng.normal(size=(2, 4, 64, 32)).astype(np.float32))
    trained = {p: WatchedSource(rng.normal(size=leaf.shape)) for p, leaf in placed.leaves[0].items()}
    path = "layers.0.0.mlp.experts.up.kernel"
    base = {f"{module}.kernel": kernel for module in placed.kernels}
    source = placed.merge_sources(base, trained)[path]
    read_box(source, tuple(slice(0, size) for size in source.shape), "float32")
    parts = [kernel, *(trained[f"layers.0.0.mlp.experts.up.lora_{name}"] for name in "ab")]
    assert {shape[:2] for part in parts for shape in part.boxes} == {(1, 1)}


@pytest.mark.parametrize("option", [{"use_dora": True}, {"dropout": 0.1}])
def test_what_experts_adapters_do_not_have_is_refused(option):
    placed = place(**option)
    with pytest.raises(ConfigError, match=f"lora.{next(iter(option))}: layers.0.0.mlp.experts.down is of experts"):
        choose_modules(placed.config, MODEL, placed.kernels)
    attention = place(targets=("q_proj",), **option)
    assert choose_modules(attention.config, MODEL, attention.kernels)[0] == ("layers.0.0.attention.query",)
