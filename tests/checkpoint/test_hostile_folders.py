"""Nothing in a model folder leads out of it, runs, or takes the memory: each is refused by name."""

import json
import os
import pickle
from pathlib import Path

import fuzz_headers
import numpy as np
import pytest
import safetensors.numpy
from llama_folder import TINY, llama_tensors, write_folder

from sft_jax.checkpoint.hf import load_pretrained, read_config
from sft_jax.checkpoint.safetensors_io import INDEX_FILE, SINGLE_FILE, read_index
from sft_jax.datatypes import ConfigError, StorageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model", TINY, llama_tensors(TINY))


@pytest.mark.parametrize("name", [SINGLE_FILE, "config.json"])
def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match=f"{name}: is a link to {tmp_path}/elsewhere, outside the model's folder"):
        load_pretrained(folder, TINY, None, "float32")


def test_a_shard_may_not_be_a_link_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    shard = "model-00001-of-00001.safetensors"
    (folder / SINGLE_FILE).rename(tmp_path / "elsewhere")
    (folder / shard).symlink_to("../elsewhere")
    names = dict.fromkeys(llama_tensors(TINY), shard)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with pytest.raises(StorageError, match=f"{shard}: is a link to"):
        read_index(folder)


def test_the_hub_s_own_links_are_followed(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(folder.iterdir()):
        file.rename(blobs / f"blob{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob{number}")
    (tmp_path / "named").symlink_to(snapshot)
    params = load_pretrained(tmp_path / "named", TINY, None, "float32")
    np.testing.assert_array_equal(params["embed.embedding"], llama_tensors(TINY)["model.embed_tokens.weight"])


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_what_is_no_regular_file_is_not_opened(tmp_path: Path, make) -> None:
    make(tmp_path / "a.safetensors")
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))
    with pytest.raises(StorageError, match=r"a\.safetensors: cannot be read: is no regular file"):
        read_index(tmp_path)


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("beside", [True, False], ids=["beside safetensors", "alone"])
def test_a_pickle_is_never_opened(folder: Path, tmp_path: Path, beside: bool) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(tmp_path / "ran")))
    if beside:
        load_pretrained(folder, TINY, None, "float32")
    else:
        (folder / SINGLE_FILE).unlink()
        with pytest.raises(StorageError, match=r"pytorch_model\.bin.*never opened"):
            load_pretrained(folder, TINY, None, "float32")
    assert not (tmp_path / "ran").exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "ran").exists()  # the canary would have sung


def test_code_of_the_folder_s_own_is_refused_and_never_run(folder: Path, tmp_path: Path) -> None:
    (folder / "modeling_llama.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    fields = json.loads((folder / "config.json").read_text())
    fields["auto_map"] = {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=r"config\.json.*auto_map"):
        load_pretrained(folder, TINY, None, "float32")
    assert not (tmp_path / "ran").exists()


BAD_CONFIGS = {
    "nested without end": (b'{"a":' * 100_000, "is not a JSON object"),
    "endless": (b"{" + b" " * 2**20 + b"}", "more than 1048576"),
    "not UTF-8": (b'{"a": "\xff"}', "is not a JSON object"),
    "a list": (b"[]", "is not a JSON object"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_config_that_is_none_is_refused(folder: Path, case: str) -> None:
    content, message = BAD_CONFIGS[case]
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_config(folder)


def test_a_tensor_of_another_dtype_than_numbers_is_refused(folder: Path) -> None:
    tensors = llama_tensors(TINY) | {"model.norm.weight": np.ones(16, np.int32)}
    safetensors.numpy.save_file(tensors, folder / SINGLE_FILE)
    with pytest.raises(StorageError, match=r"model\.norm\.weight has dtype int32"):
        load_pretrained(folder, TINY, None, "float32")


def write_unindexed(folder: Path, shards: dict[str, list[str]]) -> None:
    tensors = llama_tensors(TINY)
    (folder / SINGLE_FILE).unlink()
    for file, names in shards.items():
        safetensors.numpy.save_file({name: tensors[name] for name in names}, folder / file)


def test_shards_without_an_index_are_read(folder: Path) -> None:
    names = list(llama_tensors(TINY))
    expected = load_pretrained(folder, TINY, None, "float32")
    write_unindexed(
        folder, {"model-00001-of-00002.safetensors": names[:7], "model-00002-of-00002.safetensors": names[7:]}
    )
    params = load_pretrained(folder, TINY, None, "float32")
    for path, values in expected.items():
        np.testing.assert_array_equal(params[path], values)


def test_shards_without_an_index_must_be_all_there_and_disjoint(folder: Path) -> None:
    names = list(llama_tensors(TINY))
    write_unindexed(
        folder, {"model-00001-of-00003.safetensors": names[:7], "model-00003-of-00003.safetensors": names[6:]}
    )
    with pytest.raises(StorageError, match=r"has no model-00002-of-00003\.safetensors"):
        read_index(folder)
    (folder / "model-00003-of-00003.safetensors").rename(folder / "rest.safetensors")
    (folder / "model-00001-of-00003.safetensors").rename(folder / "first.safetensors")
    with pytest.raises(StorageError, match=rf"{names[6]} is also in first\.safetensors"):
        read_index(folder)


def test_a_single_file_beside_a_shard_is_refused_and_other_names_are_passed_over(folder: Path) -> None:
    expected = read_index(folder)
    (folder / "consolidated.safetensors").write_bytes(b"not looked at")
    assert read_index(folder) == expected
    shard = "model-00001-of-00002.safetensors"
    (folder / shard).write_bytes(b"")
    with pytest.raises(StorageError, match=rf"has {SINGLE_FILE} and {shard}, .*Remove the stale one"):
        read_index(folder)
    (folder / SINGLE_FILE).rename(folder / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(expected, "model-00001-of-00001.safetensors")
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": names}))
    assert read_index(folder).keys() == expected.keys()


def test_mutated_headers_raise_nothing_but_storage_errors() -> None:
    account = fuzz_headers.main(2000, seed=0)
    assert account.failures == []
    assert 200 < account.verdicts["accepted"] < 1800
    assert len(account.verdicts) > 8


def test_the_fuzz_can_fail() -> None:
    def read(file):
        raise KeyError("not a StorageError")

    assert "KeyError" in fuzz_headers.main(10, seed=0, read=read).failures[0]
