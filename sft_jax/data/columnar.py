"""A Parquet or Arrow file in, batches of its rows out; then one `RawRow` or `BadRow` per row, of JSON values only.

A column holds a field for every row and a struct all fields that any row has, null where a row had none. So a field
that is null is left out, at every depth: a tool's schema comes out as it went in. Bytes, dates, NaN and whatever else
JSON has no form for make a bad row. The line of an origin is the number of the row in the file, from 1.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sft_jax.data.json_rows import MAX_ROW_BYTES, BadRow, too_large
from sft_jax.data.stored_files import is_url, open_stored, read_stored
from sft_jax.datatypes import DataError, Origin, RawRow

_BATCH_ROWS = 256
_CHUNK_BYTES = 2**20
_MAX_SCHEMA_DEPTH = 50
"""An Arrow stream has at most 64."""
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
_ARROW_FILE_START = b"ARROW1"


@dataclass(frozen=True, slots=True)
class ColumnChunk:
    """Rows as an Arrow stream of one batch. `first_row` is the number of the first."""

    path: str
    first_row: int
    stream: bytes

    def rows(self) -> Iterator[RawRow | BadRow]:
        pyarrow = _import_pyarrow(self.path)
        with pyarrow.ipc.open_stream(self.stream) as reader:
            batch = reader.read_next_batch()
        values = None
        if batch.nbytes <= MAX_ROW_BYTES:
            try:
                values = batch.to_pylist(maps_as_pydicts="strict")
            except _conversion_errors(pyarrow):
                pass  # then row by row, to find which
        for index in range(batch.num_rows):
            origin = Origin(self.path, self.first_row + index)
            if values is not None:
                yield _read_row(values[index], origin)
            else:
                yield _convert_row(batch.slice(index, 1), origin, pyarrow)


def read_columns(
    path: str, on_bytes: Callable[[bytes], object] | None = None, chunk_bytes: int = _CHUNK_BYTES
) -> Iterator[ColumnChunk]:
    """Cut a file into chunks of about `chunk_bytes`; `on_bytes` is given the whole file first.

    Raises:
      DataError: pyarrow is not installed; or the file cannot be read, or is damaged.
    """
    pyarrow = _import_pyarrow(path)
    first_row = 1
    with open_stored(path) as file:
        if on_bytes is not None:
            for block in read_stored(file, path):
                on_bytes(block)
            file.seek(0)
        kind = "Parquet" if path.lower().endswith(".parquet") else "Arrow"
        try:
            batches = _read_parquet(file, path) if kind == "Parquet" else _read_arrow(file, path, pyarrow)
            for batch in batches:
                num_rows = max(1, batch.num_rows * chunk_bytes // max(batch.nbytes, 1))
                for start in range(0, batch.num_rows, num_rows):
                    part = batch.slice(start, num_rows)
                    yield ColumnChunk(path, first_row, _to_stream(part, pyarrow))
                    first_row += part.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: is not whole {kind} data: {error}. Fetch or write the file anew.") from error


def _import_pyarrow(path: str) -> Any:
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{path}: needs pyarrow, which is not installed. Run pip install 'sft_jax[parquet]', or convert the file."
        ) from error
    return pyarrow


def _read_parquet(file: Any, path: str) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as parquet:
        _check_schema(parquet.schema_arrow, path)
        yield from parquet.iter_batches(_BATCH_ROWS, use_threads=False)


def _read_arrow(file: Any, path: str, pyarrow: Any) -> Iterator[Any]:
    """Both of Arrow's layouts: the file, and the stream that `datasets` writes. Mapped where that is possible."""
    start = file.read(len(_ARROW_FILE_START))
    is_file = start == _ARROW_FILE_START
    if not is_file:
        size = file.seek(0, 2)
        file.seek(max(size - len(_STREAM_END), 0))
        if file.read() != _STREAM_END:  # a reader takes a stream that is cut between two batches for a whole one
            raise DataError(f"{path}: is not whole Arrow data: its end is missing. Fetch or write the file anew.")
    file.seek(0)
    source = pyarrow.PythonFile(file, mode="r") if is_url(path) else pyarrow.memory_map(path)
    with source:
        if is_file:
            with pyarrow.ipc.open_file(source) as reader:
                _check_schema(reader.schema, path)
                batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
                yield from map(_checked, batches)
        else:
            with pyarrow.ipc.open_stream(source) as reader:
                _check_schema(reader.schema, path)
                yield from map(_checked, reader)


