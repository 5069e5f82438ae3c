"""Live, beside transformers and qwix: a quantized base is the model of its decoded weights; codes are qwix's."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.checkpoint.hf import read_config
from sft_jax.checkpoint.hf_names import tensor_rules
from sft_jax.config_schema import Config, LoraConfig, MeshConfig, ModelConfig
from sft_jax.model import quantized
from sft_jax.model.adapter_use import AdapterUse
from sft_jax.model.transformer import forward, output_head
from sft_jax.placed_model import ModelOnMesh
from sft_jax.sharding import build_mesh

torch = pytest.importorskip("torch", reason="torch is not installed here; make test-parity installs it")
transformers = pytest.importorskip("transformers")

from torch_reference import random_llama  # noqa: E402

pytestmark = pytest.mark.parity

FIELDS: dict[str, Any] = dict(
    vocab_size=97, hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, tie_word_embeddings=False,
)  # fmt: skip


def decode(codes: np.ndarray, scales: np.ndarray, axis: int, form: str) -> np.ndarray:
    """Written apart from ours: block by block."""
    codes, scales = np.moveaxis(codes, axis, 0), np.moveaxis(scales, axis, 0).astype(np.float32)
    blocks = []
    for block, scale in zip(np.split(codes, len(scales)), scales, strict=True):
        if form != "int8":
            nibbles = np.concatenate([block % 16, block // 16])
            block = np.asarray(quantized.NF4, np.float32)[nibbles] if form == "nf4" else nibbles.astype(np.float32) - 8
        blocks.append(block.astype(np.float32) * scale[None])
    return np.moveaxis(np.concatenate(blocks), 0, axis)


@pytest.mark.parametrize("form", quantized.FORMATS)
def test_logits_are_those_of_transformers_with_the_decoded_weights(form: str, tmp_path: Path) -> None:
    theirs = random_llama(seed=1, **FIELDS)
    theirs.save_pretrained(tmp_path / "base")
    config = Config(
        model=ModelConfig(path=str(tmp_path / "base"), compute_dtype="float32"), lora=LoraConfig(rank=4, quantize=form)
    )
    model, _ = read_config(tmp_path / "base")
    placed = ModelOnMesh(config, model, build_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))
    trainable, frozen = placed.open_params()
    params = trainable | frozen
    ids = np.random.default_rng(0).integers(97, size=(2, 20)).astype(np.int32)
    positions = np.broadcast_to(np.arange(20, dtype=np.int32), ids.shape)
    hidden = forward(
        params, model, jnp.asarray(ids), jnp.asarray(positions), jnp.ones_like(ids), compute_dtype="float32",
        remat="none", attention="reference", adapters=AdapterUse(config.lora.scale),
    )  # fmt: skip
    ours = np.asarray(jnp.einsum("bld,vd->blv", hidden, output_head(params)))

    weights = dict(theirs.state_dict())
    with torch.no_grad():
        for rule in tensor_rules(model):
            module = rule.path.removesuffix(".kernel")
            if f"{module}.{form}" not in params:
                continue
            axis = len(placed.kernels[module].ins) - 1
            for layer, name in enumerate(rule.hf_names()):
                codes, scales = (np.asarray(params[f"{module}.{part}"][layer]) for part in (form, quantized.SCALES))
                rule.from_hf(weights[name].numpy(), model)[...] = decode(codes, scales, axis, form)
        expected = theirs(input_ids=torch.tensor(ids, dtype=torch.long)).logits.numpy()
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(ours, expected, atol=2e-4)


@pytest.mark.parametrize("form", quantized.FORMATS)
def test_codes_are_those_of_qwix(form: str) -> None:
    numerics = pytest.importorskip("qwix._src.core.numerics")
    values = np.random.default_rng(0).normal(size=(128, 24)).astype(np.float32)
    codes, scales = (make(values, 0, 64, form) for make in (quantized.encode, quantized.find_scales))
    ours = quantized.decode(jnp.asarray(codes), jnp.asarray(scales), 0, form, "float32")
    factors = jnp.repeat(scales.astype(np.float32), 64, axis=0)
    qtype = form if form == "nf4" else jnp.dtype(form)
    theirs = numerics.convert_from(numerics.convert_to(values / factors, qtype), qtype).astype("float32") * factors
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    # Their scales would be the same, were they not rounded to bfloat16.
    largest = np.abs(values.reshape(2, 64, 24)).max(axis=1)
    np.testing.assert_allclose(scales.astype(np.float32), largest / numerics.get_symmetric_bound(qtype), rtol=2**-8)
