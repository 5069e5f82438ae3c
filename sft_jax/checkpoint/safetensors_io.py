"""A folder of safetensors files, on disk or behind a URL -> an index of tensors, whose bytes are read on demand.

One file is an 8-byte little-endian length n, a JSON header of n bytes, and the tensors' bytes end to end:

    n | {"w": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ...} | 12 bytes of w | ...

Every claim of a header is checked before a tensor is touched: the offsets must tile the rest of the file exactly, so no
two tensors share bytes and no bytes are left unexplained. Pickle formats are never opened.
Source: https://github.com/huggingface/safetensors#format
"""

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import ml_dtypes
import msgspec
import numpy as np

from sft_jax.checkpoint.model_files import Folder, ModelFile, file_in, list_folder
from sft_jax.checkpoint.stored_tensor import Index, StoredTensor
from sft_jax.datatypes import StorageError

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype("?"), "U8": np.dtype("u1"), "I8": np.dtype("i1"), "U16": np.dtype("<u2"), "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"), "I32": np.dtype("<i4"), "U64": np.dtype("<u8"), "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}  # fmt: skip

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_MAX_HEADER_BYTES = 2**25  # the reference implementation allows 100 MB; a header of 200,000 tensors has 25
_MAX_DIMS, _MAX_VALUES = 8, 2**48
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Of remote files: bytes between two wanted ranges that are read with them, and bytes of one request.
_MAX_GAP_BYTES = 2**16
_REQUEST_BYTES = 2**25
_REQUESTS_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class TensorInfo(StoredTensor):
    """Where a tensor lies: bytes [begin, end) of `file`, row-major."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: ModelFile
    begin: int
    end: int

    def __str__(self) -> str:
        return f"{self.file}: tensor {self.name}"

    def read_box(self, box: Index) -> np.ndarray:
        if self.file.is_remote:
            return _fetch_box(self, box)
        return map_tensor(self)[box]


_Count = Annotated[int, msgspec.Meta(ge=0)]


class _HeaderEntry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: Annotated[list[_Count], msgspec.Meta(max_length=_MAX_DIMS)]
    data_offsets: tuple[_Count, _Count]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def read_index(folder: Folder) -> dict[str, TensorInfo]:
    """The tensors of a folder that holds `model.safetensors`, or shards with or without `model.safetensors.index.json`.

    Reads headers only. Beside a single file or an index, safetensors under other names are passed over, such as the
    `consolidated.safetensors` that some folders hold the weights in once more.

    Raises:
      StorageError: where there is no such file, a single one beside an index or shards, only pickles, or a file, a
        header or the index is wrong.
    """
    names = list_folder(folder)
    others = [name for name in names if name == INDEX_FILE or _SHARD.fullmatch(name)]
    if SINGLE_FILE in names and others:
        raise StorageError(
            f"{folder}: has {SINGLE_FILE} and {others[-1]}, and they may hold different weights. Remove the stale one."
        )
    if SINGLE_FILE in names:
        return read_header(file_in(folder, SINGLE_FILE))
    if INDEX_FILE in names:
        return _read_sharded(folder)
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        _check_numbering(folder, shards)
        return _read_shards(folder, shards)
    pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
    if pickles:
        raise StorageError(
            f"{folder}: has no {SINGLE_FILE}, only {', '.join(pickles[:3])}. Pickle files can run code and are never "
            "opened. Convert them on a machine that may: model.save_pretrained(folder, safe_serialization=True)."
        )
    raise StorageError(f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE}. Name a Hugging Face model folder.")


def read_header(file: ModelFile) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file.

    Raises:
      StorageError: where the file cannot be read or is not exactly what its header says.
    """
    size = file.size()
    length = int.from_bytes(file.read(0, 8), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        raise StorageError(
            f"{file}: its header claims {length} bytes, and the file has {size}. It is truncated, or no safetensors "
            "file (a Git LFS pointer?). Download it again."
        )
    tensors = {
        name: _tensor_info(name, entry, file, 8 + length)
        for name, entry in _decode_header(file.read(8, 8 + length), file).items()
    }
    _check_tiling(tensors.values(), file, 8 + length, size)
    return tensors


def _decode_header(data: bytes, file: ModelFile) -> dict[str, _HeaderEntry]:
    with _well_formed(file, "header"):
        fields = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        msgspec.json.decode(fields.pop("__metadata__", b"{}"), type=dict[str, str])
        entries = {name: msgspec.json.decode(field, type=_HeaderEntry) for name, field in fields.items()}
        _refuse_duplicates(data)
    return entries


@contextmanager
def _well_formed(file: ModelFile, what: str) -> Iterator[None]:
    """JSON of a given form: it is checked while it is decoded, so a bomb of nested or endless lists takes no memory."""
    try:
        yield
    except msgspec.ValidationError as error:
        raise StorageError(f"{file}: its {what} is malformed: {error}. Download the file again.") from error
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{file}: its {what} is not valid JSON: {error}. Download the file again.") from error


def _refuse_duplicates(data: bytes) -> None:
    """Readers differ in which of two values of one name they take."""

    def check(pairs: list[tuple[str, Any]]) -> None:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} occurs twice")

    json.loads(data, object_pairs_hook=check)


