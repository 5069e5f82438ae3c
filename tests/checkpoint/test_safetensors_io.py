"""The library's own files are read, the library reads ours, and nothing damaged gets through."""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from sft_jax.checkpoint.model_files import ModelFile
from sft_jax.checkpoint.safetensors_io import (
    INDEX_FILE,
    SINGLE_FILE,
    map_tensor,
    read_header,
    read_index,
)
from sft_jax.checkpoint.safetensors_writer import TensorSpec, plan_shards, write_tensors
from sft_jax.datatypes import StorageError


def make_file(path: Path, header: dict | bytes, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header, honest or not."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)
    return path


def entry(begin: int, end: int, shape: tuple[int, ...] | None = None, dtype: str = "U8") -> dict:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else list(shape), "data_offsets": [begin, end]}


def specs_of(tensors: dict[str, np.ndarray]) -> list[TensorSpec]:
    return [TensorSpec(name, values.dtype, values.shape) for name, values in tensors.items()]


@pytest.mark.parametrize(
    "dtype", ["?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", ml_dtypes.bfloat16]
)
def test_reads_what_the_library_writes(tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0, 50, (3, 4, 5)).astype(dtype)
    tensors = {"a": values, "scalar": np.array(values[0, 0, 0]), "empty": values[:0], "b": values[1]}
    safetensors.numpy.save_file(tensors, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    index = read_index(tmp_path)
    assert index.keys() == tensors.keys()
    for name, expected in tensors.items():
        read = map_tensor(index[name])
        assert (read.dtype, read.shape) == (expected.dtype, expected.shape)
        assert read.tobytes() == expected.tobytes()


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in {"w": (4, 6), "v": (3,)}.items()}
    tensors["h"] = tensors["w"].astype(ml_dtypes.bfloat16).T  # not contiguous
    write_tensors(tmp_path, specs_of(tensors), tensors.items())
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE_FILE]
    read = safetensors.numpy.load_file(tmp_path / SINGLE_FILE)
    assert {name: values.tobytes() for name, values in read.items()} == {n: v.tobytes() for n, v in tensors.items()}
    with safetensors.safe_open(tmp_path / SINGLE_FILE, "numpy") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_shards_hold_at_most_the_limit_and_the_index_names_them(tmp_path: Path) -> None:
    tensors = {f"t{i}": np.full((5, 2), i, np.float32) for i in range(5)}  # 40 bytes each
    write_tensors(tmp_path, specs_of(tensors), tensors.items(), max_shard_bytes=80)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [*(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), INDEX_FILE]
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == 200
    read = {name: values for file in files[:3] for name, values in safetensors.numpy.load_file(tmp_path / file).items()}
    assert read.keys() == tensors.keys() == read_index(tmp_path).keys()
    for name, values in tensors.items():
        np.testing.assert_array_equal(map_tensor(read_index(tmp_path)[name]), values)


def test_a_tensor_may_come_in_pieces(tmp_path: Path) -> None:
    values = np.arange(10, dtype=np.float32).reshape(5, 2)
    tensors = [("a", values[:2]), ("a", values[2:3]), ("a", values[3:]), ("b", values[0]), ("c", values[:0])]
    specs = [TensorSpec(name, values.dtype, shape) for name, shape in {"a": (5, 2), "b": (2,), "c": (0, 2)}.items()]
    write_tensors(tmp_path, specs, tensors)
    read = safetensors.numpy.load_file(tmp_path / SINGLE_FILE)
    np.testing.assert_array_equal(read["a"], values)
    np.testing.assert_array_equal(read["b"], values[0])
    with pytest.raises(AssertionError, match="6 rows are not"):
        write_tensors(tmp_path, specs, [tensors[0], ("a", values[:4]), *tensors[3:]])


def test_a_tensor_over_the_limit_has_a_shard_of_its_own() -> None:
    small, large = TensorSpec("s", np.dtype("f4"), (1,)), TensorSpec("l", np.dtype("f4"), (100,))
    assert plan_shards([small, large, small, small], 8) == [(small,), (large,), (small, small)]


