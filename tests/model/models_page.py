"""The table of families in docs/models.md, from what the tests compare.

    .venv/bin/python tests/model/models_page.py       writes it; test_models_page.py holds the page to it

A column is a set of families, and names the test that fails for a family that does not belong there. To add one, add a
line to COLUMNS.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import safetensors.numpy

from sft_jax.model.family_table import FAMILIES
from sft_jax.model.presets import PRESETS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "models.md"
_BEGIN, _END = "<!-- families: written by tests/model/models_page.py -->\n", "<!-- end -->"
_GOLDENS = sorted((ROOT / "tests" / "parity" / "goldens").iterdir())


def _family(golden: Path) -> str:
    return json.loads((golden / "config.json").read_text())["model_type"]


def _is_packed(golden: Path) -> bool:
    return safetensors.numpy.load_file(golden / "expected.safetensors")["batch.segment_ids"].max() > 1


class Column(NamedTuple):
    test: str
    """The file that proves it, in the fast suite."""
    families: frozenset[str]


COLUMNS = {
    "full": Column("tests/parity/test_golden_parity.py", frozenset(map(_family, _GOLDENS))),
    "packed": Column("tests/parity/test_golden_parity.py", frozenset(map(_family, filter(_is_packed, _GOLDENS)))),
    "export": Column("tests/checkpoint/test_family_round_trip.py", frozenset(map(_family, _GOLDENS))),
}


def table() -> str:
    """Families down, columns across, in Markdown."""
    header = ["`model_type`", "presets", *(f"[{name}](../{column.test})" for name, column in COLUMNS.items())]
    rows = [header, ["---"] * len(header)]
    for family in FAMILIES:
        presets = ", ".join(name for name, config in PRESETS.items() if config.family == family)
        rows.append([f"`{family}`", presets, *("yes" if family in c.families else "" for c in COLUMNS.values())])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def page() -> str:
    """docs/models.md, with the table as it should be."""
    text = PAGE.read_text()
    written = re.sub(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", _BEGIN + table() + _END, text, flags=re.S)
    assert _BEGIN in text, f"{PAGE} has no place for the table"
    return written


if __name__ == "__main__":
    PAGE.write_text(page())
