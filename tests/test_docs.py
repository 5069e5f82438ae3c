"""The pages' commands run as they are written, on the testbed's base model; rows are rows, links lead somewhere."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from sft_jax.data.conversations import detect_format, ignored_fields, parse_row
from sft_jax.datatypes import Origin, RawRow
from sft_jax.testbed.make import BASE_MODEL

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "launch" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def bash_blocks(page):
    blocks = re.findall(r"^( *)```bash\n(.*?)^ *```", page.read_text(), re.M | re.S)
    return [textwrap.dedent(body) for _, body in blocks]


def test_the_first_two_commands_are_make():
    assert [line.split("#")[0].strip() for line in bash_blocks(ROOT / "README.md")[0].splitlines()] == [
        "make demo",
        "make test",
    ]
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^demo: ", makefile, re.M)
    assert re.search(r"^test: ", makefile, re.M)


def run_bash(script, folder):
    """Run a page's commands in a folder that has `models/base`."""
    (folder / "models").mkdir()
    (folder / "models" / "base").symlink_to(BASE_MODEL)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "HOME": str(folder)}
    result = subprocess.run(
        ["bash", "-euo", "pipefail"], input=script, cwd=folder, env=env, text=True, capture_output=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_five_steps(tmp_path):
    script = "\n".join(bash_blocks(ROOT / "README.md")[1:])
    assert script.count("sft-jax ") == 3
    said = run_bash(script, tmp_path)
    assert "Quite sure.<|im_end|>" in said
    assert "2 of embedding and head: each began as the mean of the 1,900 in models/base" in said
    assert (tmp_path / "runs" / "mine" / "export" / "config.json").is_file()


def test_the_three_commands_of_the_data_page(tmp_path):
    blocks = bash_blocks(ROOT / "docs" / "data.md")
    assert [block.split()[:2] for block in blocks[1:]] == [["sft-jax", name] for name in ("render", "check", "show")]
    text = run_bash("\n".join(blocks), tmp_path)
    assert "A fine-tuned model.<|im_end|>" in text
    assert "= 2 trained + 0 bad + 0 dropped + 0" in text
    assert json.loads((tmp_path / "runs" / "mine" / "data_report.json").read_text())["rows_trained"] == 2
    assert "chats.jsonl:2 (chats)" in (tmp_path / "preview.html").read_text()


def test_the_rows_of_the_data_page_are_of_their_formats():
    blocks = re.findall(r"^```json\n(.*?)^```", (ROOT / "docs" / "data.md").read_text(), re.M | re.S)
    rows = [RawRow(json.loads(block), Origin("data.md", 1)) for block in blocks]
    formats = ["messages", "messages", "sharegpt", "alpaca", "prompt_completion", "text"]
    assert [detect_format(row) for row in rows] == formats
    for row, format in zip(rows, formats, strict=True):
        parse_row(row, format)
        assert not ignored_fields(row, format)


def test_the_house_page_has_every_file_of_data():
    page = (ROOT / "docs" / "house.md").read_text()
    files = {path.name for path in (ROOT / "sft_jax" / "data").glob("*.py")} - {"__init__.py"}
    assert [name for name in sorted(files) if not re.search(rf"[`/ ]{re.escape(name)}[` ]", page)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page):
    named = set(
        re.findall(
            r"\b((?:sft_jax|configs|benchmarks|tests|docs|launch)/[\w/]+\.(?:py|md|jinja|sh|yaml))\b", page.read_text()
        )
    )
    assert not [name for name in named if not (ROOT / name).exists()]
