"""The bytes of JSON lines in, one `RawRow` or `BadRow` per line out.

JSON is read strictly: what two readers could understand differently (a key given twice, NaN, half of a surrogate pair,
bytes that are not UTF-8) is a bad row, never a guess.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import msgspec

from sft_jax.datatypes import Origin, RawRow

MAX_ROW_BYTES = 64 * 2**20
"""A longer row is bad, and is never held in memory as a whole."""
MAX_DEPTH = 100
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_SPACE = b" \t\r\n"
_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read. `reason` is its line in the data report; `message` says what is wrong, what to do."""

    origin: Origin
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class LineChunk:
    """Whole lines of a file, unread. `first_line` is the number of the first."""

    path: str
    first_line: int
    text: bytes

    def rows(self) -> Iterator[RawRow | BadRow]:
        # A line ends at \n and nowhere else: U+2028 may stand in a string.
        for number, line in enumerate(self.text.split(b"\n"), self.first_line):
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if line.strip(_SPACE):
                yield read_row(line, Origin(self.path, number))


@dataclass(frozen=True, slots=True)
class BadChunk:
    """A row that is known to be bad before it is read."""

    row: BadRow

    def rows(self) -> Iterator[BadRow]:
        yield self.row


def split_lines(blocks: Iterable[bytes], path: str, chunk_bytes: int) -> Iterator[LineChunk | BadChunk]:
    """Cut a text into chunks of about `chunk_bytes` at the ends of lines; the longest line bounds the memory."""
    first_line, parts, num_bytes = 1, [], 0  # of what is held
    line_bytes = 0  # of the last line held, which has no end yet
    is_skipping = False  # the rest of a line that is too long
    for block in blocks:
        if is_skipping:
            end = block.find(b"\n") + 1
            if not end:
                continue
            block, is_skipping, first_line = block[end:], False, first_line + 1
        end = block.rfind(b"\n") + 1
        parts.append(block)
        num_bytes += len(block)
        line_bytes = len(block) - end if end else line_bytes + len(block)
        is_too_long = line_bytes > MAX_ROW_BYTES
        if is_too_long or num_bytes - line_bytes >= chunk_bytes:
            held = b"".join(parts)
            lines = held[: num_bytes - line_bytes]
            yield from _cut_lines(lines, path, first_line, chunk_bytes)
            first_line += lines.count(b"\n")
            parts, num_bytes = [held[num_bytes - line_bytes :]], line_bytes
        if is_too_long:
            yield BadChunk(too_large(Origin(path, first_line)))
            parts, num_bytes, line_bytes, is_skipping = [], 0, 0, True
    yield from _cut_lines(b"".join(parts), path, first_line, chunk_bytes)


def _cut_lines(lines: bytes, path: str, first_line: int, chunk_bytes: int) -> Iterator[LineChunk]:
    """A block of a compressed file may be many chunks large."""
    start = 0
    while start < len(lines):
        end = lines.find(b"\n", start + chunk_bytes - 1) + 1 or len(lines)
        yield LineChunk(path, first_line, lines[start:end])
        first_line += lines.count(b"\n", start, end)
        start = end


def read_row(text: bytes, origin: Origin) -> RawRow | BadRow:
    """The row that one JSON value stands for."""
    if len(text) > MAX_ROW_BYTES:
        return too_large(origin)
    try:
        value = _decode(text)
        check_structure(value, text)
    except DuplicateKeyError as error:
        return duplicate_key(origin, str(error))
    except (TooDeepError, RecursionError):
        return too_deep(origin)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return _explain(text, str(error), origin)
    if not isinstance(value, dict):
        kind = _KINDS[type(value)]
        mending = (
            "Let the name of a file that is one array end in .json" if kind == "list" else "Fix or remove the line"
        )
        message = f'is a JSON {kind}; expected an object such as {{"messages": [...]}}. {mending}.'
        return BadRow(origin, "not_an_object", message)
    return RawRow(value, origin)


_KINDS = {type(None): "null", bool: "boolean", int: "number", float: "number", str: "string", list: "list"}


def too_large(origin: Origin) -> BadRow:
    problem = f"is longer than {MAX_ROW_BYTES:,} bytes, the most that a row may have"
    return BadRow(origin, "row_too_large", f"{problem}. Split or remove it; JSON lines need one row on each line.")


def too_deep(origin: Origin) -> BadRow:
    return BadRow(origin, "nested_too_deep", f"is nested deeper than {MAX_DEPTH} levels. Flatten or remove it.")


def duplicate_key(origin: Origin, key: str) -> BadRow:
    return BadRow(origin, "duplicate_key", f"has the key {key!r:.80} twice in one object. Keep one of them.")


class DuplicateKeyError(Exception):
    """The key that an object has twice."""


class TooDeepError(Exception):
    """A value is nested deeper than MAX_DEPTH."""


