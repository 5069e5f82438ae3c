"""Every kind of input that people's files hold, and its verdict: accept, repair (read as if mended) or reject.

A reject names the file and line, and says what to do. `reason` is the line in the data report; where it is `file`, no
row of the file can be trusted and reading raises.
"""

import bz2
import datetime
import gzip
import json
import re
import zlib
from dataclasses import dataclass

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from sft_jax.data.conversations import parse_row
from sft_jax.data.errors import RowError
from sft_jax.data.sources import BadRow, read_rows
from sft_jax.datatypes import DataError

BOM = b"\xef\xbb\xbf"
GOOD = b'{"text":"good"}\n'


@dataclass(frozen=True)
class Kind:
    name: str
    verdict: str
    content: bytes
    reason: str = ""
    line: int = 2
    """Of the first bad row; 0 where the file as a whole is at fault."""
    says: str = ""
    num_good: int = 2
    """Rows that are read, whatever the verdict."""
    file: str = "rows.jsonl"
    element: int = 0
    """Of an array."""


def accept(name, line, **options):
    return Kind(name, "accept", GOOD + line + b"\n" + GOOD, num_good=3, **options)


def accept_file(name, content, num_good, file="rows.jsonl"):
    return Kind(name, "accept", content, num_good=num_good, file=file)


def repair(name, content, num_good=2, file="rows.jsonl"):
    return Kind(name, "repair", content, num_good=num_good, file=file)


def reject(name, line, says="", reason="malformed_json", **options):
    """A line between two good ones, which are read."""
    return Kind(name, "reject", GOOD + line + b"\n" + GOOD, reason, says=says, **options)


def reject_file(name, content, says, file="rows.jsonl", line=1, element=0):
    return Kind(name, "reject", content, "file", line, says, 0, file, element)


def reject_element(name, content, says="", reason="malformed_json", line=2, num_good=2, element=2):
    return Kind(name, "reject", content, reason, line, says, num_good, "rows.json", element)


def reject_row(name, reason, **fields):
    return reject(name, json.dumps(fields).encode(), reason=reason)


def reject_chat(name, reason, *turns):
    """A conversation given as (role, content)."""
    return reject_row(name, reason, messages=[dict(role=role, content=content) for role, content in turns])


def parquet(table, **options):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


def arrow(table):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def column(name, values, type=None):
    """A Parquet file of three rows, whose second is at fault."""
    texts = pyarrow.array(["good", "bad", "good"])
    return parquet(pyarrow.table({"text": texts, name: pyarrow.array(values, type)}))


TWO_ROWS = pyarrow.table({"text": ["good", "good"]})
SCHEMAS = [{"type": "object"}, {"enum": ["a"]}]
BROKEN_TEXT = pyarrow.StringArray.from_buffers(
    3, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pyarrow.py_buffer(b"a\xffc")
)
DEEP = 10**6

