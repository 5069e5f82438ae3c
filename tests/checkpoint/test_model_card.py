"""The card has the run's own figures, up to the exported step, and no path."""

import json
from pathlib import Path

import pytest
from etils import epath

from sft_jax.checkpoint.model_card import make_model_card, name_base
from sft_jax.config_schema import Config
from sft_jax.testbed.make import BASE_MODEL

SOURCE = dict(rows_read=12_345, rows_trained=12_000, rows_not_taken=0, rows_bad=300, rows_dropped=45, tokens=10**6)
REPORT = dict(fingerprint="f00d", num_steps=20, num_epochs=2.5, batch_size=8, max_seq_len=128, fill_fraction=0.875)
PROVENANCE = {
    "config_digest": "c0ffee",
    "libraries": {"sft_jax": "0.1.0", "jax": "0.10.2"},
    "devices": {"kind": "TPU v5e", "count": 8, "processes": 2},
}
RECORDS = [
    {"step": 0, "eval/held/loss": 6.5, "eval/held/accuracy": 0.25},
    {"step": 10, "loss": 2.0, "accuracy": 0.5, "grad_norm": 1.0},
    {"step": 10, "eval/held/loss": 1.25},
    {"step": 20, "loss": 1.0, "eval/held/loss": 0.125},
]


@pytest.fixture
def run_dir(tmp_path) -> epath.Path:
    config = Config().to_dict()
    config["run"]["dir"] = "/home/someone/runs/my-run"
    config["model"]["path"] = "/home/someone/models/base-1b/"
    config["model"]["freeze"] = ["embed"]
    report = REPORT | {
        "sources": {"chats|1": SOURCE | {"supervised_tokens": 1234, "path": "/home/someone/chats.jsonl"}}
    }
    for name, content in {"config": config, "data_report": report, "provenance": PROVENANCE}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    lines = [json.dumps(record) for record in RECORDS]
    lines[2:2] = ['{"step": 10, "eval/held/loss": {"cut"']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 21')
    return epath.Path(tmp_path)


def test_the_card_has_the_run_s_figures(run_dir) -> None:
    card = make_model_card(run_dir, 20, "exports/mine/", "")
    assert card.startswith("---\nlibrary_name: transformers\n")
    for line in (
        "# my-run",
        "Trained from base-1b by supervised fine-tuning: step 20 of 20.",
        "| chats&#124;1 | 12,345 | 12,000 | 0 | 300 | 45 | 1,000,000 | 1,234 |",
        "| steps | 20, 2.5 epochs |",
        "| batch | 8 rows of 128 tokens, 87.5% full |",
        "| frozen | `embed` |",
        "| devices | 8 x TPU v5e, 2 processes |",
        "| held-out held, loss | 6.5 (step 0) | 0.125 (step 20) |",
        "| training batch, loss | 2 (step 10) | 1 (step 20) |",
        "`f00d`",
        "`c0ffee`",
    ):
        assert line in card, line
    assert "/home" not in card


def test_the_snippet_names_the_folder_and_the_head_its_base(run_dir) -> None:
    card = make_model_card(run_dir, 20, "exports/mine/", "")
    assert card.count('from_pretrained("mine"') == 2
    assert "base_model" not in card
    head = make_model_card(run_dir, 20, "exports/mine", "owner/base-1b").split("---\n")[1]
    assert head.splitlines()[:2] == ["base_model: owner/base-1b", "library_name: transformers"]


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("owner/base-1b", "owner/base-1b"),
        ("/home/someone/base", ""),
        ("a/b/c", ""),
        ("./base", ""),
        ("base", ""),
        (7, ""),
    ],
)
def test_a_base_is_known_by_the_hub_s_name(tmp_path, said, name) -> None:
    fields = json.loads(Path(BASE_MODEL, "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"_name_or_path": said}))
    assert name_base(str(tmp_path)) == name
    assert name_base("/cache/hub/models--owner--some--1b/snapshots/0a1b") == "owner/some--1b"
    assert name_base("") == name_base(str(BASE_MODEL)) == ""


def test_nothing_later_than_the_step_is_said(run_dir) -> None:
    card = make_model_card(run_dir, 10, "exports/mine", "")
    assert "| held-out held, loss | 6.5 (step 0) | 1.25 (step 10) |" in card
    assert "step 20)" not in card
    (run_dir / "metrics.jsonl").unlink()
    assert "Nothing was measured" in make_model_card(run_dir, 10, "exports/mine", "")


def test_random_weights_are_said_to_be_that(run_dir) -> None:
    config = json.loads((run_dir / "config.json").read_text())
    config["model"] |= {"path": "", "preset": "testbed"}
    (run_dir / "config.json").write_text(json.dumps(config))
    assert "Trained from random weights of preset testbed" in make_model_card(run_dir, 20, "exports/mine/", "")
