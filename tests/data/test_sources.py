"""Files of every kind: which a path stands for, and what is read of them. test_malformed.py has what is refused."""

import gzip
import hashlib
import json
import os
import pickle
import re
import sys
import tracemalloc
import zlib

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from sft_jax.data.source_files import NotRead
from sft_jax.data.sources import BadRow, find_files, hash_file, read_chunks, read_rows, resolve_files
from sft_jax.datatypes import DataError, Origin, RawRow

FIELD = "config.data.train[2].path"


def read(tmp_path, content: bytes):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    return [(row.origin.line, row.fields if isinstance(row, RawRow) else row.reason) for row in read_rows(str(path))]


def test_origins_are_lines_of_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a":1}\n\n{"a":2}')
    first, second = read_rows(str(path))
    assert first == RawRow({"a": 1}, Origin(str(path), 1))
    assert str(second.origin) == f"{path}:3"  # the blank line counts as a line, and is no row


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", []),
        (b"\n \t\r\n\n", []),
        (b'\xef\xbb\xbf{"a":1}\n{"a":2}\n', [(1, {"a": 1}), (2, {"a": 2})]),
        (b'{"a":1}\r\n{"a":2}\r\n', [(1, {"a": 1}), (2, {"a": 2})]),
        ('{"a":"x\u2028y\u2029z\x85"}\n'.encode(), [(1, {"a": "x\u2028y\u2029z\x85"})]),
        (b'{"a":"x\\ny"}', [(1, {"a": "x\ny"})]),
        (b'{"a":"\\ud83d\\ude00"}', [(1, {"a": "\U0001f600"})]),
        (b'{"a":{"b":1},"c":{"b":2}}', [(1, {"a": {"b": 1}, "c": {"b": 2}})]),
        (b'{"a":"007","b":1e3}', [(1, {"a": "007", "b": 1000.0})]),
    ],
    ids=["empty", "blank", "bom", "crlf", "u2028", "escape", "pair", "same-key-elsewhere", "types-kept"],
)
def test_reads(tmp_path, content, expected):
    assert read(tmp_path, content) == expected


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a":1', "malformed_json"),
        (b'{"a":1} {"a":2}', "malformed_json"),
        (b"{'a':1}", "malformed_json"),
        (b'{"a":NaN}', "malformed_json"),
        (b'{"a":-Infinity}', "malformed_json"),
        (b'{"a":1e999}', "malformed_json"),
        (b'{"a":"tab\there"}', "malformed_json"),
        (b'{"a":"\\ud800 alone"}', "malformed_json"),
        (b'{"a":"\\udc00 alone"}', "malformed_json"),
        (b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}", "nested_too_deep"),
        (b'{"a":"\xff"}', "not_utf8"),
        (b'{"a":"\xed\xa0\x80"}', "not_utf8"),  # a surrogate, encoded
        (b'{"a":1,"a":1}', "duplicate_key"),
        (b'{"m":[{"role":"user","role":"assistant"}]}', "duplicate_key"),
        (b'{"a":1,"\\u0061":2}', "duplicate_key"),
        (b'[{"a":1}]', "not_an_object"),
        (b"null", "not_an_object"),
        (b'"text"', "not_an_object"),
        (b'\xef\xbb\xbf{"a":1}', "malformed_json"),  # a byte order mark inside the file
    ],
)
def test_refuses_one_line_and_reads_on(tmp_path, line, reason):
    assert read(tmp_path, b'{"a":1}\n' + line + b'\n{"a":2}\n') == [(1, {"a": 1}), (2, reason), (3, {"a": 2})]


def test_a_bad_row_says_what_is_wrong_and_what_to_do(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"role": "user", "role": "bot"}\n')
    (row,) = read_rows(str(path))
    assert isinstance(row, BadRow)
    assert row.message == "has the key 'role' twice in one object. Keep one of them."


