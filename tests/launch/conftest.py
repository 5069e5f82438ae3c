"""The scripts of `launch/` are run where they lie; their tests import what needs no process of its own."""

import sys
from pathlib import Path

import pytest
from fakes import FakeCommands

sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))

CONFIG = """
from sft_jax.config import default_config

def get_config():
    config = default_config()
    config.model.path = "models/base"
    config.data.train = [dict(path="chats.jsonl")]
    return config
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """No commands but these, and they only write down what they were asked."""
    return FakeCommands(tmp_path, monkeypatch, "gcloud", "kubectl", "sbatch", "sky")


@pytest.fixture
def config_file(tmp_path):
    """Its path wants quoting."""
    path = tmp_path / "my config.py"
    path.write_text(CONFIG)
    return path
