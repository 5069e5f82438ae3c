"""What adapters promise, in float64 on a tiny model: no effect at the start, the merged model's numbers, no mesh in the
result, and a base that no step touches."""

import dataclasses
import functools
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.checkpoint.hf import open_sources
from sft_jax.checkpoint.param_source import ParamSource, read_box
from sft_jax.config_schema import (
    BatchConfig,
    Config,
    DataConfig,
    LoraConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from sft_jax.datatypes import ConfigError
from sft_jax.experiment import check_new_rows_train
from sft_jax.model.adapter_use import AdapterUse
from sft_jax.model.families import LayerConfig, TransformerConfig, same_layers
from sft_jax.model.rope import RopeConfig
from sft_jax.model.transformer import forward
from sft_jax.placed_model import ModelOnMesh
from sft_jax.sharding import Batch, build_mesh, spec_for
from sft_jax.training.optimizer import build_schedule
from sft_jax.training.state import init_state
from sft_jax.training.step import make_eval_step, make_train_step

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoint"))
from llama_folder import llama_tensors, write_folder

# Dims that a mesh of 2 x 2 x 2 divides into whole blocks of 64.
MODEL = TransformerConfig(
    vocab_size=48, layers=same_layers(2, LayerConfig(rope=RopeConfig(theta=100.0))), embed_dim=128, mlp_dim=256,
    num_heads=4, num_kv_heads=2, head_dim=6, norm_eps=1e-5, tie_embeddings=True, max_position=64,
)  # fmt: skip
B, L = 16, 12
VARIANTS = {
    "rslora": dict(use_rslora=True),
    "qlora": dict(quantize="nf4"),
    "qdora": dict(quantize="int4", use_dora=True),
    "some": dict(quantize="int8", targets=("attention.(query|out)", "down_proj"), modules_to_save=("embed", ".*norm")),
}
ALL_AT_ONCE = dict(use_dora=True, dropout=0.3, modules_to_save=("embed_tokens", "input_layernorm"))


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tensors = {name: values * 0.2 for name, values in llama_tensors(MODEL).items()}
    return write_folder(tmp_path_factory.mktemp("base") / "model", MODEL, tensors)


class ArraySource(ParamSource):
    def __init__(self, values):
        self.shape, self.dtype, self.values = values.shape, values.dtype, np.asarray(values)

    def read(self, index, out):
        out[...] = self.values[index]


def place(folder, mesh=None, devices=1, *, model=None, **lora):
    section = dict(path=str(folder), param_dtype="float64", compute_dtype="float64", frozen_dtype="float64")
    config = Config(
        model=ModelConfig(**section | (model or {})),
        batch=BatchConfig(batch_size=B, grad_accum_steps=2 if mesh else 1),
        loss=LossConfig(chunk_tokens=7),
        optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, accum_dtype="float64", moment_dtype="float64"),
        schedule=ScheduleConfig(name="constant", warmup_steps=0),
        lora=LoraConfig(rank=4, **lora),
    )
    return ModelOnMesh(config, MODEL, build_mesh(mesh or MeshConfig(fsdp=1), jax.devices()[:devices]))


def draw_like(params, seed=3):
    """Values far from where adapters start, each by its path."""
    values = {}
    for i, path in enumerate(sorted(params)):
        noise = np.random.default_rng([seed, i]).normal(size=params[path].shape) * 0.1
        values[path] = jax.device_put(
            np.asarray(params[path]) + noise.astype(params[path].dtype), params[path].sharding
        )
    return values


def make_batch():
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, L, B)
    positions = np.broadcast_to(np.arange(L, dtype=np.int32), (B, L))
    segments = (positions < lengths[:, None]).astype(np.int32)
    ids = lambda: rng.integers(0, MODEL.vocab_size, (B, L), dtype=np.int32)  # noqa: E731
    weights = (rng.random((B, L)) * segments).astype(np.float32)
    return Batch(ids(), ids(), weights, segments, positions, np.zeros_like(segments), np.arange(B, dtype=np.int32))


def run_model(placed, params):
    batch = jax.tree.map(jnp.asarray, make_batch())
    options = dict(compute_dtype=placed.config.model.compute_dtype, remat="full", attention="reference")
    options["adapters"] = AdapterUse(placed.config.lora.scale)
    run = jax.jit(lambda p: forward(p, placed.model, batch.inputs, batch.positions, batch.segment_ids, **options))
    return np.asarray(run(params))


def compile_step(placed):
    schedule = build_schedule(placed.config.schedule, 1e-2, 10)
    step = make_train_step(placed.config, placed.model, placed.optimizer, schedule, placed.mesh)
    return jax.jit(step, donate_argnums=0)


