"""Mutated rows raise what they may, quickly; and what is read of them is what a slow and simple reader reads."""

import json
import math
import random

import fuzz_rows

from sft_jax.data.json_rows import MAX_DEPTH, read_row
from sft_jax.datatypes import Origin, RawRow


def test_mutated_rows_raise_nothing_but_data_errors_and_take_no_second(tmp_path):
    account = fuzz_rows.main(10_000, seed=0, renders=fuzz_rows.open_renders(tmp_path))
    assert account.failures == []
    assert account.slowest.keys() == {"reading", "chatml", "qwen3", "llama3.1"}
    accepted = sum(count for verdict, count in account.verdicts.items() if verdict.endswith("accepted"))
    reasons = {verdict for verdict in account.verdicts if verdict.startswith("reading:")}
    assert accepted > 200  # the mutations leave something to parse
    assert len(reasons) >= 6
    for template in ("chatml", "qwen3", "llama3.1"):
        assert account.verdicts[f"{template}: accepted"] > 200
        assert account.verdicts[f"{template}: too_long"] > 5


def test_the_fuzz_can_fail():
    def render(row):
        raise KeyError("not a DataError")

    assert "KeyError" in fuzz_rows.main(1000, seed=0, renders={"broken": render}).failures[0]


def read_slowly(text):
    """A row by Python's own reader, and every rule checked on its own; None where one is broken."""

    def check_pairs(pairs):
        assert len({key for key, _ in pairs}) == len(pairs)
        return dict(pairs)

    def refuse(constant):
        raise ValueError(constant)

    def check(value, depth):
        assert depth <= MAX_DEPTH + 1
        if isinstance(value, float):
            assert math.isfinite(value)
        elif isinstance(value, str):
            value.encode()
        elif isinstance(value, dict):
            for key, child in value.items():
                key.encode()
                check(child, depth + 1)
        elif isinstance(value, list):
            for child in value:
                check(child, depth + 1)

    try:
        row = json.loads(text.decode(), object_pairs_hook=check_pairs, parse_constant=refuse)
        check(row, 1)
    except (ValueError, AssertionError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def test_reading_agrees_with_a_slow_reader():
    chosen, mutate = random.Random(1), fuzz_rows.Mutator()
    num_read = 0
    for _ in range(5000):
        text = mutate(chosen)
        row = read_row(text, Origin("rows.jsonl", 1))
        expected = read_slowly(text)
        assert (row.fields if isinstance(row, RawRow) else None) == expected, text[:2000]
        num_read += expected is not None
    assert 1000 < num_read < 4000
