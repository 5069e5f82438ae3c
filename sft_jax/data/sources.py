"""A file in, one `RawRow` or `BadRow` per row out, in file order and in bounded memory.

    .jsonl .ndjson    one JSON object on each line
    .json             an array of objects; or JSON lines, as many files of that name hold
    .parquet          a row of its columns                     needs pyarrow
    .arrow            the same, as `datasets` keeps it         needs pyarrow

and the text ones with .gz or .zst behind. A parent process cuts a file into chunks with `read_chunks`, which costs next
to nothing; whoever has a chunk, in any process, parses it with `rows`.
"""

import itertools
from collections.abc import Callable, Iterator

import msgspec

from sft_jax.data.columnar import ColumnChunk, read_columns
from sft_jax.data.json_array import ElementChunk, split_array
from sft_jax.data.json_rows import BYTE_ORDER_MARK, BadChunk, BadRow, LineChunk, split_lines
from sft_jax.data.source_files import Found, NotRead, file_kind, find_files, resolve_files
from sft_jax.data.stored_files import hash_file, read_text
from sft_jax.datatypes import DataError, RawRow

__all__ = [
    "BadRow",
    "Found",
    "NotRead",
    "RowChunk",
    "find_files",
    "hash_file",
    "read_chunks",
    "read_rows",
    "resolve_files",
]

RowChunk = LineChunk | ElementChunk | ColumnChunk | BadChunk
"""Some rows of a file, unread: `chunk.rows()` reads them. Small to pickle."""

_CHUNK_BYTES = 2**20


def read_rows(file: str, on_bytes: Callable[[bytes], object] | None = None) -> Iterator[RawRow | BadRow]:
    """Read a file of `resolve_files`, row after row.

    Skipped are blank lines, and a byte order mark at the start of the file.

    Args:
      on_bytes: is given every byte as it is stored, such as a digest's `update`: the caller then knows what the rows
        came from.

    Raises:
      DataError: the file cannot be read, is damaged or cut off, or its rows cannot be told apart.
    """
    for chunk in read_chunks(file, on_bytes):
        yield from chunk.rows()


def read_chunks(
    file: str, on_bytes: Callable[[bytes], object] | None = None, chunk_bytes: int = _CHUNK_BYTES
) -> Iterator[RowChunk]:
    """Cut a file into chunks of about `chunk_bytes` of rows, in order; see `read_rows`."""
    kind = file_kind(file)
    if kind == "columns":
        yield from read_columns(file, on_bytes, chunk_bytes)
        return
    blocks = read_text(file, on_bytes)
    if kind == "json":
        is_array, blocks = _look_at_json(blocks, file)
        if is_array:
            yield from split_array(blocks, file, chunk_bytes)
            return
    yield from split_lines(blocks, file, chunk_bytes)


def _look_at_json(blocks: Iterator[bytes], path: str) -> tuple[bool, Iterator[bytes]]:
    """Whether a .json file is an array, and the blocks again.

    Raises:
      DataError: it is one object over several lines.
    """
    seen = []
    start = b""
    for block in blocks:
        seen.append(block)
        start = block.removeprefix(BYTE_ORDER_MARK).lstrip()
        if start:
            break
    first, _, rest = start.partition(b"\n")
    if start.startswith(b"{") and rest.strip() and not rest.lstrip().startswith(b"{"):
        try:
            msgspec.json.decode(first)
        except RecursionError:
            pass
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            if "truncated" in str(error):
                problem = "is one JSON object over several lines; expected an array of objects, or one on each line"
                raise DataError(f"{path}:1: {problem}. Put its rows into an array: [...].") from error
    return start.startswith(b"["), itertools.chain(seen, blocks)
