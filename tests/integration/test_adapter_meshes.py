"""The step of adapters over a frozen base on eight devices and on one, in float64, on packed rows: dense models, and
mixtures whose experts have adapters too."""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from sft_jax.config_schema import LoraConfig, MeshConfig
from sft_jax.model.families import LayerConfig, LayerGroup
from sft_jax.model.moe_config import MoeConfig
from sft_jax.model.rope import RopeConfig
from sft_jax.placed_model import ModelOnMesh
from sft_jax.sharding import build_mesh, spec_for
from sft_jax.training.optimizer import build_schedule
from sft_jax.training.state import init_state
from sft_jax.training.step import make_train_step

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from test_step import MODEL, assert_same_update, make_batch, make_config

DENSE = LayerConfig(rope=RopeConfig(theta=100.0))
MIXTURE = dataclasses.replace(DENSE, moe=MoeConfig(num_experts=8, experts_per_token=2, expert_dim=8))
MODELS = {
    "dense": MODEL,
    "mixture": dataclasses.replace(MODEL, layers=(LayerGroup((DENSE, MIXTURE), 2),), tie_embeddings=False),
}
LORA = LoraConfig(rank=4, alpha=8.0, targets=(".*",), modules_to_save=(".*norm",))
ALONE = [{"replica": 8}, {"fsdp": 8}, {"context": 8}, {"tensor": 8}, {"expert": 8}]
TOGETHER = [
    {"replica": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "context": 2}, {"context": 2, "tensor": 4},
    {"fsdp": 2, "tensor": 2, "expert": 2}, {"context": 4, "expert": 2}, {"replica": 2, "fsdp": 2, "expert": 2},
]  # fmt: skip
QUICK = {"dense": {"context": 2, "tensor": 4}, "mixture": {"fsdp": 2, "tensor": 2, "expert": 2}}
CASES = [
    pytest.param(name, axes, id=f"{name}-{axes}", marks=[] if axes == QUICK[name] else pytest.mark.slow)
    for name in MODELS
    for axes in ALONE + TOGETHER
]


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def one_step(name, axes=None):
    """(state before, state after, metrics), on the host."""
    config = dataclasses.replace(make_config(), lora=LORA)
    devices = jax.devices() if axes else jax.devices()[:1]
    placed = ModelOnMesh(config, MODELS[name], build_mesh(MeshConfig(**({"fsdp": 1} | (axes or {}))), devices))

    def draw(leaves):
        """Drawn with numpy, each by its path: adapters far from where they start."""
        values = {}
        for path, leaf in leaves.items():
            rng = np.random.default_rng(sorted(placed.shardings).index(path))
            drawn = np.ones(leaf.shape) if path.endswith("scale") else rng.normal(scale=0.3, size=leaf.shape)
            values[path] = jax.device_put(drawn.astype(leaf.dtype), placed.shardings[path])
        return values

    trainable, frozen = (draw(leaves) for leaves in placed.leaves)
    state = init_state(trainable, placed.optimizer)
    schedule = build_schedule(config.schedule, config.optimizer.learning_rate, 10)
    step = jax.jit(make_train_step(config, MODELS[name], placed.optimizer, schedule, placed.mesh, num_sources=2))
    place = lambda x: jax.device_put(x, jax.NamedSharding(placed.mesh, spec_for(("batch", "seq")[: x.ndim])))  # noqa: E731
    return jax.device_get((state, *step(state, frozen, jax.tree.map(place, make_batch()))))


@functools.cache
def reference_step(name):
    return one_step(name)


@pytest.mark.parametrize(("name", "axes"), CASES)
def test_a_mesh_changes_nothing(name, axes):
    before, after, metrics = one_step(name, axes)
    trained = {path.rpartition(".")[2] for path in after.params}
    assert trained == {"lora_a", "lora_b", "scale"}
    assert_same_update((before, after, metrics), reference_step(name))
