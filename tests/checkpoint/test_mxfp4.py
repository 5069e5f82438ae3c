"""MXFP4 beside a decoder that goes bit by bit, from the specification; and gpt-oss folders that hold it."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from mxfp4_folder import CONFIG, write_mxfp4_folder

from sft_jax.checkpoint import mxfp4
from sft_jax.checkpoint.hf import load_pretrained, read_config
from sft_jax.config_schema import MeshConfig
from sft_jax.datatypes import StorageError
from sft_jax.model.param_dims import logical_dims
from sft_jax.model.transformer import abstract_params, forward, output_head
from sft_jax.sharding import build_mesh, shardings_for

FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)


def value_of(code: int, scale: int) -> float:
    """E2M1: sign, two bits of exponent with bias 1, one of mantissa; exponent 0 is subnormal."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    magnitude = mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
    return (-1) ** sign * magnitude * 2.0 ** (scale - 127)


def slow_decode(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    rows = []
    for block, scale in zip(blocks.reshape(-1, 16).tolist(), scales.reshape(-1).tolist(), strict=True):
        rows.append([value_of(code, scale) for byte in block for code in (byte & 15, byte >> 4)])
    return np.asarray(rows, np.float64).reshape(*scales.shape[:-1], -1)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_every_byte_and_scale(dtype):
    blocks = np.resize(np.arange(256, dtype=np.uint8), (253, 3, 16))
    scales = np.stack([np.arange(253, dtype=np.uint8)] * 3, axis=1)
    decoded = mxfp4.decode(blocks, scales, dtype, "x")
    assert decoded.dtype == dtype
    assert decoded.shape == mxfp4.decoded_shape(scales.shape) == (253, 96)
    np.testing.assert_array_equal(decoded.astype(np.float64), slow_decode(blocks, scales))
    assert np.signbit(mxfp4.decode(np.full((1, 16), 0x88, np.uint8), np.zeros(1, np.uint8), dtype, "x")).all()


def test_chunks_join(monkeypatch):
    rng = np.random.default_rng(0)
    blocks, scales = rng.integers(256, size=(2, 5, 4, 16), dtype=np.uint8), rng.integers(110, 130, (2, 5, 4), np.uint8)
    whole = mxfp4.decode(blocks, scales, FLOAT32, "x")
    monkeypatch.setattr(mxfp4, "_CHUNK", 7)
    np.testing.assert_array_equal(mxfp4.decode(blocks, scales, FLOAT32, "x"), whole)
    np.testing.assert_array_equal(whole, slow_decode(blocks, scales))


@pytest.mark.parametrize("scale", [253, 255])
def test_scales_that_are_no_numbers_are_refused(scale):
    scales = np.asarray([[120, scale]], np.uint8)
    with pytest.raises(StorageError, match=f"w: the scale of block 1 is {scale}"):
        mxfp4.decode(np.zeros((1, 2, 16), np.uint8), scales, FLOAT32, "w")


@pytest.mark.parametrize(
    ("blocks", "scales"),
    [
        (np.zeros((2, 3, 16), np.uint8), np.zeros((2, 2), np.uint8)),
        (np.zeros((2, 3, 8), np.uint8), np.zeros((2, 3), np.uint8)),
        (np.zeros((2, 3, 16), np.int8), np.zeros((2, 3), np.uint8)),
        (np.zeros((2, 3, 16), np.uint8), np.zeros((2, 3), np.float32)),
    ],
)
def test_other_formats_are_refused(blocks, scales):
    with pytest.raises(StorageError, match="MXFP4 has uint8 of both"):
        mxfp4.decode(blocks, scales, FLOAT32, "w")


@pytest.mark.parametrize("axes", [None, {"fsdp": 2, "tensor": 2, "expert": 2}])
def test_a_folder_is_decoded_as_it_is_read(tmp_path, axes):
    tensors = write_mxfp4_folder(tmp_path, seed=0)
    config, _ = read_config(tmp_path)
    shardings = None
    if axes:
        shapes = {path: leaf.shape for path, leaf in abstract_params(config, "bfloat16").items()}
        mesh = build_mesh(MeshConfig(**axes))
        shardings = shardings_for(mesh, {path: logical_dims(path) for path in shapes}, shapes)
    params = load_pretrained(tmp_path, config, shardings, "bfloat16")
    assert {path: leaf.shape for path, leaf in params.items()} == {
        path: leaf.shape for path, leaf in abstract_params(config, "bfloat16").items()
    }
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts."
        gate_up, down = (
            slow_decode(tensors[f"{stem}{name}_blocks"], tensors[f"{stem}{name}_scales"]).swapaxes(-1, -2)
            for name in ("gate_up_proj", "down_proj")
        )
        ours = {
            name: np.asarray(params[f"layers.0.{layer}.mlp.experts.{name}.kernel"][0], np.float64)
            for name in ("gate", "up", "down")
        }
        np.testing.assert_array_equal(ours["gate"], gate_up[..., 0::2])
        np.testing.assert_array_equal(ours["up"], gate_up[..., 1::2])
        np.testing.assert_array_equal(ours["down"], down)
    sinks = tensors["model.layers.1.self_attn.sinks"]
    np.testing.assert_array_equal(np.asarray(params["layers.0.1.attention.sinks"][0]), sinks)
    assert isinstance(params["embed.embedding"], jax.Array)
    assert params["embed.embedding"].dtype == jnp.bfloat16


def test_wrong_scales_in_a_folder_are_named(tmp_path):
    write_mxfp4_folder(tmp_path, seed=0, change=lambda tensors: {
        name: np.full_like(values, 255) if name.endswith("1.mlp.experts.down_proj_scales") else values
        for name, values in tensors.items()
    })  # fmt: skip
    config, _ = read_config(tmp_path)
    with pytest.raises(
        StorageError, match=r"tensor model.layers.1.mlp.experts.down_proj_blocks: the scale of block 0 is"
    ):
        load_pretrained(tmp_path, config, None, "bfloat16")


def test_blocks_without_their_scales_are_refused(tmp_path):
    write_mxfp4_folder(tmp_path, seed=0, change=lambda tensors: {
        name: values for name, values in tensors.items() if not name.endswith("gate_up_proj_scales")
    })  # fmt: skip
    config, _ = read_config(tmp_path)
    with pytest.raises(StorageError, match=r"has no tensor model.layers.0.mlp.experts.gate_up_proj "):
        load_pretrained(tmp_path, config, None, "bfloat16")


def test_blocks_that_no_config_describes_are_refused(tmp_path):
    write_mxfp4_folder(tmp_path, seed=0)
    fields = {name: value for name, value in CONFIG.items() if name != "quantization_config"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config, _ = read_config(tmp_path)
    with pytest.raises(StorageError, match=r"_blocks: has scales beside it, and config.json has no"):
        load_pretrained(tmp_path, config, None, "bfloat16")


@pytest.mark.parity
def test_transformers_has_the_same_logits(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed here; make test-parity installs it")
    transformers = pytest.importorskip("transformers")
    write_mxfp4_folder(tmp_path, seed=3)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        attn_implementation="eager",
        experts_implementation="eager",
        quantization_config=transformers.Mxfp4Config(dequantize=True),
    )
    ids = np.random.default_rng(0).integers(48, size=(2, 40)).astype(np.int32)
    with torch.no_grad():
        expected = theirs.float()(input_ids=torch.tensor(ids, dtype=torch.long)).logits.numpy()
    config, _ = read_config(tmp_path)
    params = load_pretrained(tmp_path, config, None, "float32")
    positions = jnp.broadcast_to(jnp.arange(40, dtype=jnp.int32), ids.shape)
    options = {"compute_dtype": "float32", "remat": "none", "attention": "reference"}
    hidden = forward(params, config, jnp.asarray(ids), positions, jnp.ones_like(ids), **options)
    logits = np.asarray(jnp.einsum("bld,vd->blv", hidden, output_head(params)))
    assert 0.3 < expected.std() < 3
    assert np.abs(logits - expected).max() <= 2e-4
