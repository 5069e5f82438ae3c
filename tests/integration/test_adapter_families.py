"""Of every family: adapters change nothing at first, and merged they are the model they were beside its base."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.checkpoint.hf import read_config
from sft_jax.config_schema import Config, LoraConfig, MeshConfig, ModelConfig
from sft_jax.model.adapter_use import AdapterUse
from sft_jax.model.transformer import forward
from sft_jax.placed_model import ModelOnMesh
from sft_jax.sharding import build_mesh

GOLDENS = sorted((Path(__file__).parents[1] / "parity" / "goldens").iterdir())


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("folder", GOLDENS, ids=lambda folder: folder.name)
def test_merged_equals_adapter(folder, quantize):
    section = ModelConfig(path=str(folder), compute_dtype="float32")
    config = Config(model=section, lora=LoraConfig(rank=2, alpha=8.0, targets=(".*",), quantize=quantize))
    model, _ = read_config(folder)
    placed = ModelOnMesh(config, model, build_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))
    trainable, frozen = placed.open_params()
    rng = np.random.default_rng(0)
    trained = {path: value + 0.1 * rng.normal(size=value.shape).astype("float32") for path, value in trainable.items()}
    ids = jnp.asarray(rng.integers(model.vocab_size, size=(2, 12)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), ids.shape)

    def run(params):
        options = {"compute_dtype": "float32", "remat": "none", "attention": "reference"}
        adapters = AdapterUse(config.lora.scale)
        return forward(params, model, ids, positions, jnp.ones_like(ids), adapters=adapters, **options)

    @jax.jit
    def run_all(trainable, trained, frozen):
        start, adapted = run(trainable | frozen), run(trained | frozen)
        return start, run(placed.merge(trainable | frozen)), adapted, run(placed.merge(trained | frozen))

    start, plain, adapted, merged = run_all(trainable, trained, frozen)
    np.testing.assert_allclose(start, plain, atol=1e-5)
    np.testing.assert_allclose(merged, adapted, atol=1e-5)
    assert np.abs(adapted - start).max() > 0.1
