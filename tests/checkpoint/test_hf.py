"""Import and export undo each other, on any mesh; damaged or foreign folders are refused by name."""

import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from llama_folder import TINY, TINY_TIED, llama_tensors, write_folder, write_sparse_folder, write_tokenizer

from sft_jax.checkpoint import hf_export
from sft_jax.checkpoint.export_folder import check_export_target
from sft_jax.checkpoint.hf import load_pretrained, read_config, read_generation_config
from sft_jax.checkpoint.hf_export import export_pretrained
from sft_jax.config_schema import MeshConfig
from sft_jax.data.tokenizer import Tokenizer, load_tokenizer
from sft_jax.datatypes import ConfigError, StorageError
from sft_jax.model.families import with_num_layers
from sft_jax.model.param_dims import logical_dims
from sft_jax.model.transformer import abstract_params, forward, output_head
from sft_jax.sharding import build_mesh, shardings_for


def export(folder: Path, params, config, dtype: str = "float32", **kwargs) -> Path:
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = load_tokenizer(write_tokenizer(Path(scratch) / "tokenizer"))
    export_pretrained(folder, params, config, tokenizer, "{{ messages }}", (39,), dtype, **kwargs)
    return folder


def shardings(config, **axes: int):
    shapes = {path: leaf.shape for path, leaf in abstract_params(config, "float32").items()}
    return shardings_for(build_mesh(MeshConfig(**axes)), {path: logical_dims(path) for path in shapes}, shapes)