def place_rows(placed, batch):
    where = lambda x: jax.NamedSharding(placed.mesh, spec_for(("batch", "seq")[: x.ndim]))  # noqa: E731
    return jax.tree.map(lambda x: jax.device_put(x, where(x)), batch)


def one_step(placed):
    """(state before, state after, metrics, frozen before, frozen after), on the host."""
    trainable, frozen = placed.open_params()
    state = init_state(draw_like(trainable), placed.optimizer)
    before = jax.tree.map(np.array, (state, frozen))
    after, metrics = compile_step(placed)(state, frozen, place_rows(placed, make_batch()))
    return before[0], jax.device_get(after), jax.device_get(metrics), before[1], jax.device_get(frozen)


@pytest.mark.parametrize("name", VARIANTS)
def test_no_effect_at_the_start_and_the_merged_model_s_numbers(folder, name):
    placed = place(folder, **VARIANTS[name])
    trainable, frozen = placed.open_params()
    adapters = {path for path in trainable if path.endswith(("lora_a", "lora_b", "magnitude"))}
    plain = {path: value for path, value in (trainable | frozen).items() if path not in adapters}
    start = run_model(placed, trainable | frozen)
    if placed.config.lora.use_dora:  # a quotient of two equal lengths is 1 to rounding
        np.testing.assert_allclose(start, run_model(placed, plain), atol=1e-6)
    else:
        np.testing.assert_array_equal(start, run_model(placed, plain))

    trained = draw_like(trainable) | frozen
    adapted = run_model(placed, trained)
    merged = placed.merge(trained)
    assert set(merged) == set(placed._base)
    assert np.abs(adapted - start).max() > 0.1
    sources = placed.merge_sources(open_sources(folder, MODEL), {p: ArraySource(trained[p]) for p in trainable})
    for path, source in sources.items():
        values = read_box(source, tuple(slice(0, size) for size in source.shape), "float64")
        np.testing.assert_allclose(values, merged[path], atol=1e-7)
    assert len(sources) == (len(placed.kernels) if placed.config.lora.quantize != "none" else len(trainable) // 2)
    np.testing.assert_allclose(run_model(placed, merged), adapted, atol=1e-9 if "kernel" in str(frozen) else 1e-5)


@functools.cache
def reference_step(folder, quantize):
    return one_step(place(folder, **ALL_AT_ONCE, quantize=quantize))


@pytest.mark.parametrize(
    ("shape", "quantize"),
    [((2, 2, 2), "none"), ((2, 2, 2), "nf4"), pytest.param((8, 1, 1), "int4", marks=pytest.mark.slow)],
)
def test_neither_mesh_nor_microbatches_change_a_number(folder, shape, quantize):
    mesh = MeshConfig(**dict(zip(("replica", "fsdp", "tensor"), shape, strict=True)))
    placed = place(folder, mesh, int(np.prod(shape)), **ALL_AT_ONCE, quantize=quantize)
    _, after, metrics, _, _ = one_step(placed)
    _, expected, expected_metrics, _, _ = reference_step(folder, quantize)
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-9)
    np.testing.assert_allclose(metrics["grad_norm"], expected_metrics["grad_norm"], rtol=1e-9)
    for path, value in expected.params.items():
        assert np.linalg.norm(after.params[path] - value) < 1e-9 * np.linalg.norm(value), path


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_step_leaves_the_base_as_it_was(folder, quantize):
    before, after, _, frozen_before, frozen_after = reference_step(folder, quantize)
    assert frozen_before.keys() == frozen_after.keys()
    assert all(frozen_before[path].tobytes() == frozen_after[path].tobytes() for path in frozen_before)
    trained = {path.rpartition(".")[2] for path in after.params}
    assert trained == {"lora_a", "lora_b", "magnitude", "embedding", "scale"}
    assert all(np.any(after.params[path] != before.params[path]) for path in after.params)
    shapes = sorted(np.shape(value) for value in after.params.values())
    moments = sorted(np.shape(leaf) for leaf in jax.tree.leaves(after.opt_state) if np.ndim(leaf))
    assert moments == sorted(2 * shapes)  # Adam's two, of what trains and of nothing else


