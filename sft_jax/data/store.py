"""Rows in, tokenized examples on disk out: flat memory-mapped arrays under a name that says all that shaped them.

    <store_dir>/<fingerprint>/ids.int32             every example's ids, unshifted, one example after another
                              loss_weights.float32  of each id as a target; 0 for the first of an example
                              offsets.int64         example i is [offsets[i], offsets[i + 1])
                              files.int32           the file that example i came from, among the source's files
                              lines.int64           and its line,
                              elements.int32        and its element, where the file is one JSON array
                              hashes.uint64         of each example's ids
                              meta.json             what the fingerprint was made of, the account of rows, checksums

A store is made in parts (`part_sharing.py`), put together beside its final name and renamed when it is complete, so it
is there whole or not at all. It is never changed: other input has another name.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from sft_jax.config_schema import DataConfig, SourceConfig
from sft_jax.data.part_files import ARRAYS, read_part
from sft_jax.data.part_sharing import make_parts
from sft_jax.data.preparation import Recipe
from sft_jax.data.rendering import Renderer
from sft_jax.data.report import Account
from sft_jax.data.source_files import file_kind
from sft_jax.data.sources import hash_file
from sft_jax.datatypes import DataError, Origin, StorageError, TokenizedExample, shift

STORE_VERSION = 6
"""Raised whenever the same rows and options give other examples or another layout."""
CHECKED_BYTES = 256 << 20
"""Arrays up to this size are held against their checksums whenever they are opened: 0.1 seconds at most. A larger one's
size is checked."""
_META_FILE = "meta.json"
_MENDING = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Free space there"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "Give yourself the permission to write there"),
    errno.EROFS: "Mount it so that it can be written",
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), "Remove the file that is in the way"),
}
_ARRAYS = {name: dtype for name, dtype in ARRAYS.items() if name != "sizes"} | {"offsets": np.dtype(np.int64)}


@dataclass(frozen=True)
class _Meta:
    fingerprint_fields: dict[str, Any]
    account: Account
    checksums: dict[str, tuple[int, int]]  # by file name: (bytes, crc32)


class TokenStore:
    """The examples of one source, read only. `path` is the source's, `files` those that it names."""

    def __init__(self, folder: Path, path: str, files: Sequence[str]):
        self.folder, self.path, self.files, self.fingerprint = folder, path, tuple(files), folder.name
        try:
            meta = msgspec.json.decode((folder / _META_FILE).read_bytes(), type=_Meta)
        except (OSError, msgspec.DecodeError) as error:
            raise self._damaged(f"{_META_FILE} has not what it should: {error}") from error
        self.fingerprint_fields = meta.fingerprint_fields
        self.account = _relocate(meta.account, {str(i): file for i, file in enumerate(files)})
        self._checksums = meta.checksums
        self._ids, self._loss_weights, self._offsets = map(self._map, ("ids", "loss_weights", "offsets"))
        self._files, self._lines, self._elements = map(self._map, ("files", "lines", "elements"))
        self.hashes = self._map("hashes")

    def _map(self, name: str) -> np.ndarray:
        dtype = _ARRAYS[name]
        file = self.folder / _file_name(name, dtype)
        num_bytes, checksum = self._checksums[file.name]
        found = file.stat().st_size if file.exists() else 0
        if found != num_bytes:
            raise self._damaged(f"{file.name} has {found:,} bytes of {num_bytes:,}")
        # A slice of a plain array costs a fifth of one of a memmap; of nothing there is no map.
        array = np.asarray(np.memmap(file, dtype, mode="r")) if found else np.empty(0, dtype)
        if num_bytes <= CHECKED_BYTES and zlib.crc32(array.data) != checksum:
            raise self._damaged(f"{file.name} has changed")
        return array

    def _damaged(self, how: str) -> DataError:
        return DataError(f"{self.folder}: is damaged: {how}. Delete it, and it is made anew.")

    def __len__(self) -> int:
        return len(self._lines)

    @cached_property
    def lengths(self) -> np.ndarray:
        """The number of inputs of each example, int32 [num_examples]."""
        return (np.diff(self._offsets) - 1).astype(np.int32)

    def example(self, index: int) -> TokenizedExample:
        span = slice(self._offsets[index], self._offsets[index + 1])
        return TokenizedExample.from_ids(self._ids[span], self._loss_weights[span], self.origin(index))

    def views(self, indices: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(inputs, targets, loss_weights) of some examples, as `example` has them, in a fifth of the time."""
        begins, ends = self._offsets[indices].tolist(), self._offsets[indices + 1].tolist()
        ids, weights = self._ids, self._loss_weights
        return [shift(ids[begin:end], weights[begin:end]) for begin, end in zip(begins, ends, strict=True)]

    def origin(self, index: int) -> Origin:
        return Origin(self.files[self._files[index]], int(self._lines[index]), int(self._elements[index]))


def open_store(
    source: SourceConfig,
    files: Sequence[str],
    data: DataConfig,
    renderer: Renderer,
    renderer_factory: Callable[[], Renderer],
) -> TokenStore:
    """The store of a source, made first where it is not there. Its account is the caller's to check.

    Args:
      files: those that the source's path names, in order.
      renderer_factory: opens the same renderer in another process; what pickle can send.

    Raises:
      DataError: a file cannot be read, or it changed while it was read; the store is damaged.
      StorageError: config.data.store_dir cannot be written.
    """
    contents = [hash_file(file) for file in files]
    fields = _fingerprint_fields(source, files, contents, data, renderer)
    store_dir = Path(data.store_dir).expanduser()
    folder = store_dir / hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    if not folder.exists():
        recipe = Recipe(source, data, renderer_factory, renderer.fingerprint())
        try:
            _make_store(folder, files, contents, fields, recipe, renderer)
        except OSError as error:  # of writing: the source's are DataErrors
            why = error.strerror or str(error) or type(error).__name__
            first = _MENDING.get(error.errno or 0, "Look at what is there")
            what = f"config.data.store_dir: {store_dir} cannot be written: {why}"
            raise StorageError(f"{what}. {first}, or name another folder.") from error
    return TokenStore(folder, source.path, files)


def _fingerprint_fields(
    source: SourceConfig, files: Sequence[str], contents: Sequence[str], data: DataConfig, renderer: Renderer
) -> dict[str, Any]:
    """All that shapes the examples, as JSON values by name. Those of the source alone begin with `source.`."""
    return {
        "source.path": contents,
        "source.read_as": [file_kind(file) for file in files],  # by its ending, which may be another
        "source.format": source.format,
        "source.split": source.split,
        "source.held_out_fraction": source.held_out_fraction,
        "source.max_rows": source.max_rows,
        "source.fields": dict(source.fields),
        "config.data.new_tokens": list(data.new_tokens),
        "config.data.role_map": dict(data.role_map),
        "config.data.policies": dict(data.policies),
        "config.data.unknown_tokens": data.unknown_tokens,
        "config.data.too_long": data.too_long,
        "config.data.max_seq_len": data.max_seq_len,
        "store_version": STORE_VERSION,
        **renderer.fingerprint_fields(),
    }


def _make_store(
    folder: Path,
    files: Sequence[str],
    contents: Sequence[str],
    fields: dict[str, Any],
    recipe: Recipe,
    renderer: Renderer,
) -> None:
    """Make the parts, put them together and give the store its name. Raises: OSError."""
    parts_folder = folder.with_name(f"{folder.name}.parts")
    parts_folder.mkdir(parents=True, exist_ok=True)
    try:
        parts = make_parts(parts_folder, folder, files, contents, recipe, renderer)
        if not folder.exists():
            building = Path(tempfile.mkdtemp(prefix="building-", dir=parts_folder))
            try:
                account, checksums = _join(parts, building)
                (building / _META_FILE).write_bytes(msgspec.json.encode(_Meta(fields, account, checksums)))
                _publish(building, folder)
            finally:
                shutil.rmtree(building, ignore_errors=True)  # renamed by now, unless something failed
    except FileNotFoundError:
        if not folder.exists():  # if it does, another run was first, and has cleared the parts away
            raise
    shutil.rmtree(parts_folder, ignore_errors=True)


def _join(parts: Sequence[Path], folder: Path) -> tuple[Account, dict[str, tuple[int, int]]]:
    """The arrays of all parts in order, one part in memory at a time. Returns: their account and the checksums."""
    account = Account()
    with contextlib.ExitStack() as stack:
        arrays = {name: _ArrayFile(stack, folder, name, dtype) for name, dtype in _ARRAYS.items()}
        offset = np.zeros(1, np.int64)
        arrays["offsets"].append(offset)
        for path in parts:
            part = read_part(path)
            if part is None:
                raise FileNotFoundError(2, "a part of it is gone", str(path))
            account.merge(_relocate(part.account, {file: str(i) for i, file in enumerate(part.files)}))
            offsets = offset + np.cumsum(part.arrays["sizes"])
            offset = offsets[-1:] if len(offsets) else offset
            for name in arrays:
                arrays[name].append(offsets if name == "offsets" else part.arrays[name])
    return account, {array.path.name: (array.num_bytes, array.checksum) for array in arrays.values()}


class _ArrayFile:
    """An array of a store that grows, with its checksum."""

    def __init__(self, stack: contextlib.ExitStack, folder: Path, name: str, dtype: np.dtype):
        self.path = folder / _file_name(name, dtype)
        self.num_bytes = self.checksum = 0
        self._dtype = dtype
        self._file = stack.enter_context(self.path.open("wb"))

    def append(self, values: np.ndarray) -> None:
        values = np.ascontiguousarray(values, self._dtype)
        self._file.write(values.data)
        self.num_bytes += values.nbytes
        self.checksum = zlib.crc32(values.data, self.checksum)


def _file_name(name: str, dtype: np.dtype) -> str:
    return f"{name}.{dtype.name}"


def _relocate(account: Account, paths: Mapping[str, str]) -> Account:
    """The account with the files of its origins renamed. In a store they are numbers: files may move."""
    for lost in (*account.bad.values(), *account.dropped.values()):
        lost.origins = [origin._replace(path=paths[origin.path]) for origin in lost.origins]
    return account


def _publish(building: Path, folder: Path) -> None:
    """Give a complete store its name. Another run may have put the same store there meanwhile."""
    for file in building.iterdir():
        with open(file, "rb") as written:
            os.fsync(written.fileno())
    try:
        os.rename(building, folder)
    except OSError:
        if not folder.exists():
            raise
