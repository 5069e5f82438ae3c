"""The table of reasons is whole: the code gives no reason that is not in it, and all that are."""

import ast
from pathlib import Path

import pytest

import sft_jax
from sft_jax.row_reasons import REASONS

FILES = sorted((Path(sft_jax.__file__).parent / "data").glob("*.py"))
PAGE = Path(sft_jax.__file__).parents[1] / "docs" / "formats.md"
REASON_AT = {"RowError": 0, "refuse": 0, "allow": 0, "BadRow": 1}


def strings(node):
    return {each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)}


def given_reasons(path):
    """The reasons that a file writes out where it refuses a row."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in REASON_AT and len(node.args) > REASON_AT[name]:
                reason = node.args[REASON_AT[name]]
                if isinstance(reason, ast.Constant):
                    yield reason.value


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_reason_of_the_code_is_in_the_table(path):
    assert set(given_reasons(path)) <= REASONS.keys()


def test_every_reason_of_the_table_is_given():
    assert REASONS.keys() <= set().union(*(strings(ast.parse(path.read_text())) for path in FILES))


@pytest.mark.parametrize("reason", REASONS)
def test_texts_fit_into_sentences(reason):
    entry = REASONS[reason]
    for text in (entry.meaning, entry.mend, entry.keep):
        assert not text.endswith((".", " "))
    assert entry.meaning[0].islower()
    assert entry.mend[0].isupper()
    assert not (entry.keep and entry.option)


def test_the_page_has_the_table():
    """The table to paste into the page is this one."""
    lines = ["| reason | the row | how to mend it | `keep` |", "|---|---|---|---|"]
    for reason, entry in REASONS.items():
        keep = f"`{entry.option}` decides" if entry.option else entry.keep
        lines.append(f"| `{reason}` | {entry.meaning} | {entry.mend} | {keep} |")
    assert PAGE.read_text().endswith("\n".join(lines) + "\n")