def _tensor_info(name: str, entry: _HeaderEntry, file: ModelFile, data_begin: int) -> TensorInfo:
    if entry.dtype not in DTYPES:
        raise StorageError(
            f"{file}: tensor {name} has dtype {entry.dtype}; known are {', '.join(DTYPES)}. Convert the weights."
        )
    dtype = DTYPES[entry.dtype]
    begin, end = entry.data_offsets
    if math.prod(size or 1 for size in entry.shape) > _MAX_VALUES:  # of no bytes, where another dim is 0
        raise StorageError(f"{file}: tensor {name} has shape {entry.shape}. The file is damaged: download it again.")
    expected = math.prod(entry.shape) * dtype.itemsize
    if end - begin != expected:
        raise StorageError(
            f"{file}: tensor {name} is {entry.dtype} {entry.shape}, {expected} bytes, but its data_offsets "
            f"[{begin}, {end}] span {end - begin}. The file is damaged: download it again."
        )
    return TensorInfo(name, dtype, tuple(entry.shape), file, data_begin + begin, data_begin + end)


def _check_tiling(tensors: Iterable[TensorInfo], file: ModelFile, begin: int, end: int) -> None:
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


def _read_sharded(folder: Folder) -> dict[str, TensorInfo]:
    file = file_in(folder, INDEX_FILE)
    if file.size() > _MAX_HEADER_BYTES:
        raise StorageError(f"{file}: has {file.size()} bytes, more than {_MAX_HEADER_BYTES}. It is no index.")
    data = file.read()
    with _well_formed(file, "text"):
        weight_map = msgspec.json.decode(data, type=_Index).weight_map
        _refuse_duplicates(data)
    for shard in weight_map.values():
        if not re.fullmatch(r"[\w.-]+\.safetensors", shard):  # no separators: a shard may not leave the folder
            raise StorageError(f"{file}: names the shard {shard!r}; expected a .safetensors file in the same folder.")
    tensors = _read_shards(folder, sorted(set(weight_map.values())))
    for name, info in tensors.items():
        if weight_map.get(name) != info.file.name:
            raise StorageError(
                f"{info} is not in this shard by {INDEX_FILE} ({weight_map.get(name, 'it is not named there')}). "
                "Shards and index are from different exports: download the folder again."
            )
    missing = sorted(weight_map.keys() - tensors.keys())
    if missing:
        raise StorageError(
            f"{file}: names {len(missing)} tensors that its shards do not hold, such as {missing[0]} in "
            f"{weight_map[missing[0]]}. Download the folder again."
        )
    return tensors


