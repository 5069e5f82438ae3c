"""The bytes of one JSON array in, its elements out, unread and each with its number and the line on which it starts.

A scanner over quotes, brackets and commas finds where elements end, so that a malformed one does not take the others
with it and memory holds one at a time. Where brackets or quotes do not pair, nothing behind that place can be told
apart any more: then the whole file is refused, lest most of it be lost as one row.

A string never holds a raw newline, so a quote that pairs with nothing harms its own line only:

    [{"a": "he said "so" to me"},        the string `he said ` goes on without a comma: this element is bad,
     {"a": "and left"}]                  and the next line is read as if nothing had happened
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NoReturn

from sft_jax.data.json_rows import BYTE_ORDER_MARK, MAX_ROW_BYTES, BadRow, read_row, too_large
from sft_jax.datatypes import DataError, Origin, RawRow

_STRING_REST = rb'[^"\\\n]*+(?:\\.[^"\\\n]*+)*+'
_STRING_END = rb'"(?=[\s,:\]}])'
_STRING = rb'"' + _STRING_REST + _STRING_END


def _passing(borders: bytes) -> re.Pattern[bytes]:
    """Passes over all but `borders`, brackets and quotes; and over whatever stands in brackets, to a depth of three.

    The counts of repeats bound the memory of a match: what has more of them is passed in several steps.
    """
    plain = rb'[^"\[\]{}' + borders + rb"]++|" + _STRING
    nested = rb'[^"\[\]{}]++|' + _STRING
    for _ in range(2):
        nested = rb'[^"\[\]{}]++|' + _STRING + rb"|[\[{](?:" + nested + rb"){0,4096}+[\]}]"
    return re.compile(rb"(?:" + plain + rb"|[\[{](?:" + nested + rb"){0,4096}+[\]}]){0,4096}+", re.DOTALL)


_INSIDE = _passing(b"")
_BETWEEN = _passing(b",")
_IN_STRING = re.compile(_STRING_REST, re.DOTALL)
_CLOSED = re.compile(_STRING_END)
_SPACE = re.compile(rb"[ \t\r\n]*+")
_DROP_BYTES = 256 * 1024
_MAX_SCAN_DEPTH = 1000
"""Of brackets to look for the ends of; elements of MAX_DEPTH levels are bad already."""


@dataclass(frozen=True, slots=True)
class ElementChunk:
    """Elements of an array, unread, each with its line; or what is wrong with one."""

    path: str
    first: int  # its number, from 1
    elements: tuple[tuple[int, bytes] | BadRow, ...]

    def rows(self) -> Iterator[RawRow | BadRow]:
        for number, element in enumerate(self.elements, self.first):
            if isinstance(element, BadRow):
                yield element
            else:
                line, text = element
                yield read_row(text, Origin(self.path, line, number))


def split_array(blocks: Iterable[bytes], path: str, chunk_bytes: int) -> Iterator[ElementChunk]:
    """Cut the array that a text begins with into chunks of about `chunk_bytes`.

    Raises:
      DataError: its brackets or quotes do not pair, or something stands behind it.
    """
    elements: list[tuple[int, bytes] | BadRow] = []
    first, num_bytes = 1, 0
    for element in _ArrayScanner(blocks, path).elements():
        elements.append(element)
        num_bytes += 0 if isinstance(element, BadRow) else len(element[1])
        if num_bytes >= chunk_bytes:
            yield ElementChunk(path, first, tuple(elements))
            elements, first, num_bytes = [], first + len(elements), 0
    if elements:
        yield ElementChunk(path, first, tuple(elements))


class _ArrayScanner:
    """A window on the text. The element begins at `_start` and is scanned up to `_at`; earlier bytes may be dropped."""

    def __init__(self, blocks: Iterable[bytes], path: str):
        self._blocks, self._path = iter(blocks), path
        self._text = bytearray()
        self._start = self._at = 0
        self._line, self._counted = 1, 0  # the line of the byte at `_counted`
        self._is_too_long = False  # the element's first bytes are dropped

    def elements(self) -> Iterator[tuple[int, bytes] | BadRow]:
        self._skip_space()
        if self._text.startswith(BYTE_ORDER_MARK):
            self._at = len(BYTE_ORDER_MARK)
            self._skip_space()
        self._at += 1  # the array's own bracket
        before, is_closed = b"[", False
        numbers = itertools.count(1)
        while not is_closed:
            self._skip_space()
            origin = Origin(self._path, self._start_element(), next(numbers))
            is_broken, is_closed = self._scan_element(origin)
            if self._is_too_long:
                yield too_large(origin)
            elif self._at > self._start:
                yield origin.line, bytes(memoryview(self._text)[self._start : self._at])
            elif not is_closed and before:
                yield BadRow(origin, "malformed_json", "has a comma with no element before it. Remove the comma.")
            elif before == b",":
                yield BadRow(origin, "malformed_json", "has no element after the last comma. Remove the comma.")
            before = b"" if is_broken else b","
            if not is_broken:
                self._at += 1  # the comma, or the array's own bracket
        self._skip_space()
        if self._at < len(self._text):
            origin = Origin(self._path, self._start_element())
            self._refuse(origin, "the file goes on behind the end of its array", "Make it one array")

    def _scan_element(self, origin: Origin) -> tuple[bool, bool]:
        """Move to the comma or bracket that ends the element: whether a quote broke it, whether the array ends with it.

        A broken element ends with its line, borders and all.
        """
        depth = 0
        while True:
            self._at = _pass((_INSIDE if depth else _BETWEEN), self._text, self._at)
            if self._at == len(self._text):
                if not self._read_on():
                    self._refuse(origin, "this element, or the array, has no end", "Complete the file")
                continue
            found = self._text[self._at]
            if found == ord('"'):
                string = self._at
                if not self._pass_string(origin):
                    depth += self._pass_broken_line(string, origin)
                    if depth < -1:
                        self._refuse(origin, "the brackets of this element do not pair", "Mend it")
                    if depth <= 0:
                        return True, depth < 0
            elif found in b"[{":
                depth += 1
                self._at += 1
                if depth > _MAX_SCAN_DEPTH:
                    self._refuse(origin, f"this element is nested deeper than {_MAX_SCAN_DEPTH:,} levels", "Remove it")
            elif found in b"]}" and depth:
                depth -= 1
                self._at += 1
            elif found in b",]" and not depth:
                return False, found == ord("]")
            elif found == ord("}"):
                self._refuse(origin, "a } closes nothing in this element or after it", "Mend it")

    def _pass_string(self, origin: Origin) -> bool:
        """Move behind a string that the fast patterns stopped at; False where its quotes do not pair."""
        self._at += 1
        while True:
            self._at = _pass(_IN_STRING, self._text, self._at)
            # An escape may go on in the next block, and what follows the quote may stand there.
            if len(self._text) - self._at >= 2:
                is_closed = _CLOSED.match(self._text, self._at) is not None
                self._at += is_closed
                return is_closed
            if not self._read_on():
                self._refuse(origin, "a string in this element, or the array, has no end", "Complete the file")

    def _pass_broken_line(self, string: int, origin: Origin) -> int:
        """Move behind the line's end; the brackets from `string` on, quoted or not, opened less closed."""
        while (end := self._text.find(b"\n", self._at)) < 0 or self._is_too_long:
            self._at = len(self._text)
            if self._is_too_long or not self._read_on():
                problem = "the quotes of this element do not pair, and its line has no end"
                self._refuse(origin, problem, 'Write a quote in a string as \\"')
        self._at = end + 1
        line = self._text[string:end]
        return line.count(b"{") + line.count(b"[") - line.count(b"}") - line.count(b"]")

    def _skip_space(self) -> None:
        self._start = self._at
        while (end := _pass(_SPACE, self._text, self._at)) == len(self._text):
            self._at = self._start = end
            if not self._read_on():
                break
        self._at = self._start = end

    def _start_element(self) -> int:
        """Let an element begin at `_at`, drop what is before it where that is much, and give its line."""
        self._start, self._is_too_long = self._at, False
        self._line += self._text.count(b"\n", self._counted, self._at)
        self._counted = self._at
        if self._at >= _DROP_BYTES:
            self._drop()
        return self._line

    def _read_on(self) -> bool:
        """Append the next block; False at the end of the file."""
        if self._at - self._start > MAX_ROW_BYTES:
            self._is_too_long = True
            self._line += self._text.count(b"\n", self._counted, self._at)
            self._drop()
        block = next(self._blocks, None)
        if block is None:
            return False
        self._text += block
        return True

    def _drop(self) -> None:
        """Let the text begin at `_at`, up to which lines have been counted."""
        del self._text[: self._at]
        self._start = self._at = self._counted = 0

    def _refuse(self, origin: Origin, problem: str, mending: str) -> NoReturn:
        raise DataError(f"{origin}: {problem}: no element from here on can be told apart. {mending}.")


def _pass(pattern: re.Pattern[bytes], text: bytearray, start: int) -> int:
    """Where a pattern that always fits ends. The match is dropped at once: it would keep `text` from growing."""
    found = pattern.match(text, start)
    assert found is not None
    return found.end()
