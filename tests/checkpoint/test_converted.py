"""A converted folder is the same model: for us, for Orbax, on any mesh; and it is there whole or not at all."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from llama_folder import TINY, TINY_TIED, llama_tensors, write_folder, write_sparse_folder, write_tokenizer
from test_hf import MESHES, shardings

from sft_jax.checkpoint import orbax_item
from sft_jax.checkpoint.converted import RECORD, is_converted
from sft_jax.checkpoint.hf import digest_weights, load_pretrained, read_config
from sft_jax.checkpoint.orbax_item import open_item
from sft_jax.checkpoint.param_source import read_box
from sft_jax.cli.convert import main
from sft_jax.data.tokenizer import load_tokenizer
from sft_jax.datatypes import ConfigError, StorageError
from sft_jax.model.families import with_num_layers


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write_folder(tmp_path / "model", TINY, llama_tensors(TINY))
    for file in write_tokenizer(tmp_path / "tokenizer").iterdir():
        file.rename(folder / file.name)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "modeling.py").write_text("raise")
    return folder


def convert(source: Path | str, target: Path, *options: str) -> Path:
    assert main([f"--from={source}", f"--to={target}", *options]) == 0
    return target


def assert_equal(params, expected) -> None:
    assert params.keys() == expected.keys()
    for path, values in expected.items():
        assert (params[path].dtype, params[path].shape) == (values.dtype, values.shape)
        assert np.asarray(params[path]).tobytes() == np.asarray(values).tobytes(), path


@pytest.mark.parametrize("axes", MESHES[:1] + MESHES[2:3], ids=str)
def test_it_loads_as_its_source_does(source: Path, tmp_path: Path, axes: dict, monkeypatch) -> None:
    monkeypatch.setattr(orbax_item, "_CHUNK_BYTES", 500)  # several chunks of each array, that do not divide it
    monkeypatch.setattr(orbax_item, "_SLAB_BYTES", 1500)
    target = convert(source, tmp_path / "out")
    assert read_config(target) == read_config(source)
    placed = shardings(TINY, **axes)
    params = load_pretrained(target, TINY, placed, "float32")
    assert_equal(params, load_pretrained(source, TINY, placed, "float32"))
    assert all(params[path].sharding == placed[path] for path in params)
    assert len(list((target / "params" / "layers.0.0.mlp.up.kernel").rglob("*"))) > 10


def test_orbax_restores_it(source: Path, tmp_path: Path) -> None:
    target = convert(source, tmp_path / "out")
    placed, expected = shardings(TINY, fsdp=2, tensor=4), load_pretrained(source, TINY, None, "float32")
    abstract = {
        path: jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=placed[path])
        for path, values in expected.items()
    }
    arguments = ocp.checkpoint_utils.construct_restore_args(abstract)
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(target / "params", item=abstract, restore_args=arguments)
    assert_equal(restored, expected)
    assert all(restored[path].sharding.is_equivalent_to(placed[path], restored[path].ndim) for path in restored)
    with ocp.StandardCheckpointer() as checkpointer:
        again = checkpointer.restore(target / "params", abstract)
    assert_equal(again, expected)
    assert all(again[path].sharding == restored[path].sharding for path in again)


def test_the_page_s_line_restores_it(source: Path, tmp_path: Path, monkeypatch) -> None:
    convert(source, tmp_path / "models" / "base-orbax")
    page = (Path(__file__).parents[2] / "docs" / "weights.md").read_text()
    (line,) = re.findall(r"^ {4}(ocp\..*)$", page, re.M)
    monkeypatch.chdir(tmp_path)
    restored = eval(line, {"ocp": ocp})
    assert_equal(restored, load_pretrained(source, TINY, None, "float32"))


@pytest.mark.parametrize("ocdbt", [True, False])
def test_what_orbax_saves_is_read(source: Path, tmp_path: Path, ocdbt: bool) -> None:
    expected = load_pretrained(source, TINY, None, "bfloat16")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt)) as checkpointer:
        checkpointer.save(tmp_path / "item", {"params": expected, "step": jnp.ones(())})
    sources = open_item(tmp_path / "item", {path: f"params.{path}" for path in expected})
    for path, values in expected.items():
        whole = tuple(slice(0, size) for size in values.shape)
        assert read_box(sources[path], whole, "bfloat16").tobytes() == np.asarray(values).tobytes()


def test_the_tokenizer_and_its_template_come_along_and_code_does_not(source: Path, tmp_path: Path) -> None:
    target = convert(source, tmp_path / "out")
    assert load_tokenizer(target).encode("w3 w0") == [6, 3]
    assert (target / "chat_template.jinja").read_text() == "{{ messages }}"
    names = {"config.json", "params", RECORD, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {path.name for path in target.iterdir()} == names
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out", "tokenizer"}  # nothing temporary is left


@pytest.mark.parametrize(
    ("stored", "options", "expected"),
    [
        ("bfloat16", [], "bfloat16"),
        ("float16", [], "float16"),
        ("float8_e4m3fn", [], "bfloat16"),
        ("float8_e5m2", [], "bfloat16"),
        ("bfloat16", ["--dtype=float32"], "float32"),
    ],
)
def test_values_keep_their_dtype_unless_told_otherwise(tmp_path: Path, stored: str, options, expected: str) -> None:
    tensors = {name: values.astype(jnp.dtype(stored)) for name, values in llama_tensors(TINY_TIED).items()}
    source = write_folder(tmp_path / "model", TINY_TIED, tensors)
    target = convert(source, tmp_path / "out", *options)
    record = json.loads((target / RECORD).read_text())
    assert set(record["dtypes"].values()) == {expected}
    loaded = load_pretrained(target, TINY_TIED, None, "float32")
    assert_equal(loaded, load_pretrained(source, TINY_TIED, None, "float32"))


def test_a_correction_of_the_choice_of_experts_is_never_narrowed(tmp_path: Path) -> None:
    source = Path(__file__).parents[1] / "parity" / "goldens" / "deepseek_v3"
    dtypes = json.loads((convert(source, tmp_path / "out", "--dtype=bfloat16") / RECORD).read_text())["dtypes"]
    wide = {path.rpartition(".")[2]: dtype for path, dtype in dtypes.items() if dtype != "bfloat16"}
    assert wide == {"correction": "float32"}


def test_a_conversion_to_another_dtype_is_another_base(source: Path, tmp_path: Path) -> None:
    wide, narrow = (convert(source, tmp_path / dtype, f"--dtype={dtype}") for dtype in ("float32", "bfloat16"))
    assert digest_weights(wide) != digest_weights(narrow)
    shutil.rmtree(wide / "params")
    shutil.copytree(narrow / "params", wide / "params")
    with pytest.raises(StorageError, match="is bfloat16, and was converted to float32"):
        load_pretrained(wide, TINY, None, "float32")


def test_new_rows_are_the_mean_of_the_old_ones(source: Path, tmp_path: Path) -> None:
    grown = dataclasses.replace(TINY, vocab_size=48)
    placed = shardings(grown, fsdp=2, tensor=4)
    converted = load_pretrained(convert(source, tmp_path / "out"), grown, placed, "float32")
    assert_equal(converted, load_pretrained(source, grown, placed, "float32"))


def test_a_url_is_converted(source: Path, tmp_path: Path) -> None:
    url = f"memory://{tmp_path}/model"
    fsspec.filesystem("memory").put(f"{source}/", f"{url}/", recursive=True)
    target = convert(url, tmp_path / "out")
    assert_equal(load_pretrained(target, TINY, None, "float32"), load_pretrained(source, TINY, None, "float32"))
    assert_equal(load_pretrained(url, TINY, None, "float32"), load_pretrained(source, TINY, None, "float32"))
    with pytest.raises(ConfigError, match="is a URL"):
        main([f"--from={source}", f"--to={url}"])


def test_a_second_convert_changes_nothing_and_another_is_refused(source: Path, tmp_path: Path, capsys) -> None:
    target = convert(source, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    convert(source, target)
    assert "already converted" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == before
    with pytest.raises(StorageError, match="of other weights or dtypes"):
        main([f"--from={source}", f"--to={target}", "--dtype=bfloat16"])
    other = write_folder(tmp_path / "other", TINY, llama_tensors(TINY, seed=1))
    with pytest.raises(StorageError, match=r"was made from .*/model, of other weights"):
        convert(other, target)
    (source / "chat_template.jinja").write_text("another")
    with pytest.raises(StorageError, match=r"was made from .*/model, with another chat_template\.jinja"):
        convert(source, target)
    with pytest.raises(StorageError, match="which no convert wrote"):
        convert(source, other)
    with pytest.raises(StorageError, match="is a file"):
        convert(source, source / "config.json")
    with pytest.raises(ConfigError, match="is a converted folder already"):
        convert(target, tmp_path / "again")
    (other / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is an adapter's\. Name it as config\.lora\.init_from"):
        convert(other, tmp_path / "again")
    assert digest_weights(target) == digest_weights(source) != digest_weights(other)


def test_a_weight_that_is_no_number_leaves_nothing(tmp_path: Path) -> None:
    tensors = llama_tensors(TINY)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = np.nan
    source = write_folder(tmp_path / "model", TINY, tensors)
    with pytest.raises(StorageError, match=r"model\.layers\.1\.mlp\.down_proj\.weight has NaN"):
        convert(source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def damage(case: str, target: Path) -> None:
    chunk = next(path for path in (target / "params" / "layers.0.0.mlp.up.kernel" / "c").rglob("*") if path.is_file())
    if case == "a chunk is gone":
        chunk.unlink()
    elif case == "a chunk is short":
        chunk.write_bytes(chunk.read_bytes()[:-1])
    elif case == "a bit is flipped":
        data = bytearray(chunk.read_bytes())
        data[len(data) // 2] ^= 4
        chunk.write_bytes(data)
    elif case == "an array is gone":
        (target / "params" / "layers.0.0.mlp.up.kernel" / "zarr.json").unlink()
    elif case == "another config":
        fields = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps(fields | {"intermediate_size": 33}))
    elif case == "a tied config":
        fields = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps(fields | {"tie_word_embeddings": True}))
    elif case == "no record":
        (target / RECORD).unlink()
    else:
        (target / RECORD).write_text("{}")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("a chunk is gone", r"layers\.0\.0\.mlp\.up\.kernel cannot be read"),
        ("a chunk is short", r"layers\.0\.0\.mlp\.up\.kernel cannot be read"),
        ("a bit is flipped", r"layers\.0\.0\.mlp\.up\.kernel cannot be read.*igest mismatch"),
        ("an array is gone", r"layers\.0\.0\.mlp\.up\.kernel cannot be opened"),
        ("another config", r"kernel is \[3, 16, 32\], and config\.json asks for \[3, 16, 33\]"),
        ("a tied config", r"has the parameter head\.kernel, and config\.json asks for another set"),
        ("no record", "has neither"),
        ("an empty record", f"{RECORD}: is malformed"),
    ],
)
def test_damage_is_found(source: Path, tmp_path: Path, case: str, message: str) -> None:
    target = convert(source, tmp_path / "out")
    damage(case, target)
    with pytest.raises(StorageError, match=message):
        load_pretrained(target, read_config(target)[0], None, "float32")


def test_a_killed_convert_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    config = dataclasses.replace(with_num_layers(TINY, 16), vocab_size=4096, embed_dim=1024, mlp_dim=4096)
    write_sparse_folder(tmp_path / "model", config)
    command = [sys.executable, "-m", "sft_jax.cli.convert", f"--from={tmp_path}/model", f"--to={tmp_path}/out"]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    while not list(tmp_path.glob(".out.partial/params/*/c/*")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert not is_converted(tmp_path / ".out.partial")
    small = write_folder(tmp_path / "small", TINY, llama_tensors(TINY))
    convert(small, tmp_path / "out")  # and the next one is not in its way
    assert {path.name for path in tmp_path.iterdir()} == {"model", "small", "out"}
