"""JSON lines: what is read, and what is refused under which reason."""

import hashlib

import pytest

from sft_jax.data.sources import BadRow, hash_file, read_rows, resolve_files
from sft_jax.datatypes import DataError, Origin, RawRow


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
        (b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}", "malformed_json"),
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


def test_the_digest_is_that_of_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a":1}\r\n\nbroken\n{"a":2}')
    digest = hashlib.sha256()
    list(read_rows(str(path), digest.update))
    assert digest.hexdigest() == hash_file(str(path)) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_paths_are_checked_by_field(tmp_path):
    with pytest.raises(DataError, match=r"config\.data\.train\[2\]\.path: '.*none\.jsonl' is not there\. Name"):
        resolve_files(str(tmp_path / "none.jsonl"), "config.data.train[2].path")
    with pytest.raises(DataError, match=r"has no \.jsonl file"):
        resolve_files(str(tmp_path), "config.data.train[2].path")
    (tmp_path / "rows.parquet").touch()
    with pytest.raises(DataError, match=r"does not end in \.jsonl"):
        resolve_files(str(tmp_path / "rows.parquet"), "config.data.train[2].path")
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read: No such file"):
        list(read_rows(str(tmp_path / "none.jsonl")))