def _checked(batch: Any) -> Any:
    """Offsets in an Arrow file are taken as they stand: unchecked, they read past the end of memory."""
    batch.validate(full=True)
    return batch


def _check_schema(schema: Any, path: str) -> None:
    """Of two fields with one name, a row would keep one; and a chunk cannot carry what is nested too deeply."""
    structs = [("the file", list(schema), 0)]
    while structs:
        where, fields, depth = structs.pop()
        if depth > _MAX_SCHEMA_DEPTH:
            raise DataError(f"{path}: {where} is nested deeper than {_MAX_SCHEMA_DEPTH} levels. Flatten or remove it.")
        name, count = Counter(field.name for field in fields).most_common(1)[0] if fields else ("", 0)
        if count > 1:
            raise DataError(f"{path}: {where} has the field {name!r:.80} twice. Rename or remove one of them.")
        for field in fields:
            children = [field.type.field(index) for index in range(field.type.num_fields)]
            structs.append((f"the field {field.name!r:.80}", children, depth + 1))


def _to_stream(batch: Any, pyarrow: Any) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _conversion_errors(pyarrow: Any) -> tuple[type[Exception], ...]:
    """What giving a batch Python's types may raise: a date beyond Python's, a map with a key twice, broken text."""
    return ValueError, KeyError, OverflowError, TypeError, pyarrow.ArrowException


def _convert_row(batch: Any, origin: Origin, pyarrow: Any) -> RawRow | BadRow:
    if batch.nbytes > MAX_ROW_BYTES:
        return too_large(origin)
    try:
        (fields,) = batch.to_pylist(maps_as_pydicts="strict")
    except UnicodeDecodeError as error:
        problem = f"holds text that is not UTF-8: byte 0x{error.object[error.start]:02x}, {error.reason}"
        return BadRow(origin, "not_utf8", f"{problem}. Write the file anew from text in UTF-8.")
    except KeyError:
        return BadRow(origin, "duplicate_key", "has a map with one key twice. Keep one of them.")
    except _conversion_errors(pyarrow) as error:
        return BadRow(origin, "not_json", f"has a value that cannot be read: {error}. Remove the column.")
    return _read_row(fields, origin)


def _read_row(fields: dict[str, Any], origin: Origin) -> RawRow | BadRow:
    clean = {}
    for name, value in fields.items():
        if value is not None:
            try:
                clean[name] = _to_json(value)
            except _NotJsonError as error:
                problem = f"the column {name!r:.80} holds {error}, which JSON has no form for"
                return BadRow(origin, "not_json", f"{problem}. Remove the column, or store it as text.")
    return RawRow(clean, origin)


class _NotJsonError(Exception):
    """What a value is instead."""


def _to_json(value: Any) -> Any:
    kind = type(value)
    if kind is str or kind is int or kind is bool or value is None:
        return value
    if kind is float:
        if math.isfinite(value):
            return value
        raise _NotJsonError(str(value))
    if kind is not dict and kind is not list:
        raise _NotJsonError(f"a {kind.__name__}")
    if kind is list:
        return [_to_json(child) for child in value]
    for key in value:
        if type(key) is not str:
            raise _NotJsonError(f"a map with keys of type {type(key).__name__}")
    return {key: _to_json(child) for key, child in value.items() if child is not None}