KINDS = [
    # What must not be mistaken for a fault.
    accept("line-separator-in-string", '{"text":"a\u2028b\u2029c"}'.encode()),
    accept("next-line-in-string", '{"text":"a\x85b"}'.encode()),
    accept("bom-in-string", '{"text":"a\ufeffb"}'.encode()),
    accept("noncharacter", '{"text":"a\uffffb"}'.encode()),
    accept("delete-character", b'{"text":"a\x7fb"}'),
    accept("surrogate-pair-escape", rb'{"text":"\ud83d\ude00"}'),
    accept("nul-escape", rb'{"text":"a\u0000b"}'),
    accept("escaped-slash", rb'{"text":"a\/b"}'),
    accept("space-around-tokens", b' { "text"\t: "a" , "b" : [ 1 , 2 ] } '),
    accept("carriage-return-as-space", b'{"text":\r"a"}'),
    accept("same-key-in-two-objects", b'{"text":"a","b":{"c":1},"d":{"c":1}}'),
    accept("keys-differ-in-case", b'{"text":"a","Text":"b"}'),
    accept("colons-in-strings", rb'{"text":"a: \"b\": c :d","e\":":":"}'),
    accept("json-in-a-string", rb'{"text":"{\"a\":1,\"a\":2}"}'),
    accept("empty-key", b'{"text":"a","":1}'),
    accept("integer-beyond-64-bits", b'{"text":"a","id":123456789012345678901234567890}'),
    accept("number-that-rounds-to-zero", b'{"text":"a","b":1e-400}'),
    accept("minus-zero", b'{"text":"a","b":-0}'),
    accept("100-levels", b'{"text":"a","b":' + b"[" * 99 + b"]" * 99 + b"}"),
    accept_file("no-newline-at-the-end", GOOD + GOOD.strip(), 2),
    accept_file("empty-file", b"", 0),
    accept_file("ending-in-capitals", GOOD, 1, "ROWS.JSONL"),
    accept_file("ndjson", GOOD, 1, "rows.ndjson"),
    accept_file("json-array", b'[{"text":"a"},{"text":"b"}]', 2, "rows.json"),
    accept_file(
        "json-array-over-lines", b'[\n  {\n    "text": "a"\n  },\n  {\n    "text": "]},{["\n  }\n]\n', 2, "rows.json"
    ),
    accept_file("empty-json-array", b" [ ] \n", 0, "rows.json"),
    accept_file("json-lines-named-json", GOOD + GOOD, 2, "rows.json"),
    accept_file("one-object-named-json", GOOD, 1, "rows.json"),
    accept_file("gzip", gzip.compress(GOOD + GOOD), 2, "rows.jsonl.gz"),
    accept_file("gzip-of-an-array", gzip.compress(b'[{"text":"a"}]'), 1, "rows.json.gz"),
    accept_file("gzip-in-two-members", gzip.compress(GOOD) + gzip.compress(GOOD), 2, "rows.jsonl.gz"),
    accept_file("gzip-with-padding", gzip.compress(GOOD) + b"\0" * 512, 1, "rows.jsonl.gz"),
    accept_file("zstd", zstandard.compress(GOOD + GOOD), 2, "rows.jsonl.zst"),
    accept_file("zstd-in-two-frames", zstandard.compress(GOOD) + zstandard.compress(GOOD), 2, "rows.jsonl.zst"),
    accept_file("parquet", parquet(TWO_ROWS), 2, "rows.parquet"),
    accept_file("arrow-stream", arrow(TWO_ROWS), 2, "rows.arrow"),
    # What is read as if it were mended.
    repair("bom", BOM + GOOD + GOOD),
    repair("bom-before-array", BOM + b'[{"text":"a"}]', 1, "rows.json"),
    repair("bom-in-gzip", gzip.compress(BOM + GOOD), 1, "rows.jsonl.gz"),
    repair("crlf", GOOD.replace(b"\n", b"\r\n") * 2),
    repair("blank-lines", b"\n" + GOOD + b"\n\n" + GOOD + b"\n"),
    repair("lines-of-spaces", GOOD + b" \t \r\n" + GOOD),
    repair("nulls-of-a-struct", parquet(pyarrow.table({"text": ["a", "b"], "tool": SCHEMAS})), 2, "rows.parquet"),
    # Not JSON.
    reject("cut-off-object", b'{"text":"a"', "ends inside a value"),
    reject("cut-off-string", b'{"text":"a', "ends inside a value"),
    reject("cut-off-key", b'{"te', "ends inside a value"),
    reject("pretty-printed", b'{\n "text": "a"}', "a brace alone: the row goes over several lines"),
    Kind("cut-off-last-line", "reject", GOOD + GOOD + b'{"text":"a', "malformed_json", 3, "ends inside a value"),
    Kind("raw-newline-in-string", "reject", GOOD + b'{"text":"a\nb"}\n' + GOOD, "malformed_json", 2, "newline"),
    reject("plain-text", b"Once upon a time"),
    reject("csv", b"question,answer"),
    reject("two-objects-on-a-line", b'{"text":"a"} {"text":"b"}', "two values"),
    reject("two-objects-with-a-comma", b'{"text":"a"},{"text":"b"}', "two values"),
    reject("comma-after-the-object", b'{"text":"a"},', "trailing characters"),
    reject("single-quotes", b"{'text':'a'}", "double quotes"),
    reject("unquoted-key", b'{text:"a"}', "keys must be strings"),
    reject("number-as-key", b'{1:"a"}', "keys must be strings"),
    reject("trailing-comma-in-object", b'{"text":"a",}', "trailing comma"),
    reject("trailing-comma-in-list", b'{"text":["a",]}', "trailing comma"),
    reject("no-colon", b'{"text" "a"}', "expected ':'"),
    reject("no-comma", b'{"text":"a" "b":1}', "expected ','"),
    reject("no-value", b'{"text":}'),
    reject("brackets-of-two-kinds", b'{"text":["a"}}'),
    reject("comment-behind", b'{"text":"a"} // so', "trailing characters"),
    reject("comment-before", b'/* so */ {"text":"a"}', "no comments"),
    reject("comment-with-a-hash", b'# {"text":"a"}', "no comments"),
    reject("unescaped-quote", b'{"text":"say "a" to b"}', "expected ','"),
    reject("nan", b'{"text":"a","b":NaN}', "no NaN"),
    reject("infinity", b'{"text":"a","b":Infinity}', "no NaN or Infinity"),
    reject("minus-infinity", b'{"text":"a","b":-Infinity}', "no NaN or Infinity"),
    reject("number-too-large", b'{"text":"a","b":1e400}', "out of range"),
    reject("number-too-large-far-within", b'{"a":' * 95 + b"1e400" + b"}" * 95, "out of range"),
    reject("number-too-small", b'{"text":"a","b":-1e400}', "out of range"),
    reject("integer-of-5000-digits", b'{"text":"a","b":' + b"7" * 5000 + b"}", "out of range"),
    reject("leading-zero", b'{"text":"a","b":007}', "invalid number"),
    reject("leading-plus", b'{"text":"a","b":+1}'),
    reject("hexadecimal", b'{"text":"a","b":0x10}'),
    reject("no-digit-before-the-point", b'{"text":"a","b":.5}'),
    reject("no-digit-behind-the-point", b'{"text":"a","b":1.}', "invalid number"),
    reject("python-true", b'{"text":"a","b":True}', "true, false and null"),
    reject("python-none", b'{"text":"a","b":None}', "true, false and null"),
    reject("undefined", b'{"text":"a","b":undefined}', "no undefined"),
    reject("raw-tab-in-string", b'{"text":"a\tb"}', "control character"),
    reject("nul-in-string", b'{"text":"a\0b"}', "NUL"),
    reject("nul-between-tokens", b'{"text":\0"a"}', "NUL"),
    reject("line-of-nuls", b"\0" * 4096, "NUL"),
    reject("form-feed", b"\f", "control character"),
    reject("unknown-escape", rb'{"text":"\x41"}', "invalid escape"),
    reject("cut-off-escape", rb'{"text":"\u00g1"}', "unicode escape"),
    reject("lone-high-surrogate", rb'{"text":"a\ud800 b"}', "surrogate"),
    reject("lone-low-surrogate", rb'{"text":"a\udc00 b"}', "surrogate"),
    reject("surrogates-the-wrong-way-round", rb'{"text":"\ude00\ud83d"}', "surrogate"),
    reject("lone-surrogate-at-the-end", rb'{"text":"a\ud800"}', "surrogate"),
    reject("bom-in-the-middle", BOM + b'{"text":"a"}', "byte order mark"),
    Kind("bare-cr", "reject", GOOD.replace(b"\n", b"\r") * 3, "malformed_json", 1, "carriage return", 0),
    # Not UTF-8.
    reject("byte-that-is-no-utf8", b'{"text":"a\xffb"}', "byte 11 of the row is 0xff", "not_utf8"),
    reject("latin-1", '{"text":"caf\xe9"}'.encode("latin-1"), "WINDOWS-1252", "not_utf8"),
    reject("cut-off-utf8", b'{"text":"a\xe2\x82"}', "0xe2", "not_utf8"),
    reject("overlong-utf8", b'{"text":"\xc0\x80"}', "0xc0", "not_utf8"),
    reject("encoded-surrogate", b'{"text":"\xed\xa0\x80"}', "0xed", "not_utf8"),
    reject("beyond-unicode", b'{"text":"\xf4\x90\x80\x80"}', "0xf4", "not_utf8"),
    reject("broken-utf8-in-a-key", b'{"te\xffxt":"a"}', "byte 5 of", "not_utf8"),
    reject("broken-utf8-between-tokens", b'{"text":\xff"a"}', "byte 9 of", "not_utf8"),
    reject_file("utf-16-with-a-mark", b"\xff\xfe" + GOOD.decode().encode("utf-16-le"), "UTF-16.*iconv"),
    reject_file("utf-16-big-endian", b"\xfe\xff" + GOOD.decode().encode("utf-16-be"), "UTF-16.*iconv"),
    reject_file("utf-16-without-a-mark", GOOD.decode().encode("utf-16-le"), "UTF-16.*iconv -f UTF-16LE"),
    reject_file("utf-32", GOOD.decode().encode("utf-32"), "UTF-32.*iconv"),
    # JSON that two readers understand differently, or that is no row.
    reject("key-twice", b'{"text":"a","text":"b"}', "'text' twice", "duplicate_key"),
    reject("key-twice-within", b'{"text":"a","b":[{"c":1,"c":1}]}', "'c' twice", "duplicate_key"),
    reject("key-twice-by-escape", rb'{"text":"a","\u0074ext":"b"}', "'text' twice", "duplicate_key"),
    reject("key-twice-with-space", b'{"text" :"a","text"\t:"b"}', "'text' twice", "duplicate_key"),
    reject("key-twice-among-colons", rb'{"text":"a:\":","text":"b: :c"}', "'text' twice", "duplicate_key"),
    reject("empty-key-twice", b'{"text":"a","":1,"":2}', "'' twice", "duplicate_key"),
    reject("a-list", b'[{"text":"a"}]', "JSON list", "not_an_object"),
    reject("a-string", b'"text"', "JSON string", "not_an_object"),
    reject("a-number", b"17", "JSON number", "not_an_object"),
    reject("a-boolean", b"true", "JSON boolean", "not_an_object"),
    reject("a-null", b"null", "JSON null", "not_an_object"),
    reject("101-levels", b'{"b":' + b"[" * 100 + b"]" * 100 + b"}", "100 levels", "nested_too_deep"),
    reject("million-open-lists", b"[" * DEEP, "100 levels", "nested_too_deep"),
    reject("million-open-objects", b'{"a":' * DEEP, "100 levels", "nested_too_deep"),
    reject("million-levels", b'{"b":' + b"[" * DEEP + b"]" * DEEP + b"}", "100 levels", "nested_too_deep"),
    # Arrays: one bad element leaves the others, as long as quotes and brackets pair.
    reject_element("bad-element", b'[{"text":"a"},\n{"text":1e},\n{"text":"b"}]'),
    reject_element("element-with-a-trailing-comma", b'[{"text":"a"},\n{"text":"x",},\n{"text":"b"}]', "trailing comma"),
    reject_element("element-with-a-key-twice", b'[{"text":"a"},\n{"c":1,"c":2},\n{"text":"b"}]', "", "duplicate_key"),
    reject_element("element-not-utf8", b'[{"text":"a"},\n{"text":"\xff"},\n{"text":"b"}]', "0xff", "not_utf8"),
    reject_element("number-in-array", b'[{"text":"a"},\n17,\n{"text":"b"}]', "JSON number", "not_an_object"),
    reject_element("list-in-array", b'[{"text":"a"},\n[{"text":"x"}],\n{"text":"b"}]', "JSON list", "not_an_object"),
    reject_element(
        "no-comma-between-elements", b'[{"text":"a"},\n{"text":"x"} {"text":"y"},{"text":"b"}]', "two values"
    ),
    reject_element("two-commas", b'[{"text":"a"},\n,{"text":"b"}]', "no element before"),
    reject_element("comma-first", b'[\n,{"text":"a"},{"text":"b"}]', "no element before", element=1),
    reject_element("comma-last", b'[{"text":"a"},{"text":"b"},\n]', "after the last comma", element=3),
    reject_element("bad-element-on-the-only-line", b'[{"text":"a"}, {"text":"b"}, {"text":1e}]', line=1, element=3),
    reject_element("unescaped-quote-in-an-element", b'[{"text":"a"},\n{"text":"say "x" to"},\n{"text":"b"}]'),
    reject_element("string-with-no-end-on-its-line", b'[{"text":"a"},\n{"text":"x},\n{"text":"b"}]'),
    reject_element("raw-newline-in-an-element", b'[{"text":"a"},\n{"text":"x\ny"},\n{"text":"b"}]'),
    reject_element(
        "101-levels-in-an-element",
        b'[{"text":"a"},\n' + b"[" * 101 + b"]" * 101 + b"]",
        "100 levels",
        "nested_too_deep",
        num_good=1,
    ),
    reject_file(
        "million-levels-in-an-element", b"[" * DEEP + b"]" * DEEP, "deeper than 1,000 levels", "rows.json", 1, 1
    ),
    reject_file("array-with-no-end", b'[{"text":"a"},\n{"text":"b"}', "no end", "rows.json", 2, 2),
    reject_file("array-cut-in-a-string", b'[{"text":"a"},\n{"text":"b', "no end", "rows.json", 2, 2),
    reject_file("brace-too-many", b'[{"text":"a"},\n{"text":"b"}},\n{}]', "closes nothing", "rows.json", 2, 2),
    reject_file(
        "brackets-too-many-after-a-quote", b'[{"text":"a"},\n{"text":"b"c}]]\n', "do not pair", "rows.json", 2, 2
    ),
    reject_file("brace-missing", b'[{"text":"a"},\n{"text":"b",\n{}]', "no end", "rows.json", 2, 2),
    reject_file("two-arrays", b'[{"text":"a"}]\n[{"text":"b"}]', "goes on behind", "rows.json", 2),
    reject_file(
        "unescaped-quote-on-the-only-line", b'[{"text":"a"}, {"text":"say "x""}]', "do not pair", "rows.json", 1, 2
    ),
    reject_file("object-over-lines", b'{\n  "data": [\n    {}\n  ]\n}', "over several lines", "rows.json"),
    # Files that are not what their name says, or not whole.
    reject_file("gzip-without-its-ending", gzip.compress(GOOD), r"gzip.*Add \.gz"),
    reject_file("zstd-without-its-ending", zstandard.compress(GOOD), r"zstd.*Add \.zst"),
    reject_file("bzip2", bz2.compress(GOOD), "bzip2"),
    reject_file("zip", b"PK\x03\x04" + bytes(26), "zip archive"),
    reject_file("parquet-without-its-ending", parquet(TWO_ROWS), "Parquet.*parquet"),
    reject_file("text-named-gzip", GOOD, "not whole gzip", "rows.jsonl.gz", 0),
    reject_file("gzip-cut-off", gzip.compress(GOOD * 9)[:-9], "cut off", "rows.jsonl.gz", 0),
    reject_file("gzip-of-nothing", b"", "cut off", "rows.jsonl.gz", 0),
    reject_file("gzip-with-a-wrong-checksum", gzip.compress(GOOD)[:-8] + bytes(8), "not whole", "rows.jsonl.gz", 0),
    reject_file("gzip-with-garbage-behind", gzip.compress(GOOD) + b"garbage", "not whole", "rows.jsonl.gz", 0),
    reject_file("text-named-zstd", GOOD, "not whole zstd", "rows.jsonl.zst", 0),
    reject_file("zstd-cut-off", zstandard.compress(GOOD * 9)[:-3], "cut off", "rows.jsonl.zst", 0),
    reject_file("zstd-of-nothing", b"", "cut off", "rows.jsonl.zst", 0),
    reject_file("text-named-parquet", GOOD, "not whole Parquet", "rows.parquet", 0),
    reject_file("parquet-cut-off", parquet(TWO_ROWS)[:-20], "not whole Parquet", "rows.parquet", 0),
    reject_file(
        "parquet-with-a-column-twice",
        parquet(pyarrow.table([["a"], ["b"]], ["text", "text"])),
        "twice",
        "rows.parquet",
        0,
    ),
    reject_file("arrow-cut-between-batches", arrow(TWO_ROWS)[:-8], "its end is missing", "rows.arrow", 0),
    reject_file("text-named-arrow", GOOD, "not whole Arrow", "rows.arrow", 0),
    *(
        Kind(name, "reject", column(*data), "not_json", says=says, file="rows.parquet")
        for name, data, says in [
            ("bytes-in-a-column", ("image", [None, b"\x89PNG", None]), "'image' holds a bytes"),
            ("date-in-a-column", ("day", [None, datetime.date(2026, 1, 2), None]), "a date"),
            ("time-beyond-python", ("at", [None, 2**62, None], pyarrow.timestamp("ms")), "cannot be read"),
            ("nan-in-a-column", ("score", [0.5, float("nan"), 1.0]), "nan"),
        ]
    ),
    Kind(
        "map-with-a-key-twice",
        "reject",
        column("map", [[], [("k", "1"), ("k", "2")], []], pyarrow.map_("string", "string")),
        "duplicate_key",
        says="a map with one key twice",
        file="rows.parquet",
    ),
    Kind(
        "column-not-utf8",
        "reject",
        parquet(pyarrow.table({"text": BROKEN_TEXT})),
        "not_utf8",
        says="0xff",
        file="rows.parquet",
    ),
    # Rows that are JSON and no demonstration.
    reject_row("fields-of-no-format", "wrong_format", question="a", answer="b"),
    reject_row("no-fields", "wrong_format"),
    reject_row("text-is-a-number", "content_not_text", text=17),
    reject_row("text-is-null", "content_not_text", text=None),
    reject_row("text-is-blank", "empty_text", text=" \n"),
    reject_row("completion-is-blank", "empty_assistant", prompt="a", completion=""),
    reject_row("messages-is-a-string", "messages_not_a_list", messages="user: a"),
    reject_row("messages-is-an-object", "messages_not_a_list", messages={"role": "user", "content": "a"}),
    reject_row("no-messages", "empty_conversation", messages=[]),
    reject_row("message-is-a-string", "message_not_an_object", messages=["a", "b"]),
    reject_row("message-without-role", "missing_role", messages=[{"content": "a"}]),
    reject_row("message-without-content", "missing_content", messages=[{"role": "user"}]),
    reject_chat("unknown-role", "unknown_role", ("bot", "a")),
    reject_chat("role-in-capitals", "unknown_role", ("User", "a"), ("Assistant", "b")),
    reject_chat("role-is-a-number", "unknown_role", (1, "a")),
    reject_chat("role-is-null", "unknown_role", (None, "a")),
    reject_chat("content-is-a-number", "content_not_text", ("user", 17), ("assistant", "b")),
    reject_chat("content-is-true", "content_not_text", ("user", True), ("assistant", "b")),
    reject_chat("system-in-the-middle", "system_not_first", ("user", "a"), ("system", "s"), ("assistant", "b")),
    reject_chat("two-systems", "system_not_first", ("system", "s"), ("system", "s"), ("user", "a"), ("assistant", "b")),
    reject_chat("assistant-first", "assistant_first", ("assistant", "b"), ("user", "a"), ("assistant", "b")),
    reject_chat("two-users", "two_users", ("user", "a"), ("user", "a"), ("assistant", "b")),
    reject_chat("two-assistants", "two_assistants", ("user", "a"), ("assistant", "b"), ("assistant", "b")),
    reject_chat("empty-answer", "empty_assistant", ("user", "a"), ("assistant", " ")),
    reject_chat("nothing-to-train-on", "no_assistant_turn", ("user", "a")),
    reject_chat("last-turn-unanswered", "ends_without_assistant", ("user", "a"), ("assistant", "b"), ("user", "c")),
]