def test_a_failed_write_leaves_no_file_of_that_name(tmp_path: Path) -> None:
    tensors = {"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)}
    with pytest.raises(AssertionError, match="nothing is left"):
        write_tensors(tmp_path, specs_of(tensors), [("a", tensors["a"])])
    assert not (tmp_path / SINGLE_FILE).exists()


HOSTILE_FILES = {
    "no header": (dict(header=b"", length=10**15), "claims 1000000000000000 bytes"),
    "header longer than the file": (dict(header=b"{}", length=3), "claims 3 bytes, and the file has 10"),
    "not JSON": (dict(header=b"{'a': 1}"), "header is not valid JSON"),
    "not UTF-8": (dict(header='{"\u00e9": 1}'.encode("utf-16")), "header is not valid JSON"),
    "nested without end": (dict(header=b"[" * 100_000), "header is malformed: Expected `object`"),
    "nested in a name": (dict(header=b'{"a":' * 100_000), "header is not valid JSON"),
    "nested in a shape": (dict(header=b'{"a":{"dtype":"U8","shape":' + b"[" * 100_000), "header is not valid JSON"),
    "an array": (dict(header=b"[]"), "header is malformed: Expected `object`"),
    "a name twice": (
        dict(header=b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 1)).encode(),) * 2), data=b"x"),
        "'a' occurs twice",
    ),
    "no dtype": (dict(header={"a": {"shape": [1], "data_offsets": [0, 1]}}, data=b"x"), "missing required field"),
    "a field twice": (
        dict(header=b'{"a":{"dtype":"U8","shape":[1],"shape":[1],"data_offsets":[0,1]}}', data=b"x"),
        "'shape' occurs twice",
    ),
    "endless dims": (dict(header={"a": entry(0, 1, shape=(1,) * 9)}, data=b"x"), "length <= 8"),
    "metadata that is no text": (dict(header={"__metadata__": {"a": 1}}), "header is malformed"),
    "unknown field": (dict(header={"a": entry(0, 1) | {"stride": 1}}, data=b"x"), "unknown field `stride`"),
    "unknown dtype": (dict(header={"a": entry(0, 1, dtype="F4")}, data=b"x"), "tensor a has dtype F4"),
    "negative dim": (dict(header={"a": entry(0, 1, shape=(-1, -1))}, data=b"x"), "header is malformed"),
    "float dim": (dict(header={"a": entry(0, 1, shape=(1.5,))}, data=b"x"), "header is malformed"),
    "huge dims": (dict(header={"a": entry(0, 1, shape=(2**20, 2**20))}, data=b"x"), "span 1"),
    "huge dims of no bytes": (dict(header={"a": entry(0, 0, shape=(0, 2**64))}), "has shape [0, 18446744073709551616]"),
    "offsets backwards": (dict(header={"a": entry(0, 1) | {"data_offsets": [1, 0]}}, data=b"x"), "span -1"),
    "shape and offsets disagree": (dict(header={"a": entry(0, 4, shape=(2,), dtype="F32")}, data=b"xxxx"), "8 bytes"),
    "overlap": (dict(header={"a": entry(0, 3), "b": entry(2, 4)}, data=b"xxxx"), "tensor b overlaps tensor a"),
    "same bytes": (dict(header={"a": entry(0, 4), "b": entry(0, 4)}, data=b"xxxx"), "tensor b overlaps tensor a"),
    "gap": (dict(header={"a": entry(0, 1), "b": entry(2, 4)}, data=b"xxxx"), "tensor b leaves a gap after tensor a"),
    "gap at the start": (dict(header={"a": entry(1, 4)}, data=b"xxxx"), "leaves a gap after the header"),
    "past the end": (dict(header={"a": entry(0, 5)}, data=b"xxxx"), "end at byte"),
    "bytes left over": (dict(header={"a": entry(0, 3)}, data=b"xxxx"), "end at byte"),
}


@pytest.mark.parametrize("case", HOSTILE_FILES)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, case: str) -> None:
    parts, message = HOSTILE_FILES[case]
    file = make_file(tmp_path / SINGLE_FILE, **parts)
    with pytest.raises(StorageError, match=re.escape(message)) as caught:
        read_index(tmp_path)
    assert str(file) in str(caught.value)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    file = make_file(tmp_path / SINGLE_FILE, {"a": entry(0, 3), "b": entry(3, 8, shape=(5, 1))}, b"12345678")
    whole = file.read_bytes()
    assert read_index(tmp_path)
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(StorageError, match="truncated"):
            read_index(tmp_path)


def test_a_file_that_shrinks_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    file = make_file(tmp_path / SINGLE_FILE, {"a": entry(0, 4)}, b"1234")
    info = read_header(ModelFile(str(file)))["a"]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StorageError, match="Did the file change"):
        map_tensor(info)


def write_shards(folder: Path, weight_map: dict, shards: dict[str, list[str]]) -> None:
    for file, names in shards.items():
        safetensors.numpy.save_file({name: np.ones(2, np.float32) for name in names}, folder / file)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
HOSTILE_INDEXES = {
    "outside the folder": ({"a": "../../x.safetensors"}, {}, "names the shard '../../x.safetensors'"),
    "absolute": ({"a": "/etc/x.safetensors"}, {}, "names the shard '/etc/x.safetensors'"),
    "backslash": ({"a": "..\\x.safetensors"}, {}, "expected a .safetensors file in the same folder"),
    "null byte": ({"a": "x\0.safetensors"}, {}, "expected a .safetensors file in the same folder"),
    "pickle": ({"a": "pytorch_model.bin"}, {}, "expected a .safetensors file in the same folder"),
    "not a text": ({"a": 1}, {}, "is malformed"),
    "shard missing": ({"a": A}, {}, f"{A}: cannot be read"),
    "tensor missing": ({"a": A, "b": A}, {A: ["a"]}, "names 1 tensors that its shards do not hold, such as b"),
    "tensor unnamed": ({"a": A}, {A: ["a", "b"]}, "it is not named there"),
    "in another shard": ({"a": A, "b": B}, {A: ["b"], B: ["a"]}, "from different exports"),
    "in two shards": ({"a": A, "b": B}, {A: ["a"], B: ["a", "b"]}, f"tensor a is also in {A}"),
}


@pytest.mark.parametrize("case", HOSTILE_INDEXES)
def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path, case: str) -> None:
    weight_map, shards, message = HOSTILE_INDEXES[case]
    write_shards(tmp_path, weight_map, shards)
    with pytest.raises(StorageError, match=re.escape(message)):
        read_index(tmp_path)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(StorageError, match=r"pytorch_model\.bin.*never opened.*safe_serialization=True"):
        read_index(tmp_path)


def test_a_folder_without_weights_or_with_two_sets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="has neither"):
        read_index(tmp_path)
    write_shards(tmp_path, {"a": A}, {A: ["a"], SINGLE_FILE: ["a"]})
    with pytest.raises(StorageError, match="Remove the stale one"):
        read_index(tmp_path)
