"""Where the elements of an array begin and end, whatever the blocks in which its bytes come."""

import json
import random

import pytest

from sft_jax.data.json_array import split_array
from sft_jax.data.json_rows import BadRow
from sft_jax.datatypes import DataError

NESTED = [
    {"text": 'brackets ]}{[ and "quotes", commas, \\ and \\" in a string', "a": {"b": [1, [2, [3, [4, {"c": {}}]]]]}},
    {"": [], "\\": "\\\\", "x": "\n\t\x00"},
    {"many": list(range(5000)), "empty": {}, "no": None},
    {"deep": eval("[" * 90 + "]" * 90)},
]


def split(text, block_bytes=1 << 18, chunk_bytes=1 << 20):
    blocks = [text[start : start + block_bytes] for start in range(0, len(text), block_bytes)]
    elements = []
    try:
        for chunk in split_array(blocks, "rows.json", chunk_bytes):
            elements += chunk.elements
    except DataError as error:
        elements.append(str(error))
    return elements


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("block_bytes", [1, 2, 3, 7, 64, 100_000])
def test_elements_are_those_of_a_json_reader(block_bytes, indent):
    text = json.dumps(NESTED, indent=indent).encode()
    elements = split(text, block_bytes)
    assert [json.loads(element) for _, element in elements] == NESTED
    lines = [1 + text[: text.index(element)].count(b"\n") for _, element in elements]
    assert [line for line, _ in elements] == lines


BROKEN = [
    b'[{"a":"he said "so" to me"},\n{"b":1}]',
    b'[\n{"a":"x},\n{"b":1},\n {"c": "y\nz"}, {"d":1}\n,\n{"e":2}]',
    b'[1, "two", null ,, [3], {"a":{"b":"]"}} , ]',
    b'[{"a":1}} , {"b":2}]',
    b'[{"a":1}, {"b":2}',
    b'[{"a":"\\',
    b"[]]",
    b'[{"a":1 "b":2}, {"c"} ]\n ',
]


@pytest.mark.parametrize("text", BROKEN)
def test_the_blocks_do_not_matter_to_what_is_wrong(text):
    assert len({str(split(text, block_bytes)) for block_bytes in (1, 2, 3, 5, 11, 1000)}) == 1


def test_random_text_never_hangs_nor_fails_otherwise():
    random.seed(0)
    for _ in range(3000):
        text = b"[" + bytes(random.choices(b'{}[]",:\\ \na1', k=random.randrange(60)))
        assert split(text, 7) == split(text, 1000)


def test_after_a_quote_that_does_not_pair_no_text_becomes_a_row():
    """Were quotes counted on, what stands inside the second string would be read as an element of its own."""
    hidden = b'[{"a":"x}, {"b":"},{\\"text\\":\\"hidden\\"},{"},%c{"text":"c"}]'
    assert len(split(hidden % b" ")) == 1  # the refusal, nothing before it
    broken, after = split(hidden % b"\n")
    assert json.loads(after[1]) == {"text": "c"}
    assert broken[0] == 1


def test_a_comma_too_many_is_a_bad_row_of_its_own():
    elements = split(b'[,{"a":1},,{"b":2},]')
    assert [isinstance(element, BadRow) for element in elements] == [True, False, True, False, True]


def test_chunks_are_of_about_the_size_asked_for():
    text = json.dumps([{"text": "x" * 1000}] * 100).encode()
    chunks = list(split_array([text], "rows.json", 10_000))
    assert sum(len(chunk.elements) for chunk in chunks) == 100
    assert {len(chunk.elements) for chunk in chunks} == {10}