@pytest.mark.parametrize(("quantize", "remat"), [("none", "full"), ("none", "none"), ("nf4", "none")])
def test_the_compiled_step_returns_no_byte_of_the_base_and_makes_no_second_one(folder, quantize, remat):
    # float32 in float64, since XLA on CPU widens every bfloat16 array that a loop reads, whatever the program says.
    dtypes = dict(frozen_dtype="float32", remat=remat)
    placed = place(folder, quantize=quantize, model=dtypes)
    trainable, frozen = placed.open_params()
    state = init_state(trainable, placed.optimizer)
    compiled = compile_step(placed).lower(state, frozen, place_rows(placed, make_batch())).compile()
    memory = compiled.memory_analysis()
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    pointers = 8 * (len(jax.tree.leaves(state)) + 20)
    assert state_bytes <= memory.output_size_in_bytes <= state_bytes + pointers + 200
    assert memory.alias_size_in_bytes >= state_bytes - 100  # the new state takes the old one's memory
    # No array of all layers' kernels in the compute dtype: a kernel is cast, or decoded, in its own layer only.
    text = compiled.as_text()
    for path, leaf in placed._base.items():
        if path.endswith(".kernel"):
            merged = list(_merged_shapes(leaf.shape))
            wide = [shape for shape in merged if re.search(rf"f64\[{shape}\]", text)]
            assert not wide, (path, wide)


def _merged_shapes(shape):
    """A stacked kernel's shape, and the same with its dims merged as a matrix product merges them."""
    layers, *rest = shape
    yield ",".join(map(str, shape))
    for cut in range(1, len(rest)):
        yield ",".join(map(str, (layers, int(np.prod(rest[:cut])), int(np.prod(rest[cut:])))))


def test_dropout_is_drawn_in_training_only_and_follows_row_and_seed(folder):
    placed = place(folder, dropout=0.5)
    params = {k: v for part in placed.open_params() for k, v in part.items()}
    params = draw_like(params) if placed.config.lora.quantize == "none" else params
    trainable = {path: params[path] for path in placed.leaves[0]}
    frozen = {path: params[path] for path in placed.leaves[1]}
    batch = jax.tree.map(jnp.asarray, make_batch())

    def loss(config, batch):
        placed_so = dataclasses.replace(placed, config=config)
        state = init_state(jax.tree.map(jnp.copy, trainable), placed.optimizer)
        return float(compile_step(placed_so)(state, frozen, batch)[1]["loss"])

    with_seed = dataclasses.replace(placed.config, run=dataclasses.replace(placed.config.run, seed=1))
    without = dataclasses.replace(placed.config, lora=dataclasses.replace(placed.config.lora, dropout=0.0))
    other_rows = dataclasses.replace(batch, rows=batch.rows + B)
    losses = [loss(placed.config, batch), loss(with_seed, batch), loss(placed.config, other_rows), loss(without, batch)]
    assert len(set(losses)) == 4, losses
    evaluate = lambda config: make_eval_step(config, placed.model, placed.mesh)(trainable, frozen, batch)  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, evaluate(placed.config), evaluate(without))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (dict(targets=("q_proj", "qproj")), "config.lora.targets: 'qproj' matches nothing. There are layers.0.0"),
        (dict(modules_to_save=("lm_head",)), "config.lora.modules_to_save: 'lm_head' matches nothing"),
        (dict(modules_to_save=("v_proj",)), "attention.value is in targets and in modules_to_save"),
    ],
)
def test_names_that_mean_nothing_are_refused(folder, lora, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        _ = place(folder, **lora).leaves


def test_new_tokens_need_rows_that_train(folder):
    placed = place(folder)
    config = dataclasses.replace(placed.config, data=DataConfig(new_tokens=("<x>",)))
    with pytest.raises(ConfigError, match=r"leaves out embed.embedding, and config\.data\.new_tokens adds tokens"):
        check_new_rows_train(dataclasses.replace(placed, config=config), MODEL.vocab_size)
    with pytest.raises(ConfigError, match=r"leaves out embed.embedding, and the tokenizer has 2 more tokens"):
        check_new_rows_train(placed, MODEL.vocab_size - 2)  # the tokenizer's folder has them
    frozen = dataclasses.replace(config, lora=LoraConfig(), model=ModelConfig(freeze=("embed",)))
    with pytest.raises(ConfigError, match=r"freeze: freezes embed.embedding, and config\.data\.new_tokens"):
        check_new_rows_train(dataclasses.replace(placed, config=frozen), MODEL.vocab_size)
    check_new_rows_train(placed, MODEL.vocab_size)
    check_new_rows_train(place(folder, modules_to_save=("embed",)), MODEL.vocab_size - 2)


@pytest.mark.slow
def test_adapters_reach_the_demo_s_bars():
    script = Path(__file__).parents[2] / "benchmarks" / "adapters.py"
    subprocess.run([sys.executable, script, "--only", "lora,qlora_nf4"], check=True)
