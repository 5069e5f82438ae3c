"""A file in, one `RawRow` or `BadRow` per row out, in file order and in bounded memory.

JSON is read strictly: what two readers could understand differently (a key given twice, NaN, half of a surrogate pair,
bytes that are not UTF-8) is a bad row, never a guess.
"""

import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from sft_jax.datatypes import DataError, Origin, RawRow

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read. `reason` is its line in the data report; `message` says what is wrong, what to do."""

    origin: Origin
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class RowChunk:
    """Whole lines of a file, unparsed: cheap to make and to send to another process."""

    path: str
    first_line: int
    content: bytes

    def rows(self) -> Iterator[RawRow | BadRow]:
        for number, line in enumerate(self.content.split(b"\n"), start=self.first_line):
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if line.strip(b" \t\r"):
                yield _read_line(line, Origin(self.path, number))


def resolve_files(path: str, field: str) -> list[str]:
    """The files that a source's path names, sorted; `field` is the config field that names it.

    Raises:
      DataError: there is none.
    """
    if os.path.isdir(path):
        files = sorted(glob.glob(os.path.join(glob.escape(path), "*.jsonl")))
        if not files:
            raise DataError(f"{field}: {path!r} has no .jsonl file.")
        return files
    if not os.path.isfile(path):
        raise DataError(f"{field}: {path!r} is not there. Name a .jsonl file.")
    if not path.endswith(".jsonl"):
        raise DataError(f"{field}: {path!r} does not end in .jsonl, the one format read so far. Convert or rename it.")
    return [path]


def read_rows(path: str, on_bytes: Callable[[bytes], object] | None = None) -> Iterator[RawRow | BadRow]:
    """Read JSON lines.

    A line ends at \\n or \\r\\n and nowhere else (U+2028 may stand in a string). Skipped are blank lines, and a byte
    order mark at the start of the file.

    Args:
      on_bytes: is given every byte read, such as a digest's `update`: the caller then knows what the rows came from.

    Raises:
      DataError: the file cannot be opened or read.
    """
    for chunk in read_chunks(path, on_bytes):
        yield from chunk.rows()


def read_chunks(
    path: str, on_bytes: Callable[[bytes], object] | None = None, chunk_bytes: int = 1 << 20
) -> Iterator[RowChunk]:
    """The file's lines in chunks of about `chunk_bytes`; `read_rows` explains the rest."""
    try:
        with open(path, "rb") as file:
            first_line = 1
            while content := file.read(chunk_bytes):
                content += file.readline()
                if on_bytes is not None:
                    on_bytes(content)
                yield RowChunk(path, first_line, content)
                first_line += content.count(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}. Check the path and its permissions.") from error


def hash_file(path: str) -> str:
    """sha256 of the content, hex.

    Raises:
      DataError: the file cannot be opened or read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}. Check the path and its permissions.") from error


def _read_line(line: bytes, origin: Origin) -> RawRow | BadRow:
    try:
        value = msgspec.json.decode(line)
        _refuse_duplicate_keys(line)
    except UnicodeDecodeError as error:
        found = error.object[error.start : error.start + 1].hex()
        return BadRow(origin, "not_utf8", f"is not UTF-8: byte 0x{found}, {error.reason}. Convert the file to UTF-8.")
    except _DuplicateKeyError as error:
        return BadRow(origin, "duplicate_key", f"has the key {str(error)!r} twice in one object. Keep one of them.")
    except (msgspec.DecodeError, RecursionError) as error:
        message = "JSON is nested too deeply" if isinstance(error, RecursionError) else str(error)
        return BadRow(origin, "malformed_json", f"{message}. Fix or remove the line.")
    if not isinstance(value, dict):
        kind = "null" if value is None else type(value).__name__
        return BadRow(origin, "not_an_object", f'is a JSON {kind}; expected an object such as {{"messages": [...]}}.')
    return RawRow(value, origin)


class _DuplicateKeyError(Exception):
    """The key that an object has twice."""


def _refuse_duplicate_keys(line: bytes) -> None:
    """Look for equal keys, of which msgspec keeps the last: a second parse, at a few per cent of the tokenizing."""
    json.loads(line, object_pairs_hook=_check_keys, parse_int=str, parse_float=str)  # str: only the keys matter


def _check_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        names = [key for key, _ in pairs]
        raise _DuplicateKeyError(next(key for key in names if names.count(key) > 1))
    return keys