ROWS = [{"text": f"row {number}\u2028", "n": {"a": [number]}} for number in range(300)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
FILES = {
    "rows.jsonl": b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\n"),
    "rows.ndjson.gz": gzip.compress(LINES),
    "rows.jsonl.zst": zstandard.compress(LINES),
    "rows.json": json.dumps(ROWS, indent=1).encode(),
    "rows.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "lines.json": LINES,
    "bad.jsonl": b"broken\n" + LINES,
    "bad.json": b"[broken,\n\n" + json.dumps(ROWS).encode()[1:],
}


@pytest.mark.parametrize("name", FILES)
def test_chunks_hold_the_rows_whatever_their_size(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    rows = list(read_rows(str(path)))
    assert [row.fields for row in rows if isinstance(row, RawRow)] == ROWS
    assert [row.origin.line for row in rows if isinstance(row, BadRow)] == ([1] if "bad" in name else [])
    for chunk_bytes in (1, 300, 10_000):
        chunks = [pickle.loads(pickle.dumps(chunk)) for chunk in read_chunks(str(path), chunk_bytes=chunk_bytes)]
        assert [row for chunk in chunks for row in chunk.rows()] == rows
    assert len(chunks) > 1


@pytest.mark.parametrize("name", FILES)
def test_the_digest_is_that_of_the_file(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    digest = hashlib.sha256()
    list(read_rows(str(path), digest.update))
    assert digest.hexdigest() == hash_file(str(path)) == hashlib.sha256(FILES[name]).hexdigest()


def peak_bytes(path):
    tracemalloc.start()
    try:
        rows = list(read_rows(str(path)))
        return rows, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl.zst", "rows.json.gz", "rows.json.zst"])
def test_a_bomb_takes_no_more_memory_than_a_row_may(tmp_path, name):
    """A string of 200 MB in a file of 200 KB, or of 6 KB."""
    start, end = (b'[{"a":"', b'"},{"b":1}]') if ".json." in name else (b'{"a":"', b'"}\n{"b":1}\n')
    compressor = zlib.compressobj(wbits=31) if name.endswith("gz") else zstandard.ZstdCompressor().compressobj()
    parts = [compressor.compress(part) for part in (start, *[b"x" * 10**7] * 20, end)]
    (tmp_path / name).write_bytes(b"".join([*parts, compressor.flush()]))
    assert (tmp_path / name).stat().st_size < 250_000
    (bad, good), peak = peak_bytes(tmp_path / name)
    assert bad.reason == "row_too_large"
    assert good.fields == {"b": 1}
    assert peak < 170e6


@pytest.mark.parametrize(
    ("name", "text", "limit"),
    [
        ("rows.jsonl.zst", b'{"a":1}\n' * 10**7, 60e6),
        ("rows.json.gz", b"[" + b'{"a":"%s"},' % (b"x" * 3000) * 5000 + b"1]", 5e6),
    ],
    ids=["lines", "array"],
)
def test_many_rows_take_no_more_memory_than_few(tmp_path, name, text, limit):
    """A slice of a zstd file may expand to 16 MiB; besides it, there are copies of it and one chunk."""
    (tmp_path / name).write_bytes(zstandard.compress(text) if name.endswith("zst") else gzip.compress(text, 1))
    tracemalloc.start()
    sizes = [len(pickle.dumps(chunk)) for chunk in read_chunks(str(tmp_path / name), chunk_bytes=100_000)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(sizes) < 600_000
    assert peak < limit


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"{}\n")


def resolved(folder, path):
    return [name.removeprefix(f"{folder}/") for name in resolve_files(f"{folder}/{path}", FIELD)]


def test_a_folder_stands_for_what_can_be_read_in_it(tmp_path):
    touch(tmp_path, "b.jsonl", "a/c.json.gz", "a/b/d.parquet", ".hidden.jsonl", ".git/e.jsonl", "README.md", "LICENSE")
    assert resolved(tmp_path, "") == ["a/b/d.parquet", "a/c.json.gz", "b.jsonl"]
    assert resolved(tmp_path, "a") == ["a/b/d.parquet", "a/c.json.gz"]
    assert resolved(tmp_path, "b.jsonl") == ["b.jsonl"]


def test_what_is_not_read_is_told(tmp_path):
    touch(tmp_path / "a", "a.jsonl", "README.md", "b/.hidden", ".git/c.jsonl")
    touch(tmp_path / "linked", "d.jsonl")
    (tmp_path / "a/e").symlink_to(tmp_path / "linked")
    (tmp_path / "a/f.jsonl").symlink_to(tmp_path / "linked/d.jsonl")
    arrow_folder(tmp_path / "a/saved", ["data-0.arrow"])
    touch(tmp_path, "a/saved/cache-1.arrow", "a/cached/x.parquet", "a/cached/dataset_infos.json")
    expected = {
        ".git": "hidden: the name begins with a dot",
        "README.md": "of a kind that is not read",
        "b/.hidden": "hidden: the name begins with a dot",
        "cached/dataset_infos.json": "a note of `datasets` beside its tables",
        "e": "a link to a folder, which is not followed",
        "saved/cache-1.arrow": "not among the tables that state.json names",
        "saved/dataset_info.json": "a note of `datasets` beside its tables",
        "saved/state.json": "a note of `datasets` beside its tables",
    }
    for path in ("a", "a*"):
        files, not_read = find_files(f"{tmp_path}/{path}", FIELD)
        names = [file.removeprefix(f"{tmp_path}/a/") for file in files]
        assert names == ["a.jsonl", "cached/x.parquet", "f.jsonl", "saved/data-0.arrow"]
        assert {path.removeprefix(f"{tmp_path}/a/"): reason for path, reason in not_read} == expected
    assert find_files(f"{tmp_path}/a/e", FIELD).files == [f"{tmp_path}/a/e/d.jsonl"]  # named, it is followed


@pytest.mark.parametrize(("link", "to"), [("a/z.jsonl", "a/a.jsonl"), ("b", "a"), ("z.jsonl", "a/a.jsonl")])
def test_what_a_link_would_double_is_refused(tmp_path, link, to):
    touch(tmp_path, "a/a.jsonl")
    (tmp_path / link).symlink_to(tmp_path / to)
    with pytest.raises(DataError, match=r"which look like the same rows\. Remove one"):
        find_files(f"{tmp_path}/**", FIELD)


@pytest.mark.parametrize("path", ["a", "a/*"])
def test_a_pipe_is_not_waited_for(tmp_path, path):
    touch(tmp_path, "a/a.jsonl")
    os.mkfifo(tmp_path / "a/b.jsonl")
    files, not_read = find_files(f"{tmp_path}/{path}", FIELD)
    assert files == [f"{tmp_path}/a/a.jsonl"]
    assert not_read == [NotRead(f"{tmp_path}/a/b.jsonl", "a pipe, socket or device")]


def test_a_pattern_stands_for_what_it_matches(tmp_path):
    touch(tmp_path, "b.jsonl", "a.jsonl", "c.json", "d/a.jsonl", "d/e/a.jsonl", "[x].jsonl", "d/notes.txt")
    assert resolved(tmp_path, "*.jsonl") == ["[x].jsonl", "a.jsonl", "b.jsonl"]
    assert resolved(tmp_path, "[ab].jsonl") == ["a.jsonl", "b.jsonl"]
    assert resolved(tmp_path, "**/a.jsonl") == ["a.jsonl", "d/a.jsonl", "d/e/a.jsonl"]
    assert resolved(tmp_path, "d*") == ["d/a.jsonl", "d/e/a.jsonl"]
    assert resolved(tmp_path, "[x].jsonl") == ["[x].jsonl"]  # a file of that name


def arrow_folder(folder, tables, **state):
    touch(folder, *tables, "dataset_info.json")
    state = {"_data_files": [{"filename": table} for table in tables], **state}
    (folder / "state.json").write_text(json.dumps(state))


def test_folders_of_the_datasets_library(tmp_path):
    tables = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    arrow_folder(tmp_path / "saved/train", tables)
    touch(tmp_path, "saved/train/cache-17.arrow")  # not of the state: left by `map`
    assert resolved(tmp_path, "saved/train") == [f"saved/train/{table}" for table in tables]
    assert resolved(tmp_path, "saved") == [f"saved/train/{table}" for table in tables]
    touch(tmp_path, "cache/set-train.arrow", "cache/dataset_info.json")
    assert resolved(tmp_path, "cache") == ["cache/set-train.arrow"]


def test_folders_of_the_datasets_library_that_do_not_say_what_to_train_on(tmp_path):
    arrow_folder(tmp_path / "both/train", ["data-0.arrow"])
    arrow_folder(tmp_path / "both/test", ["data-0.arrow"])
    (tmp_path / "both/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"holds the splits train, test\. Name the folder of one"):
        resolved(tmp_path, "both")
    arrow_folder(tmp_path / "chosen", ["data-0.arrow"], _indices_files=[{"filename": "indices.arrow"}])
    with pytest.raises(DataError, match="a selection of its tables' rows"):
        resolved(tmp_path, "chosen")
    arrow_folder(tmp_path / "lost", ["data-0.arrow"])
    (tmp_path / "lost/data-0.arrow").unlink()
    with pytest.raises(DataError, match=r"has no data-0\.arrow"):
        resolved(tmp_path, "lost")


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("tran.jsonl", r"is not there\. Near it: train\.jsonl\. Check"),
        ("zzzz", r"is not there\. Near it: train\.jsonl\. Check"),
        ("ful/a.jsonl", r"/ful' is the first part of it that is missing\. Near it: full\. Check"),
        ("*.parquet", r"matches nothing\. Near it: train\.jsonl"),
        ("none/*/x.jsonl", "/none' is the first part"),
        ("dangling/b.jsonl", r"is a link to 'gone\.jsonl', which is not there"),
        ("notes.txt", r"has an unknown ending; expected \.jsonl"),
        ("texts", r"holds only \.txt; expected"),
        ("texts/*.txt", r"holds only \.txt; expected"),
        ("empty", "the folder '.*/empty' is empty; expected"),
        ("links", "the folder '.*/links' holds nothing to read: '.*/links/a' is a link to a folder, which is not"),
        ("twice", r"look like the same rows\. Remove one"),
    ],
)
def test_what_is_wrong_with_a_path(tmp_path, path, says):
    touch(tmp_path, "train.jsonl", "notes.txt", "texts/a.txt", "full/a.jsonl", "twice/a.json", "twice/a.json.gz")
    (tmp_path / "empty").mkdir()
    (tmp_path / "links").mkdir()
    (tmp_path / "links/a").symlink_to(tmp_path / "full")
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling/b.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(DataError, match=rf"^{re.escape(FIELD)}: .*{says}"):
        resolve_files(f"{tmp_path}/{path}", FIELD)


@pytest.fixture
def memory():
    """An empty file system in memory."""
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.rm("/", recursive=True)


def test_urls(memory):
    for number, (name, content) in enumerate(FILES.items()):
        memory.pipe(f"/bucket/data/{number}/{name}", content)
    memory.pipe("/bucket/data/deep/a.jsonl", b'{"a":1}')
    memory.pipe("/bucket/data/.hidden/b.jsonl", b'{"a":1}')
    assert resolve_files("memory://bucket/data/0/rows.jsonl", FIELD) == ["memory://bucket/data/0/rows.jsonl"]
    files, not_read = find_files("memory://bucket/data", FIELD)
    assert len(files) == len(FILES) + 1
    assert not_read == [("memory:///bucket/data/.hidden/b.jsonl", "hidden: the name begins with a dot")]
    pattern = resolve_files("memory://bucket/**/*.gz", FIELD)
    assert [path.rpartition("/")[2] for path in pattern] == ["rows.ndjson.gz", "rows.json.gz"]
    for path in pattern:
        assert [row.fields for row in read_rows(path)] == ROWS
        assert all(row.origin.path == path for row in read_rows(path))
    assert hash_file("memory://bucket/data/0/rows.jsonl") == hashlib.sha256(FILES["rows.jsonl"]).hexdigest()


def test_a_table_behind_a_url(memory, tmp_path):
    table = pyarrow.table({"text": ["a", "b"]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pyarrow.ipc.new_stream(str(tmp_path / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("rows.parquet", "rows.arrow"):
        memory.pipe(f"/bucket/{name}", (tmp_path / name).read_bytes())
        assert [row.fields["text"] for row in read_rows(f"memory://bucket/{name}")] == ["a", "b"]


def test_what_is_wrong_with_a_url(memory, monkeypatch):
    memory.pipe("/bucket/train.jsonl", b"{}")
    with pytest.raises(DataError, match=r"is not there\. Near it: train\.jsonl"):
        resolve_files("memory://bucket/tran.jsonl", FIELD)
    with pytest.raises(DataError, match=r"\[2\]\.path: 'foo://a\.jsonl' cannot be opened: Protocol not known: foo"):
        resolve_files("foo://a.jsonl", FIELD)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(DataError, match=r"needs a package that is not installed: Install s3fs"):
        resolve_files("s3://bucket/a.jsonl", FIELD)
    with pytest.raises(DataError, match=r"memory://bucket/none\.jsonl: cannot be read"):
        list(read_rows("memory://bucket/none.jsonl"))


def test_file_urls(tmp_path):
    touch(tmp_path, "a.jsonl", "b/c.jsonl")
    for path in resolve_files(f"file://{tmp_path}", FIELD):
        assert [row.fields for row in read_rows(path)] == [{}]
    assert len(resolve_files(f"file://{tmp_path}/**/*.jsonl", FIELD)) == 2


def test_a_file_that_goes_away(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read: No such file"):
        list(read_rows(str(tmp_path / "none.jsonl")))


def test_every_real_file_is_read_whole(assets):
    """As many rows as the asset's manifest says, and the same values as Python's own reader gives."""
    manifest = (assets / "MANIFEST.md").read_text()
    num_files = 0
    for section in re.findall(r"^## sft/(.*?)(?=^## |\Z)", manifest, re.MULTILINE | re.DOTALL):
        folder = section.partition("\n")[0]
        for name, count in re.findall(r"^\| (\S+\.jsonl?) \| \d+ \| (\d+) \|", section, re.MULTILINE):
            path = assets / "sft" / folder / name
            rows = list(read_rows(str(path)))
            assert len(rows) == int(count), path
            text = path.read_text()
            expected = (
                json.loads(text) if text.startswith("[") else [json.loads(row) for row in text.splitlines() if row]
            )
            assert [row.fields for row in rows] == expected, path
            num_files += 1
    assert num_files == len(resolve_files(str(assets / "sft"), FIELD)) > 40
