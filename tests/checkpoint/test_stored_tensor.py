"""A view of a tensor is what slicing the whole would give, from a file or a URL; only its bytes are read."""

import itertools
import math
from pathlib import Path

import fsspec
import ml_dtypes
import numpy as np
import pytest

from sft_jax.checkpoint import safetensors_io
from sft_jax.checkpoint.model_files import ModelFile
from sft_jax.checkpoint.safetensors_io import TensorInfo
from sft_jax.checkpoint.stored_tensor import all_finite, copy_in_blocks
from sft_jax.datatypes import StorageError

BEFORE = b"before"


def store(path: str, values: np.ndarray) -> TensorInfo:
    with fsspec.open(path, "wb") as stream:
        stream.write(BEFORE + values.tobytes() + b"after")
    file = ModelFile(path)
    return TensorInfo("w", values.dtype, values.shape, file, len(BEFORE), len(BEFORE) + values.nbytes)


@pytest.fixture(params=["disk", "memory"])
def path(request, tmp_path: Path) -> str:
    return str(tmp_path / "w") if request.param == "disk" else f"memory://{tmp_path}/w"


WHOLE = np.arange(4 * 6 * 10, dtype=np.int32).reshape(24, 10)  # (N H) D
VIEWS = {
    "whole": lambda w: w,
    "transposed": lambda w: w.T,
    "split": lambda w: w.reshape(4, 6, 10).transpose(2, 0, 1),
    "a head": lambda w: w.reshape(4, 6, 10).transpose(2, 0, 1)[3:9, 1:2, :],
    "columns": lambda w: w[:, 2:4],
    "a part of a fused one": lambda w: w[5:21].reshape(2, 8, 10)[1:, 2:5],
    "a row": lambda w: w[7],
    "a column": lambda w: w[:, 7],
    "a value": lambda w: w[3, 3, ...],
    "every third": lambda w: w[1::3, ::2],
    "nothing": lambda w: w[3:3],
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("request_bytes", [2**20, 64])
def test_a_view_is_that_of_the_whole(path: str, name: str, request_bytes: int, monkeypatch) -> None:
    monkeypatch.setattr(safetensors_io, "_REQUEST_BYTES", request_bytes)
    monkeypatch.setattr(safetensors_io, "_MAX_GAP_BYTES", request_bytes // 8)
    tensor, expected = store(path, WHOLE), np.asarray(VIEWS[name](WHOLE))
    out = np.empty(expected.shape, np.float64)
    tensor.read_view(VIEWS[name], out)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_values_are_cast_as_numpy_casts_them(path: str, dtype: str) -> None:
    values = np.random.default_rng(0).normal(size=(3, 4)).astype(dtype)
    tensor = store(path, values)
    for wanted in ("float32", "bfloat16"):
        out = np.empty((4, 3), np.dtype(wanted))
        tensor.read_view(np.transpose, out)
        assert out.tobytes() == values.T.astype(wanted).tobytes()


def test_every_byte_is_asked_for_once_and_no_other(tmp_path: Path, monkeypatch) -> None:
    asked: list[tuple[int, int]] = []
    read_ranges = ModelFile.read_ranges

    def spy(file: ModelFile, ranges):
        asked.extend(ranges)
        return read_ranges(file, ranges)

    monkeypatch.setattr(ModelFile, "read_ranges", spy)
    monkeypatch.setattr(safetensors_io, "_MAX_GAP_BYTES", 0)
    tensor = store(f"memory://{tmp_path}/w", WHOLE)
    out = np.empty((6, 2), np.int32)
    tensor.read_view(lambda w: w[8:14, 4:6], out)
    assert asked == [(len(BEFORE) + 40 * row + 16, len(BEFORE) + 40 * row + 24) for row in range(8, 14)]
    asked.clear()
    tensor.read_view(lambda w: w[8:14], np.empty((6, 10), np.int32))
    assert asked == [(len(BEFORE) + 320, len(BEFORE) + 560)]


def test_a_file_that_ends_early_is_refused(path: str) -> None:
    tensor = store(path, WHOLE)
    with fsspec.open(path, "wb") as stream:
        stream.write(BEFORE)
    with pytest.raises(StorageError, match="Did the file change"):
        tensor.read_view(lambda w: w, np.empty(WHOLE.shape, np.int32))


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"memory://.*/none: cannot be read"):
        ModelFile(f"memory://{tmp_path}/none").size()
    with pytest.raises(StorageError, match=r"nowhere://x: cannot be read.*Check the URL"):
        ModelFile("nowhere://x").size()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_blocks_copy_everything(order: tuple[int, ...]) -> None:
    values = np.arange(700 * 90 * 5, dtype=np.int32).reshape(700, 90, 5)
    from_transposed = np.empty([values.shape[dim] for dim in order], np.int64)
    copy_in_blocks(from_transposed, values.transpose(order))
    np.testing.assert_array_equal(from_transposed, values.transpose(order))
    back = np.empty_like(values)
    copy_in_blocks(back.transpose(order)[None], from_transposed[None])
    np.testing.assert_array_equal(back, values)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_value_that_is_no_number_is_found(dtype: str) -> None:
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    info = ml_dtypes.finfo(kind)
    fine = np.array([0.0, -0.0, info.max, info.min, info.tiny, info.smallest_subnormal, 1.5], kind)
    assert all_finite(fine)
    assert all_finite(fine[:0])
    for bad in (math.nan, -math.nan, math.inf, -math.inf):
        assert not all_finite(np.append(fine, kind.type(bad)))