def read(path):
    """(good rows, (origin, reason, text) of bad ones), through both rooms: what is read is parsed."""
    good, bad = [], []
    try:
        for row in read_rows(str(path)):
            if isinstance(row, BadRow):
                bad.append((str(row.origin), row.reason, f"{row.origin}: {row.message}"))
                continue
            try:
                parse_row(row, "auto")
                good.append(row)
            except RowError as error:
                bad.append((str(error.origin), error.reason, str(error)))
    except DataError as error:
        return [], [(re.match(r"[^:]*(:\d+(#\d+)?)?", str(error)).group(), "file", str(error))]
    return good, bad


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_each_kind_has_its_verdict(tmp_path, kind):
    path = tmp_path / kind.file
    path.write_bytes(kind.content)
    good, bad = read(path)
    assert len(good) == kind.num_good
    if kind.verdict != "reject":
        assert bad == []
        return
    origin, reason, text = bad[0]
    assert reason == kind.reason
    place = f":{kind.line}" if kind.line else ""
    assert origin == f"{path}{place}{f'#{kind.element}' if kind.element else ''}"
    assert re.search(kind.says, text)
    problem, _, mending = text.removeprefix(f"{origin}: ").partition(". ")
    assert problem
    assert mending.endswith("."), f"says not how to mend it: {text}"
    assert len(text) < len(origin) + 400  # a message never holds the row


