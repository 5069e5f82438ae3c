"""Parquet and Arrow: the rows that went in come out, without what a column had to add."""

import hashlib
import pickle
import sys

import pyarrow
import pyarrow.parquet
import pytest

from sft_jax.data.columnar import read_columns
from sft_jax.data.sources import BadRow, hash_file, read_chunks, read_rows
from sft_jax.datatypes import DataError, RawRow

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"x": {"type": "integer"}}}}}
OTHER = {"type": "function", "function": {"name": "now", "strict": True, "parameters": {"required": ["zone"]}}}
ROWS = [
    {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}],
        "tools": [TOOL],
    },
    {"messages": [{"role": "user", "content": "c"}], "tools": [OTHER, TOOL], "system": "s"},
    {"messages": [], "schema": '{"default": null}', "score": 0.5, "ids": [1, None, 2**40]},
]
KINDS = ["parquet", "stream", "file"]


def write(path, table, kind="stream", batch_rows=None):
    """The table in a file; `kind`: parquet, or Arrow's stream or file layout."""
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=batch_rows)
    else:
        open_writer = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
        with open_writer(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=batch_rows)
    return str(path)


def path_of(tmp_path, kind):
    return tmp_path / ("rows.parquet" if kind == "parquet" else "rows.arrow")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_come_out_as_they_went_in(tmp_path, kind):
    columns = {
        name: [row.get(name) for row in ROWS] for name in ("messages", "tools", "system", "schema", "score", "ids")
    }
    table = pyarrow.table(columns)
    path = write(path_of(tmp_path, kind), table, kind)
    rows = list(read_rows(path))
    assert [str(row.origin) for row in rows] == [f"{path}:{number}" for number in (1, 2, 3)]
    assert [row.fields for row in rows] == ROWS


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_numbered_over_batches_and_chunks(tmp_path, kind):
    table = pyarrow.table({"text": [f"row {number}" for number in range(1, 2001)]})
    path = write(path_of(tmp_path, kind), table, kind, batch_rows=700)
    chunks = [pickle.loads(pickle.dumps(chunk)) for chunk in read_chunks(path, chunk_bytes=1000)]
    assert len(chunks) > 10
    rows = [row for chunk in chunks for row in chunk.rows()]
    assert [(row.fields["text"], row.origin.line) for row in rows] == [(f"row {n}", n) for n in range(1, 2001)]
    assert max(len(pickle.dumps(chunk)) for chunk in chunks) < 4000  # a chunk does not carry its whole batch


@pytest.mark.parametrize("kind", KINDS)
def test_the_digest_is_that_of_the_file(tmp_path, kind):
    path = write(path_of(tmp_path, kind), pyarrow.table({"text": ["a"] * 1000}), kind)
    digest = hashlib.sha256()
    list(read_rows(path, digest.update))
    assert digest.hexdigest() == hash_file(path)


def test_columns_of_every_json_type(tmp_path):
    table = pyarrow.table(
        {
            "role": pyarrow.array(["a", "b", "a"]).dictionary_encode(),
            "large": pyarrow.array(["x", None, "y"], pyarrow.large_string()),
            "arguments": pyarrow.array([[("k", "1")], None, []], pyarrow.map_("string", "string")),
            "flag": [True, None, False],
        }
    )
    for kind in KINDS:
        assert [row.fields for row in read_rows(write(path_of(tmp_path, kind), table, kind))] == [
            {"role": "a", "large": "x", "arguments": {"k": "1"}, "flag": True},
            {"role": "b"},
            {"role": "a", "large": "y", "arguments": {}, "flag": False},
        ]


def test_a_bad_row_leaves_the_others(tmp_path):
    table = pyarrow.table(
        {
            "text": ["a", "b", "c", "d"],
            "map": pyarrow.array([[], [("k", 1), ("k", 2)], [], []], pyarrow.map_("string", "int64")),
            "deep": [{"at": None}, {"at": None}, {"at": 1e308 * 10}, {"at": 1.0}],
        }
    )
    rows = list(read_rows(write(tmp_path / "rows.parquet", table, "parquet")))
    assert [row.reason if isinstance(row, BadRow) else row.fields["text"] for row in rows] == [
        "a",
        "duplicate_key",
        "not_json",
        "d",
    ]


def test_a_row_that_is_too_large_leaves_the_others(tmp_path):
    table = pyarrow.table({"text": ["a", "x" * (64 * 2**20 + 1), "c"]})
    rows = list(read_rows(write(tmp_path / "rows.parquet", table, "parquet")))
    assert [isinstance(row, RawRow) for row in rows] == [True, False, True]
    assert rows[1].reason == "row_too_large"


def test_deep_nesting(tmp_path):
    value = "x"
    for _ in range(70):
        value = {"a": value}
    path = write(tmp_path / "rows.parquet", pyarrow.table({"text": [value]}), "parquet")
    with pytest.raises(DataError, match=r"rows\.parquet: the field '.*' is nested deeper than 50 levels"):
        list(read_rows(path))


def test_a_damaged_arrow_file_is_refused_and_not_trusted(tmp_path):
    """Offsets that point beyond their data: taken as they stand they would read other memory."""
    write(tmp_path / "rows.arrow", pyarrow.table({"text": ["good", "also"]}))
    content = bytearray((tmp_path / "rows.arrow").read_bytes())
    offsets = content.index(b"\4\0\0\0\x08\0\0\0")
    content[offsets : offsets + 8] = b"\xff\xff\xff\x7f\xff\xff\xff\x7f"
    (tmp_path / "rows.arrow").write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.arrow: is not whole Arrow data"):
        list(read_rows(str(tmp_path / "rows.arrow")))


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.parquet", pyarrow.table({"text": ["a"]}), "parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.ipc", None)
    with pytest.raises(DataError, match=r"pip install 'sft_jax\[parquet\]'"):
        list(read_columns(path))
