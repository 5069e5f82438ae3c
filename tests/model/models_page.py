"""The table of families in docs/models.md, from what the tests compare.

    .venv/bin/python tests/model/models_page.py       writes it; test_models_page.py holds the page to it

A column is a set of families, and names the test that fails for a family that does not belong there. To add one, add a
line to COLUMNS.
"""

import json
import re
import runpy
from pathlib import Path
from typing import Any, NamedTuple

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


def _cases(test: str, function: str) -> dict[str, Any]:
    """What a test is parametrized by: name -> values."""
    marks = runpy.run_path(str(ROOT / test))[function].pytestmark
    return {mark.args[0]: mark.args[1] for mark in marks if mark.name == "parametrize"}


class Column(NamedTuple):
    test: str
    """The file that proves it, in the fast suite."""
    families: frozenset[str]
    of_mixtures: str = "yes"
    """What a cell says of a family whose layers have mixtures."""


_ADAPTERS = "tests/integration/test_adapter_families.py"
_ADAPTER_CASES = _cases(_ADAPTERS, "test_merged_equals_adapter")
_ADAPTED = frozenset(map(_family, _ADAPTER_CASES["folder"]))
_OF_MIXTURES = "yes; [PEFT folders](adapters.md) of some parts"

COLUMNS = {
    "full": Column("tests/parity/test_golden_parity.py", frozenset(map(_family, _GOLDENS))),
    "LoRA": Column(_ADAPTERS, _ADAPTED if "none" in _ADAPTER_CASES["quantize"] else frozenset(), _OF_MIXTURES),
    "QLoRA": Column(_ADAPTERS, _ADAPTED if "nf4" in _ADAPTER_CASES["quantize"] else frozenset(), _OF_MIXTURES),
    "packed": Column("tests/parity/test_golden_parity.py", frozenset(map(_family, filter(_is_packed, _GOLDENS)))),
    "export": Column("tests/checkpoint/test_family_round_trip.py", frozenset(map(_family, _GOLDENS))),
}


def table() -> str:
    """Families down, columns across, in Markdown."""
    header = ["`model_type`", "presets", *(f"[{name}](../{column.test})" for name, column in COLUMNS.items())]
    rows = [header, ["---"] * len(header)]
    for family in FAMILIES:
        presets = ", ".join(name for name, config in PRESETS.items() if config.family == family)
        of_mixtures = FAMILIES[family].moe is not None
        cells = [(c.of_mixtures if of_mixtures else "yes") if family in c.families else "" for c in COLUMNS.values()]
        rows.append([f"`{family}`", presets, *cells])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def page() -> str:
    """docs/models.md, with the table as it should be."""
    text = PAGE.read_text()
    written = re.sub(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", _BEGIN + table() + _END, text, flags=re.S)
    assert _BEGIN in text, f"{PAGE} has no place for the table"
    return written


if __name__ == "__main__":
    PAGE.write_text(page())
