"""Rows in, tokenized examples on disk out: flat memory-mapped arrays under a name that says all that shaped them.

    <store_dir>/<fingerprint>/ids.int32             every example's ids, unshifted, one example after another
                              loss_weights.float32  of each id as a target; 0 for the first of an example
                              offsets.int64         example i is [offsets[i], offsets[i + 1])
                              lines.int64           the line of the source that example i came from
                              meta.json             what the fingerprint was made of, and the account of rows

A store is written beside its final name and renamed when it is complete, so it is there whole or not at all, and two
runs that prepare the same data at once do not meet. It is never changed: other input has another name.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from sft_jax.config_schema import DataConfig, SourceConfig
from sft_jax.data.conversations import detect_format, ignored_fields, parse_row
from sft_jax.data.errors import RowError
from sft_jax.data.rendering import Renderer
from sft_jax.data.report import Account, LostRows
from sft_jax.data.sources import BadRow, hash_file, read_rows
from sft_jax.data.too_long import OverLongError, fit_examples
from sft_jax.datatypes import DataError, Origin, StorageError, TokenizedExample, shift

STORE_VERSION = 2
"""Raised whenever the same rows and options give other examples or another layout."""
_META_FILE = "meta.json"


@dataclass(frozen=True)
class _Meta:
    fingerprint_fields: dict[str, Any]
    account: Account


class TokenStore:
    """The examples of one source, read only. `path` is the source's file, for origins."""

    def __init__(self, folder: Path, path: str):
        self.folder, self.path, self.fingerprint = folder, path, folder.name
        meta = msgspec.json.decode((folder / _META_FILE).read_bytes(), type=_Meta)
        self.fingerprint_fields, self.account = meta.fingerprint_fields, meta.account
        self._ids = self._map("ids", np.int32)
        self._loss_weights = self._map("loss_weights", np.float32)
        self._offsets = self._map("offsets", np.int64)
        self._lines = self._map("lines", np.int64)
        sizes = (len(self._lines), len(self._offsets), len(self._ids), len(self._loss_weights))
        num_ids = self.account.tokens + self.account.examples
        if sizes != (self.account.examples, self.account.examples + 1, num_ids, num_ids):
            raise DataError(f"{folder}: is damaged: its arrays have sizes {sizes}. Delete it, and it is made anew.")

    def _map(self, name: str, dtype: type[np.generic]) -> np.ndarray:
        file = self.folder / f"{name}.{np.dtype(dtype).name}"
        if file.stat().st_size == 0:  # nothing to map
            return np.empty(0, dtype)
        return np.asarray(np.memmap(file, dtype, mode="r"))  # slices of a plain array cost a fifth

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
        return Origin(self.path, int(self._lines[index]))


def open_store(source: SourceConfig, data: DataConfig, renderer: Renderer) -> TokenStore:
    """The store of a source, made first where it is not there. Its account is the caller's to check.

    Raises:
      DataError: the source cannot be read, or it changed while it was read.
      StorageError: config.data.store_dir cannot be written.
    """
    content = hash_file(source.path)
    fields = {
        "content": content,
        "format": source.format,
        "role_map": dict(data.role_map),
        "renderer": renderer.fingerprint(),
        "unknown_tokens": data.unknown_tokens,
        "too_long": data.too_long,
        "max_seq_len": data.max_seq_len,
        "store_version": STORE_VERSION,
    }
    fingerprint = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    store_dir = Path(data.store_dir).expanduser()
    folder = store_dir / fingerprint
    if not folder.exists():
        try:
            store_dir.mkdir(parents=True, exist_ok=True)
            building = Path(tempfile.mkdtemp(prefix="building-", dir=store_dir))
            try:
                account = _write_store(building, source, content, data, renderer)
                (building / _META_FILE).write_bytes(msgspec.json.encode(_Meta(fields, account)))
                _publish(building, folder)
            finally:
                shutil.rmtree(building, ignore_errors=True)  # renamed by now, unless something failed
        except OSError as error:  # of writing: the source's are DataErrors
            raise StorageError(
                f"config.data.store_dir: {store_dir} cannot be written: {error.strerror}. Free space there, or name "
                "another folder."
            ) from error
    return TokenStore(folder, source.path)


def _write_store(folder: Path, source: SourceConfig, content: str, data: DataConfig, renderer: Renderer) -> Account:
    """Tokenize row after row into the arrays of a new store. Memory holds one row at a time."""
    account, digest, format = Account(), hashlib.sha256(), source.format
    by_choice = {"too_long": data.too_long != "error", "unknown_token": data.unknown_tokens == "drop"}
    with _open_arrays(folder) as append:
        for row in read_rows(source.path, digest.update):
            account.rows_read += 1
            counted = renderer.counts.copy()
            try:
                if isinstance(row, BadRow):
                    raise RowError(row.reason, row.origin, row.message)
                if format == "auto":
                    format = detect_format(row)
                parsed = parse_row(row, format, data.role_map)
                examples, lost, is_changed = fit_examples(parsed, renderer, data.max_seq_len, data.too_long)
            except RowError as error:
                if isinstance(error, OverLongError):
                    account.add_lost(error.lost)
                reasons = account.dropped if by_choice.get(error.reason) else account.bad
                reasons.setdefault(error.reason, LostRows()).add(error)
                continue
            account.add_trained(examples, renderer.counts - counted, ignored_fields(row, format))
            account.add_lost(lost)
            account.rows_shortened += is_changed
            for example in examples:
                append(example)
    if digest.hexdigest() != content:
        raise DataError(f"{source.path}: changed while it was read. Wait until it is written, and start again.")
    return account


@contextmanager
def _open_arrays(folder: Path) -> Iterator[Callable[[TokenizedExample], None]]:
    """A function that appends an example to the arrays of a new store."""
    with (
        open(folder / "ids.int32", "wb") as ids,
        open(folder / "loss_weights.float32", "wb") as loss_weights,
        open(folder / "offsets.int64", "wb") as offsets,
        open(folder / "lines.int64", "wb") as lines,
    ):
        num_ids = 0
        offsets.write(np.int64(num_ids).tobytes())

        def append(example: TokenizedExample) -> None:
            nonlocal num_ids
            num_ids += len(example) + 1
            ids.write(example.ids.astype(np.int32).tobytes())
            loss_weights.write(np.float32(0).tobytes() + example.loss_weights.astype(np.float32).tobytes())
            offsets.write(np.int64(num_ids).tobytes())
            lines.write(np.int64(example.origin.line).tobytes())

        yield append


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
