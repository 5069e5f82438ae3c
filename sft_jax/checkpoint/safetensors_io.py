"""A folder of safetensors files -> an index of tensors, mapped on demand; and tensors, one by one -> such a folder.

One file is an 8-byte little-endian length n, a JSON header of n bytes, and the tensors' bytes end to end:

    n | {"w": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ...} | 12 bytes of w | ...

Every claim of a header is checked before a tensor is touched: the offsets must tile the rest of the file exactly, so no
two tensors share bytes and no bytes are left unexplained. Pickle formats are never opened.
Source: https://github.com/huggingface/safetensors#format
"""

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import ml_dtypes
import msgspec
import numpy as np

from sft_jax.datatypes import StorageError

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype("?"), "U8": np.dtype("u1"), "I8": np.dtype("i1"), "U16": np.dtype("<u2"), "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"), "I32": np.dtype("<i4"), "U64": np.dtype("<u8"), "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
_MAX_HEADER_BYTES = 100_000_000  # the reference implementation's bound
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: bytes [begin, end) of `file`, row-major."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    def __str__(self) -> str:
        return f"{self.file}: tensor {self.name}"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


_Count = Annotated[int, msgspec.Meta(ge=0)]


class _HeaderEntry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: list[_Count]
    data_offsets: tuple[_Count, _Count]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def read_index(folder: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """The tensors of a folder that holds `model.safetensors`, or shards with `model.safetensors.index.json`.

    Reads headers only.

    Raises:
      StorageError: where there is no such file, both, only pickles, or a file, a header or the index is wrong.
    """
    folder = Path(folder)
    has_single, has_index = (folder / SINGLE_FILE).is_file(), (folder / INDEX_FILE).is_file()
    if has_single and has_index:
        raise StorageError(
            f"{folder}: has {SINGLE_FILE} and {INDEX_FILE}, and they may hold different weights. Remove the stale one."
        )
    if has_single:
        return read_header(folder / SINGLE_FILE)
    if has_index:
        return _read_sharded(folder)
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in _PICKLE_SUFFIXES)
    if pickles:
        raise StorageError(
            f"{folder}: has no {SINGLE_FILE}, only {', '.join(pickles[:3])}. Pickle files can run code and are never "
            "opened. Convert them on a machine that may: model.save_pretrained(folder, safe_serialization=True)."
        )
    raise StorageError(f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE}. Name a Hugging Face model folder.")


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file.

    Raises:
      StorageError: where the file cannot be read or is not exactly what its header says.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise StorageError(
                    f"{file}: its header claims {length} bytes, and the file has {size}. It is truncated, or no "
                    "safetensors file (a Git LFS pointer?). Download it again."
                )
            header = stream.read(length)
    except OSError as error:
        raise StorageError(f"{file}: cannot be read: {error.strerror}. Check the path and its permissions.") from error
    fields = _parse_json(header, file, "header")
    fields.pop("__metadata__", None)
    entries = _convert(fields, dict[str, _HeaderEntry], file, "header")
    tensors = {name: _tensor_info(name, entry, file, 8 + length) for name, entry in entries.items()}
    _check_tiling(tensors.values(), file, 8 + length, size)
    return tensors