def _read_shards(folder: Folder, shards: Iterable[str]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, info in read_header(file_in(folder, shard)).items():
            if name in tensors:
                raise StorageError(f"{info} is also in {tensors[name].file.name}. Remove the stale shard.")
            tensors[name] = info
    return tensors


def _check_numbering(folder: Folder, shards: Sequence[str]) -> None:
    """Shards with no index: where they are numbered, none may be missing, or be left from another export."""
    numbered = [re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.safetensors", name) for name in shards]
    series = {(of[1], of[3]) for of in numbered if of}
    wanted = {f"{of}-{number:05}-of-{last}.safetensors" for of, last in series for number in range(1, int(last) + 1)}
    missing = sorted(wanted - set(shards))
    if missing:
        raise StorageError(
            f"{folder}: has no {missing[0]} ({len(missing)} shards are missing), and no {INDEX_FILE}. Download it anew."
        )


def map_tensor(info: TensorInfo) -> np.ndarray:
    """A read-only view of a tensor's bytes. Nothing is read until it is sliced and copied, and then only those pages;
    the pages leave memory with the last view.

    Raises:
      StorageError: where the file is gone or has shrunk since its header was read.
    """
    if info.begin == info.end:
        return np.empty(info.shape, info.dtype)
    try:
        return np.memmap(info.file.path, info.dtype, "r", info.begin, info.shape)
    except (OSError, ValueError) as error:
        raise StorageError(f"{info} cannot be read: {error}. Did the file change? Start again.") from error


def _fetch_box(tensor: TensorInfo, box: Index) -> np.ndarray:
    """A box of a remote tensor, by requests for its bytes: runs that lie near each other are read as one."""
    out = np.empty([at.stop - at.start for at in box], tensor.dtype)
    data = out.reshape(-1).view(np.uint8)
    requests = _plan_requests(tensor, box)
    while batch := list(itertools.islice(requests, _REQUESTS_AT_ONCE)):
        parts = tensor.file.read_ranges([(runs[0][0], runs[-1][1]) for runs in batch])
        for runs, part in zip(batch, parts, strict=True):
            first, values = runs[0][0], np.frombuffer(part, np.uint8)
            for begin, end, at in runs:
                data[at : at + end - begin] = values[begin - first : end - first]
    return out


def _plan_requests(tensor: TensorInfo, box: Index) -> Iterator[list[tuple[int, int, int]]]:
    """Requests, each as its runs: (begin, end) in the file and where it goes among the box's bytes."""
    request: list[tuple[int, int, int]] = []
    for run in _contiguous_runs(tensor, box):
        if request and (run[0] - request[-1][1] > _MAX_GAP_BYTES or run[1] - request[0][0] > _REQUEST_BYTES):
            yield request
            request = []
        request.append(run)
    if request:
        yield request


def _contiguous_runs(tensor: TensorInfo, box: Index) -> Iterator[tuple[int, int, int]]:
    """The box's bytes in order, in runs that also lie together in the file, none longer than a request."""
    cut = max((dim for dim, at in enumerate(box) if at.stop - at.start < tensor.shape[dim]), default=0)
    outer, inner = box[:cut], box[cut:]
    strides = [tensor.dtype.itemsize * math.prod(tensor.shape[dim + 1 :]) for dim in range(len(box))]
    num_bytes = tensor.dtype.itemsize * math.prod(at.stop - at.start for at in inner)
    start = tensor.begin + (inner[0].start * strides[cut] if inner else 0)
    for number, place in enumerate(itertools.product(*(range(at.start, at.stop) for at in outer))):
        begin = start + sum(at * stride for at, stride in zip(place, strides, strict=False))
        for part in range(0, num_bytes, _REQUEST_BYTES):
            end = min(part + _REQUEST_BYTES, num_bytes)
            yield begin + part, begin + end, number * num_bytes + part
