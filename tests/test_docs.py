"""The README's five steps run as they are written, on the testbed's base model; links lead somewhere."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from sft_jax.testbed.make import BASE_MODEL

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


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


def test_five_steps(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "base").symlink_to(BASE_MODEL)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "HOME": str(tmp_path)}
    script = "\n".join(bash_blocks(ROOT / "README.md")[1:])
    assert script.count("sft-jax ") == 3
    result = subprocess.run(
        ["bash", "-euo", "pipefail"], input=script, cwd=tmp_path, env=env, text=True, capture_output=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Quite sure.<|im_end|>" in result.stdout
    assert (tmp_path / "runs" / "mine" / "export" / "config.json").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    named = set(
        re.findall(r"\b((?:sft_jax|configs|benchmarks|tests|docs)/[\w/]+\.(?:py|md|jinja))\b", page.read_text())
    )
    assert not [name for name in named if not (ROOT / name).exists()]