MESHES = [dict(fsdp=1, replica=8), dict(fsdp=8), dict(replica=2, fsdp=2, tensor=2), dict(fsdp=2, tensor=4)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model", TINY, llama_tensors(TINY))


def test_parameters_hold_the_folder_s_numbers(folder: Path) -> None:
    config, fields = read_config(folder)
    assert config == TINY
    assert fields["model_type"] == "llama"
    params = load_pretrained(folder, config, None, "float32")
    tensors = llama_tensors(TINY)
    np.testing.assert_array_equal(params["embed.embedding"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["head.kernel"], tensors["lm_head.weight"])
    for layer in range(TINY.num_layers):
        gate = tensors[f"model.layers.{layer}.mlp.gate_proj.weight"]
        np.testing.assert_array_equal(params["layers.0.0.mlp.gate.kernel"][layer], gate.T)
        value = tensors[f"model.layers.{layer}.self_attn.v_proj.weight"].reshape(4, 6, 16)  # [K, H, D]
        np.testing.assert_array_equal(params["layers.0.0.attention.value.kernel"][layer], np.einsum("khd->dkh", value))


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_a_mesh_changes_no_number_in_or_out(folder: Path, tmp_path: Path, axes: dict, monkeypatch) -> None:
    monkeypatch.setattr(hf_export, "_PIECE_BYTES", 1000)  # several pieces of the vocabulary, several blocks of each
    monkeypatch.setattr(hf_export, "_BLOCK_BYTES", 300)
    plain = load_pretrained(folder, TINY, None, "float32")
    wanted = shardings(TINY, **axes)
    placed = load_pretrained(folder, TINY, wanted, "float32")
    for path, expected in plain.items():
        assert placed[path].sharding == wanted[path]
        np.testing.assert_array_equal(placed[path], expected)
    exported = safetensors.numpy.load_file(export(tmp_path / "out", placed, TINY) / "model.safetensors")
    assert {n: v.tobytes() for n, v in exported.items()} == {n: v.tobytes() for n, v in llama_tensors(TINY).items()}


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_weights_are_cast_once_from_the_stored_dtype(tmp_path: Path, stored: str, wanted: str) -> None:
    tensors = {name: values.astype(jnp.dtype(stored)) for name, values in llama_tensors(TINY).items()}
    params = load_pretrained(write_folder(tmp_path / "model", TINY, tensors), TINY, None, wanted)
    expected = tensors["model.layers.2.mlp.up_proj.weight"].astype(jnp.dtype(wanted)).T
    got = np.asarray(params["layers.0.0.mlp.up.kernel"][2])
    assert got.dtype == expected.dtype
    assert got.tobytes() == expected.tobytes()


def test_float64_without_x64_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="JAX_ENABLE_X64"):
        load_pretrained(folder, TINY, None, "float64")


@pytest.mark.parametrize("config", [TINY, TINY_TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("axes", [dict(fsdp=1, replica=8), dict(fsdp=2, tensor=4)], ids=str)
def test_new_rows_are_the_mean_of_the_old_ones(tmp_path: Path, caplog, config, axes: dict) -> None:
    tensors = llama_tensors(config)
    model = write_folder(tmp_path / "model", config, tensors)
    with caplog.at_level(logging.INFO, logger="absl"):
        grown = dataclasses.replace(config, vocab_size=48)
        params = load_pretrained(model, grown, shardings(grown, **axes), "float32")
    assert "rows [40, 48) are new" in caplog.text
    names = {"embed.embedding": "model.embed_tokens.weight", "head.kernel": "lm_head.weight"}
    for path in params.keys() & names.keys():
        old = tensors[names[path]]
        np.testing.assert_array_equal(params[path][:40], old)
        np.testing.assert_allclose(params[path][40:], np.tile(old.mean(axis=0), (8, 1)), rtol=1e-6, atol=1e-7)


def test_a_tied_folder_under_the_head_s_name_loads_the_same(tmp_path: Path) -> None:
    tensors = llama_tensors(TINY_TIED)
    head_only = {name.replace("model.embed_tokens", "lm_head"): values for name, values in tensors.items()}
    both = tensors | head_only
    loaded = [
        load_pretrained(write_folder(tmp_path / name, TINY_TIED, stored), TINY_TIED, None, "float32")
        for name, stored in (("embed", tensors), ("head", head_only), ("both", both))
    ]
    for params in loaded:
        assert "head.kernel" not in params
        np.testing.assert_array_equal(params["embed.embedding"], tensors["model.embed_tokens.weight"])


def test_a_tied_folder_whose_two_matrices_differ_is_refused(tmp_path: Path) -> None:
    tensors = llama_tensors(TINY_TIED)
    head = tensors["model.embed_tokens.weight"].copy()
    head[-1, -1] += 1
    model = write_folder(tmp_path / "model", TINY_TIED, tensors | {"lm_head.weight": head})
    with pytest.raises(StorageError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight, but"):
        load_pretrained(model, TINY_TIED, None, "float32")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_weight_that_is_no_number_is_refused(tmp_path: Path, name: str, value: float) -> None:
    tensors = llama_tensors(TINY)
    tensors[name].flat[-1] = value
    model = write_folder(tmp_path / "model", TINY, tensors)
    with pytest.raises(StorageError, match=f"{name} has NaN or infinite values"):
        load_pretrained(model, TINY, shardings(TINY, fsdp=2, tensor=4), "float32")


def test_a_weight_that_overflows_in_the_wanted_dtype_is_refused(tmp_path: Path) -> None:
    tensors = llama_tensors(TINY)
    tensors["model.norm.weight"] = np.full(16, 1e300)
    model = write_folder(tmp_path / "model", TINY, tensors)
    with pytest.raises(StorageError, match=r"model\.norm\.weight has NaN or infinite values \(as float32"):
        load_pretrained(model, TINY, None, "float32")


def test_everything_is_checked_before_any_weight_is_read(tmp_path: Path, monkeypatch) -> None:
    tensors = llama_tensors(TINY) | {"lm_head.weight": np.zeros((41, 16), np.float32)}
    model = write_folder(tmp_path / "model", TINY, tensors)
    monkeypatch.setattr("sft_jax.checkpoint.safetensors_io.map_tensor", lambda info: pytest.fail(f"{info} was read"))
    with pytest.raises(StorageError, match=re.escape("is [41, 16], and config.json asks for [40, 16]")):
        load_pretrained(model, TINY, None, "float32")


def test_a_folder_without_a_usable_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=re.escape(f"{tmp_path}/config.json: cannot be read: No such file")):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama",')
    with pytest.raises(ConfigError, match="is not a JSON object"):
        read_config(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_export_then_import_is_the_identity_in_every_dtype(folder: Path, tmp_path: Path, dtype: str) -> None:
    params = load_pretrained(folder, TINY, shardings(TINY, fsdp=8), "float32")
    out = export(tmp_path / "out", params, TINY, dtype, max_shard_bytes=5000)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    config, fields = read_config(out)
    assert config == TINY
    assert fields["torch_dtype"] == dtype
    again = load_pretrained(out, config, None, "float32")
    for path, values in params.items():
        np.testing.assert_array_equal(again[path], np.asarray(values).astype(jnp.dtype(dtype)).astype(np.float32))


def test_numbers_that_the_export_cannot_hold_are_refused(folder: Path, tmp_path: Path) -> None:
    params = load_pretrained(folder, TINY, None, "float32")
    params["layers.0.0.mlp.up.kernel"] = params["layers.0.0.mlp.up.kernel"].at[2, 0, 0].set(1e6)
    export(tmp_path / "wide", params, TINY, "bfloat16")
    with pytest.raises(
        StorageError, match=r"layers\.2\.mlp\.up_proj\.weight has NaN or infinite values \(as float16\)"
    ):
        export(tmp_path / "narrow", params, TINY, "float16")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "wide"}


def test_an_export_says_what_was_trained(folder: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, vocab_size=48)
    params = load_pretrained(folder, config, None, "float32")
    out = export(tmp_path / "deep" / "out", params, config)
    fields = json.loads((out / "config.json").read_text())
    assert (fields["vocab_size"], fields["bos_token_id"], fields["eos_token_id"]) == (48, 1, [39, 2])
    assert json.loads((out / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": [39, 2]}
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert load_tokenizer(out).encode("w3 w0") == [6, 3]
    assert [path.name for path in out.parent.iterdir()] == ["out"]  # nothing temporary is left


@pytest.mark.parametrize(("pad_id", "kept"), [(0, {"pad_token_id": 0}), (40, {}), (-1, {}), ([3], {}), (None, {})])
def test_an_export_samples_as_the_base_does(folder: Path, tmp_path: Path, pad_id, kept) -> None:
    assert read_generation_config(folder) == read_generation_config("") == {}
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.05}
    base = {"_from_model_config": True, "transformers_version": "4.0.0", "bos_token_id": 5, "eos_token_id": 9}
    (folder / "generation_config.json").write_text(json.dumps(base | sampling | {"pad_token_id": pad_id}))
    params = load_pretrained(folder, TINY, None, "float32")
    out = export(tmp_path / "out", params, TINY, generation=read_generation_config(folder))
    ids = {"bos_token_id": 1, "eos_token_id": [39, 2]}
    assert json.loads((out / "generation_config.json").read_text()) == sampling | kept | ids
    (folder / "generation_config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"generation_config.json: is not a JSON object"):
        read_generation_config(folder)


def test_an_export_replaces_only_an_earlier_export(folder: Path, tmp_path: Path) -> None:
    params = load_pretrained(folder, TINY, None, "float32")
    out = export(tmp_path / "out", params, TINY, max_shard_bytes=5000)
    export(out, params, TINY)
    assert not list(out.glob("model-*"))  # the old shards are gone
    (out / "notes.txt").write_text("mine")
    for target in (out, folder):
        kept = sorted(path.name for path in target.iterdir())
        with pytest.raises(StorageError, match="which no export of ours wrote"):
            export(target, params, TINY)
        assert sorted(path.name for path in target.iterdir()) == kept
    with pytest.raises(StorageError, match="is a file"):
        check_export_target(folder / "config.json")


def test_an_interrupted_export_leaves_the_old_one(folder: Path, tmp_path: Path, monkeypatch) -> None:
    params = load_pretrained(folder, TINY, None, "float32")
    out = export(tmp_path / "out", params, TINY)
    old = {path.name: path.read_bytes() for path in out.iterdir()}

    def fill_the_disk(*_) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "save", fill_the_disk)
        with pytest.raises(StorageError, match=r"export failed.*No space left"):
            export(out, params, TINY, "bfloat16")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == old
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}  # nothing temporary is left
    export(out, params, TINY, "bfloat16")  # and the next one is not in its way
    assert {values.dtype for values in safetensors.numpy.load_file(out / "model.safetensors").values()} == {
        np.dtype(ml_dtypes.bfloat16)
    }


def test_the_real_model_predicts_as_expected_and_survives_the_round_trip(assets: Path, tmp_path: Path) -> None:
    folder = assets / "models" / "TinyStories-656K"  # tied, and stored under the head's name only
    expected = json.loads((folder / "expected.json").read_text())
    config, _ = read_config(folder)
    params = load_pretrained(folder, config, shardings(config, fsdp=2, tensor=4), "float32")
    ids = jnp.asarray([expected["prompt_ids"]])
    options = {"compute_dtype": "float32", "remat": "none", "attention": "reference"}
    hidden = forward(params, config, ids, jnp.arange(ids.size)[None], jnp.ones_like(ids), **options)
    logprobs = jax.nn.log_softmax(hidden[0] @ output_head(params).T)
    got = jnp.take_along_axis(logprobs[:-1], ids[0, 1:, None], axis=-1)[:, 0]
    np.testing.assert_allclose(got, expected["next_token_logprobs"], atol=1e-4, rtol=0)

    stored = safetensors.numpy.load_file(folder / "model.safetensors")
    exported = safetensors.numpy.load_file(export(tmp_path / "out", params, config) / "model.safetensors")
    stored["model.embed_tokens.weight"] = stored.pop("lm_head.weight")
    assert {n: v.tobytes() for n, v in exported.items()} == {n: v.tobytes() for n, v in stored.items()}


_MEASURE = """
import sys
import tempfile
from pathlib import Path
import jax, jax.numpy as jnp
from test_hf import export, shardings
from sft_jax.checkpoint import hf_export
from sft_jax.checkpoint.hf import load_pretrained, read_config, read_generation_config

def resident_bytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))

def growth(run):  # (peak above the start, what `run` returns)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident_bytes("VmRSS:")
    result = run()
    return resident_bytes("VmHWM:") - before, result

model, out = map(Path, sys.argv[1:])
config, _ = read_config(model)
placed = shardings(config, fsdp=4, tensor=2)
imported, params = growth(lambda: jax.block_until_ready(load_pretrained(model, config, placed, "float32")))
exported, _ = growth(lambda: export(out, params, config))
print(imported, exported)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure memory")
def test_neither_way_holds_the_model_on_the_host(tmp_path: Path) -> None:
    config = dataclasses.replace(
        with_num_layers(TINY, 16), vocab_size=4096, embed_dim=512, mlp_dim=2048, head_dim=64, num_kv_heads=8
    )
    num_bytes = write_sparse_folder(tmp_path / "model", config)
    assert num_bytes > 250_000_000
    command = [sys.executable, "-c", _MEASURE, str(tmp_path / "model"), str(tmp_path / "out")]
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    run = subprocess.run(command, env=os.environ | flags | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    imported, exported = (int(field) / num_bytes for field in run.stdout.split())
    assert imported < 1.3  # the parameters themselves, which live in host memory here, and a little
    assert exported < 0.7  # a fixed cost of compiling; a copy of the model would be 1