def _parse_json(data: bytes, file: Path, what: str) -> dict[str, Any]:
    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{twice!r} occurs twice")
        return fields

    try:
        fields = json.loads(data.decode("utf-8"), object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{file}: its {what} is not valid JSON: {error}. Download the file again.") from error
    if not isinstance(fields, dict):
        raise StorageError(f"{file}: its {what} is a JSON {type(fields).__name__}, not an object. Download it again.")
    return fields


def _convert(fields: dict[str, Any], kind: Any, file: Path, what: str) -> Any:
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise StorageError(f"{file}: its {what} is malformed: {error}. Download the file again.") from error


def _tensor_info(name: str, entry: _HeaderEntry, file: Path, data_begin: int) -> TensorInfo:
    if entry.dtype not in DTYPES:
        raise StorageError(
            f"{file}: tensor {name} has dtype {entry.dtype}; known are {', '.join(DTYPES)}. Convert the weights."
        )
    dtype = DTYPES[entry.dtype]
    begin, end = entry.data_offsets
    expected = math.prod(entry.shape) * dtype.itemsize
    if end - begin != expected:
        raise StorageError(
            f"{file}: tensor {name} is {entry.dtype} {entry.shape}, {expected} bytes, but its data_offsets "
            f"[{begin}, {end}] span {end - begin}. The file is damaged: download it again."
        )
    return TensorInfo(name, dtype, tuple(entry.shape), file, data_begin + begin, data_begin + end)


def _check_tiling(tensors: Iterable[TensorInfo], file: Path, begin: int, end: int) -> None:
    """The tensors' bytes must cover [begin, end) with no gap and no overlap."""
    at, previous = begin, "the header"
    for tensor in sorted(tensors, key=lambda t: (t.begin, t.end)):
        if tensor.begin != at:
            relation = "overlaps" if tensor.begin < at else "leaves a gap after"
            raise StorageError(f"{tensor} {relation} {previous}. The file is damaged: download it again.")
        at, previous = tensor.end, f"tensor {tensor.name}"
    if at != end:
        raise StorageError(
            f"{file}: its tensors end at byte {at}, but the file has {end}. It is truncated or has foreign bytes at "
            "its end: download it again."
        )


def _read_sharded(folder: Path) -> dict[str, TensorInfo]:
    path = folder / INDEX_FILE
    if path.stat().st_size > _MAX_HEADER_BYTES:
        raise StorageError(f"{path}: has {path.stat().st_size} bytes, more than {_MAX_HEADER_BYTES}. It is no index.")
    weight_map: dict[str, str] = _convert(_parse_json(path.read_bytes(), path, "text"), _Index, path, "text").weight_map
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        if not re.fullmatch(r"[\w.-]+\.safetensors", shard):  # no separators: a shard may not leave the folder
            raise StorageError(f"{path}: names the shard {shard!r}; expected a .safetensors file in the same folder.")
        for name, info in read_header(folder / shard).items():
            if name in tensors:
                raise StorageError(f"{info} is also in {tensors[name].file.name}. Remove the stale shard.")
            if weight_map.get(name) != shard:
                raise StorageError(
                    f"{info} is not in this shard by {INDEX_FILE} ({weight_map.get(name, 'it is not named there')}). "
                    "Shards and index are from different exports: download the folder again."
                )
            tensors[name] = info
    missing = sorted(weight_map.keys() - tensors.keys())
    if missing:
        raise StorageError(
            f"{path}: names {len(missing)} tensors that its shards do not hold, such as {missing[0]} in "
            f"{weight_map[missing[0]]}. Download the folder again."
        )
    return tensors


def map_tensor(info: TensorInfo) -> np.ndarray:
    """A read-only view of a tensor's bytes. Nothing is read until it is sliced and copied, and then only those pages;
    the pages leave memory with the last view.

    Raises:
      StorageError: where the file is gone or has shrunk since its header was read.
    """
    if info.begin == info.end:
        return np.empty(info.shape, info.dtype)
    try:
        return np.memmap(info.file, info.dtype, "r", info.begin, info.shape)
    except (OSError, ValueError) as error:
        raise StorageError(f"{info} cannot be read: {error}. Did the file change? Start again.") from error


def plan_shards(specs: Iterable[TensorSpec], max_shard_bytes: int) -> list[tuple[TensorSpec, ...]]:
    """Cut a sequence of tensors into shards, in order, each of at most `max_shard_bytes` or of one tensor."""
    shards: list[list[TensorSpec]] = [[]]
    shard_bytes = 0
    for spec in specs:
        if shard_bytes and shard_bytes + spec.num_bytes > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(spec)
        shard_bytes += spec.num_bytes
    return [tuple(shard) for shard in shards]


def write_tensors(
    folder: Path,
    specs: Iterable[TensorSpec],
    tensors: Iterable[tuple[str, np.ndarray]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a folder that `read_index` reads: one file, or shards with an index.

    Each file appears under its name when its bytes are complete and on disk; the index comes last.

    Args:
      specs: every tensor, in the order of writing.
      tensors: their names and values in that order, taken one at a time and dropped once written.
    """
    shards = plan_shards(specs, max_shard_bytes)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    files = dict(zip(names if len(shards) > 1 else [SINGLE_FILE], shards, strict=True))
    tensors = iter(tensors)
    for file, shard in files.items():
        partial = folder / f"{file}.partial"
        with partial.open("wb") as stream:
            stream.write(_encode_header(shard))
            for spec in shard:
                name, values = next(tensors)
                assert (name, values.dtype, values.shape) == (spec.name, spec.dtype, spec.shape), (
                    f"{name} is not {spec}"
                )
                stream.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(folder / file)
    assert next(tensors, None) is None, "more tensors than specs"
    if len(files) > 1:
        total = sum(spec.num_bytes for shard in shards for spec in shard)
        weight_map = {spec.name: file for file, shard in files.items() for spec in shard}
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _encode_header(specs: Iterable[TensorSpec]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without a format
    at = 0
    for spec in specs:
        end = at + spec.num_bytes
        header[spec.name] = {"dtype": _DTYPE_NAMES[spec.dtype], "shape": spec.shape, "data_offsets": (at, end)}
        at = end
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)  # the tensors begin at a multiple of 8
    return len(data).to_bytes(8, "little") + data


def write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