def test_repairs_change_nothing_else(tmp_path):
    rows = {}
    for kind in KINDS:
        if kind.verdict == "repair":
            (tmp_path / kind.file).write_bytes(kind.content)
            rows[kind.name] = [row.fields for row in read(tmp_path / kind.file)[0]]
    assert rows["bom"] == rows["crlf"] == rows["blank-lines"] == rows["lines-of-spaces"] == [{"text": "good"}] * 2
    assert [row["tool"] for row in rows["nulls-of-a-struct"]] == SCHEMAS


def test_the_table_is_as_long_as_promised():
    assert len({kind.name for kind in KINDS}) == len(KINDS) >= 85
    assert {kind.verdict for kind in KINDS} == {"accept", "repair", "reject"}


def test_a_row_that_is_too_large(tmp_path):
    """64 MiB and one byte, in a line and in an array; the rows around it are read."""
    large = b'{"text":"' + b"x" * (64 * 2**20 - 10) + b'"}'
    for name, place, content in [
        ("rows.jsonl.gz", "2", GOOD + large + b"\n" + GOOD),
        ("rows.json.gz", "2#2", b'[{"text":"a"},\n' + large + b',\n{"text":"b"}]'),
    ]:
        path = tmp_path / name
        path.write_bytes(zlib.compress(content, 1, wbits=31))
        good, [(origin, reason, text)] = read(path)
        assert (len(good), origin, reason) == (2, f"{path}:{place}", "row_too_large")
        assert "67,108,864 bytes" in text