def check_structure(value: Any, text: bytes) -> None:
    """Refuse deep nesting, and equal keys, of which the decoder keeps the last.

    Every key has a colon behind it, which is lost with the key. So no key is there twice where `value`, written anew,
    has as many colons as the text, none of which is an escape. Elsewhere those are counted that follow a quote or white
    space, and only where they are not as many as the keys are the keys themselves compared, in a second parse.
    """
    is_shallow = text.count(b"{") + text.count(b"[") <= MAX_DEPTH
    if is_shallow and b"\\u003" not in text and _encode(value).count(b":") == text.count(b":"):
        return
    num_keys = _count_keys(value)
    if sum(text.count(before + b":") for before in (b'"', b" ", b"\t", b"\r", b"\n")) == num_keys:
        return
    json.loads(text, object_pairs_hook=_check_keys, parse_int=str, parse_float=str)  # str: only the keys matter


def _count_keys(value: Any) -> int:
    """Of all objects in a JSON value; level by level, for the stack is the user's to exhaust."""
    num_keys, depth = 0, 0
    level = [value] if type(value) is dict or type(value) is list else []
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise TooDeepError
        below = []
        for container in level:
            children: Any = container
            if type(container) is dict:
                num_keys += len(container)
                children = container.values()
            for child in children:
                if type(child) is dict or type(child) is list:
                    below.append(child)
        level = below
    return num_keys


def _check_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        _refuse_duplicate([key for key, _ in pairs])
    return keys


def _refuse_duplicate(names: list[str]) -> NoReturn:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise DuplicateKeyError(name)
        seen.add(name)
    raise AssertionError("called for equal keys only")


# What stands at the byte that the decoder stops at, and how to mend it: what people's exporters and editors write.
_HINTS: tuple[tuple[re.Pattern[bytes], str, str], ...] = tuple(
    (re.compile(pattern, re.DOTALL), problem, mending)
    for pattern, problem, mending in (
        (rb"-?(NaN|nan|Infinity|inf)\b", "JSON has no NaN or Infinity", "Write null or a number, or remove the row"),
        (rb"(True|False|None)\b", "JSON writes true, false and null", "Write the row with a JSON library"),
        (rb"undefined\b", "JSON has no undefined", "Leave the field out"),
        (rb"'", "JSON strings stand in double quotes", "Write the row with a JSON library"),
        (rb"//|/\*|#", "JSON has no comments", "Remove the comment"),
        (rb"[\x00-\x1f]", "a string holds a raw control character", "Write it as an escape, such as \\n or \\t"),
    )
)


_LONE_SURROGATE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)


def _explain(text: bytes, problem: str, origin: Origin) -> BadRow:
    """Why a text is no JSON, in words that say what to do."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        where = f"byte {error.start + 1} of the row is 0x{text[error.start]:02x}, {error.reason}"
        mending = "Convert the file to UTF-8, as iconv -f WINDOWS-1252 -t UTF-8 does for many"
        return BadRow(origin, "not_utf8", f"is not UTF-8: {where}. {mending}.")
    return BadRow(origin, "malformed_json", "{}. {}.".format(*_find_hint(text, problem)))


def _find_hint(text: bytes, problem: str) -> tuple[str, str]:
    if b"\0" in text:
        return "holds a NUL byte, as a file that was not written to its end does", "Remove it, or write the file anew"
    if text.startswith(BYTE_ORDER_MARK):
        return "starts with a byte order mark, as where two files were joined", "Remove the mark"
    if _LONE_SURROGATE.search(text) and ("truncated" in problem or "surrogate" in problem):
        return "holds half of a surrogate pair, as where a text was cut between two halves", "Remove it, or the row"
    if text.strip(_SPACE) == b"{":
        return "is a brace alone: the row goes over several lines", "Write each row on one, as jq -c . does"
    if "truncated" in problem:
        cut = "ends inside a value: the row is cut off, or a string holds a raw newline"
        return cut, "Complete or remove the row, and write a newline in a string as \\n"
    if "out of range" in problem:
        problem, _, _ = problem.partition(" - at ")  # a path as deep as the row
        return f"holds a number that no reader can hold ({problem})", "Write a smaller number, or a string"
    found = re.search(r"\(byte (\d+)\)", problem)
    position = int(found.group(1)) if found else 0
    if "trailing characters" in problem:
        if b"\r" in text.strip(_SPACE):
            return "a carriage return alone ends a line here, as in old Mac files", "Convert it: tr '\\r' '\\n'"
        if b"{" in text[max(position - 1, 0) :]:
            return "has two values in one row", "Put each object on a line of its own, or a comma between elements"
    for start in (position, position - 1):
        for pattern, hint, mending in _HINTS:
            if start >= 0 and pattern.match(text, start):
                return f"{problem}: {hint}", mending
    return problem, "Fix or remove the line"
