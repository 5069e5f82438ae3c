"""A run goes on with the data that it was started on, or says by name what changed; and it goes on with other data only
where that is asked for, and remembers it."""

import io
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from rich.console import Console

from sft_jax.checkpoint.reader import CheckpointReader
from sft_jax.cli.main import dispatch
from sft_jax.command_line import read_config, run_command
from sft_jax.experiment import open_renderer, place_model
from sft_jax.main import main, run
from sft_jax.testbed.make import BASE_MODEL

CONFIG = """
from sft_jax.config import default_config

def get_config():
    config = default_config()
    config.run.dir = "run"
    config.run.compilation_cache = {cache!r}
    config.model.preset = "testbed"
    config.model.overrides = dict(num_layers=1, embed_dim=16, mlp_dim=16, num_heads=1, num_kv_heads=1, head_dim=16)
    config.model.compute_dtype = "float32"
    config.data.tokenizer = "tokenizer"
    config.data.chat_template = "template.jinja"
    config.data.new_tokens = ("<|im_start|>", "<|im_end|>")
    config.data.train = [dict(path="a.jsonl"), dict(path="b.jsonl")]
    config.data.store_dir = "store"
    config.data.max_seq_len = 64
    config.batch.batch_size = 8
    config.schedule.num_steps = 2
    config.schedule.name = "constant"
    config.checkpoint.export = False
    config.log.tensorboard = False
    config.log.every_steps = 1
    return config
"""
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_rows(path, count):
    rows = [{"prompt": f"the fox {i}", "completion": f"has an old flute {i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a run of two steps, and all that it was made of."""
    folder = tmp_path_factory.mktemp("resume") / "finished"
    folder.mkdir()
    (folder / "config.py").write_text(CONFIG.format(cache=str(folder.parent / "cache")))
    (folder / "template.jinja").write_text(TEMPLATE)
    write_rows(folder / "a.jsonl", 40)
    write_rows(folder / "b.jsonl", 10)
    (folder / "tokenizer").mkdir()
    for file in Path(BASE_MODEL).iterdir():
        if not file.name.endswith(".safetensors"):
            shutil.copy(file, folder / "tokenizer")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        assert run_command(main, ["--config=config.py"]) == 0
    return folder


@pytest.fixture
def folder(finished, tmp_path, monkeypatch):
    """A copy to change."""
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def train(capsys, *args):
    status = run_command(main, ["--config=config.py", *args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def edit_tokenizer(folder):
    """The same vocabulary, and a BOS that is none any more."""
    path = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"add_bos_token": not config.get("add_bos_token", False)}))


def add_source(folder):
    write_rows(folder / "c.jsonl", 3)
    edit(folder / "config.py", 'dict(path="b.jsonl")', 'dict(path="b.jsonl"), dict(path="c.jsonl")')


CASES = {
    "one row": (
        lambda folder: edit(folder / "b.jsonl", "has an old flute 3", "has a new flute 3"),
        ["config.data.train[1].path: its content changed"],
    ),
    "the template": (
        lambda folder: edit(folder / "template.jinja", "{% for m in", "A chat. {% for m in"),
        ["config.data.chat_template: its content changed"],
    ),
    "the tokenizer": (edit_tokenizer, ["config.data.tokenizer: its content changed"]),
    "max_seq_len": (
        lambda folder: edit(folder / "config.py", "max_seq_len = 64", "max_seq_len = 72"),
        ["config.data.max_seq_len: 64 -> 72"],
    ),
    "the seed": (
        lambda folder: edit(folder / "config.py", "config.run.dir", "config.run.seed = 5; config.run.dir"),
        ["config.run.seed: 0 -> 5"],
    ),
    "a source more": (add_source, ["config.data.train[2]: is new"]),
    "a source less": (
        lambda folder: edit(folder / "config.py", ', dict(path="b.jsonl")', ""),
        ["config.data.train[1]: is no longer there"],
    ),
    "other sources": (
        lambda folder: edit(
            folder / "config.py",
            'dict(path="a.jsonl"), dict(path="b.jsonl")',
            'dict(path="b.jsonl"), dict(path="a.jsonl", epochs=2.0)',
        ),
        [
            "config.data.train[0].path: its content changed",
            "config.data.train[1].path: its content changed",
            "config.data.train[1].epochs: 1.0 -> 2.0",
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_other_data_are_refused_by_the_name_of_what_changed(folder, capsys, case):
    change, expected = CASES[case]
    change(folder)
    before = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    status, _, err = train(capsys, "--config.schedule.num_steps=4")
    assert status == 2
    changes = [line.strip() for line in err.splitlines() if line.startswith("  ")]
    assert sorted(changes) == sorted(expected)
    assert "or go on with the new data: `sft-jax train --override-fingerprint`" in err
    assert {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()} == before


def test_all_changes_are_named_together(folder, capsys):
    for case in ("one row", "the template", "max_seq_len", "the seed"):
        CASES[case][0](folder)
    status, _, err = train(capsys, "--config.schedule.num_steps=4")
    assert status == 2
    for case in ("one row", "the template", "max_seq_len", "the seed"):
        assert all(change in err for change in CASES[case][1])


def test_a_log_has_no_text_of_rows_and_a_terminal_has(folder, capsys):
    status, out, err = train(capsys, "--config.schedule.num_steps=3")
    assert status == 0, err
    assert "step 3/3" in out
    assert "old flute" not in out + err
    terminal = io.StringIO()
    run(read_config(["--config=config.py", "--config.run.dir=other"]), Console(file=terminal, force_terminal=True))
    assert "old flute" in terminal.getvalue()


def test_a_damaged_config_of_a_run_is_said(folder, capsys):
    (folder / "run" / "config.json").write_text('{"run": {"di')
    assert run_command(dispatch, ["export", "--run=run", "--to=out"]) == 5
    assert "run/config.json: is damaged: Unterminated string" in capsys.readouterr().err


def test_files_that_only_moved_are_the_same_data(folder, capsys):
    (folder / "b.jsonl").rename(folder / "moved.jsonl")
    edit(folder / "config.py", "b.jsonl", "moved.jsonl")
    status, out, err = train(capsys, "--config.schedule.num_steps=3")
    assert status == 0, err
    assert "resumed" in out


@pytest.mark.parametrize("flag", ["--override-fingerprint", "--config.run.override_fingerprint=true"])
def test_the_way_through_is_said_and_remembered(folder, capsys, flag):
    for case in ("one row", "the seed"):
        CASES[case][0](folder)
    status, out, err = train(capsys, "--config.schedule.num_steps=4", flag)
    assert status == 0, err
    changes = ["config.data.train[1].path: its content changed", "config.run.seed: 0 -> 5"]
    (said,) = (line for line in out.splitlines() if line.startswith("overridden"))
    assert said.split(maxsplit=1)[1] == "at step 2: " + "; ".join(changes)
    assert not json.loads((folder / "run" / "config.json").read_text())["run"]["override_fingerprint"]
    # From here on the new data are the run's, and what was done stays on record.
    status, out, err = train(capsys, "--config.schedule.num_steps=5")
    assert status == 0, err
    assert "overridden  at step 2" in out
    reader = CheckpointReader(epath.Path("run"))
    assert reader.find_restorable().step == 5
    assert reader.read_meta(5)["overrides"] == [{"step": 2, "changes": changes}]
    reader.close()
    assert [json.loads(line)["step"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()] == [
        *range(1, 6)
    ]


def test_another_model_is_not_overridden(folder, capsys):
    CASES["one row"][0](folder)
    status, _, err = train(
        capsys, "--override-fingerprint", "--config.optimizer.name=lion", "--config.schedule.num_steps=4"
    )
    assert status == 2
    assert "config.optimizer.name: adamw -> lion" in err
    assert "config.data.train[1].path: its content changed" in err
    assert "--override-fingerprint" not in err


def restore(step, *args):
    """The whole state that a run has saved."""
    config = read_config(["--config=config.py", *args])
    placed = place_model(config, open_renderer(config))
    reader = CheckpointReader(epath.Path(config.run.dir))
    state, _ = reader.restore(step, vars(placed.abstract_state))
    reader.close()
    return jax.tree.leaves_with_path(jax.device_get(state))


def test_moments_that_are_rounded_at_random_are_rounded_alike_after_a_resume(folder, capsys):
    args = ("--config.optimizer.moment_dtype=bfloat16", "--config.schedule.num_steps=4", "--config.run.dir=one")
    assert train(capsys, *args)[0] == 0
    parts = (*args[:-1], "--config.run.dir=two")
    for steps in (2, 4):
        status, out, err = train(capsys, *parts, f"--config.schedule.num_steps={steps}")
        assert status == 0, err
    assert "resumed     at step 2 of 4" in out
    whole, resumed = restore(4, *args), restore(4, *parts)
    assert sum(leaf.dtype.name == "bfloat16" for _, leaf in whole) > 10
    for (path, one), (_, other) in zip(whole, resumed, strict=True):
        assert one.tobytes() == other.tobytes(), path
    status, _, err = train(capsys, *parts[1:], "--config.schedule.num_steps=5")
    assert status == 2
    assert "config.optimizer.moment_dtype: bfloat16 -> float32" in err


def test_moments_on_the_host_are_saved_and_resumed_as_any(folder, capsys):
    """Other steps may be on the device; the numbers are the same."""
    args = ("--config.schedule.num_steps=4", "--config.watch.replicas_every=1")
    assert train(capsys, *args, "--config.run.dir=one")[0] == 0
    for steps, offload in ((2, True), (3, False), (4, True)):
        parts = (*args[1:], "--config.run.dir=two", f"--config.optimizer.offload={offload}")
        status, out, err = train(capsys, *parts, f"--config.schedule.num_steps={steps}")
        assert status == 0, err
    assert "resumed     at step 3 of 4" in out
    for (path, one), (_, other) in zip(restore(4, args[0], "--config.run.dir=one"), restore(4, *parts), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-9, err_msg=str(path))


def test_the_flag_changes_nothing_where_nothing_changed(folder, capsys):
    status, out, err = train(capsys, "--override-fingerprint", "--config.schedule.num_steps=3")
    assert status == 0, err
    assert "overridden" not in out


def spoil(step):
    """Change a byte of a step, whichever file it falls in."""
    path = max(Path(f"run/checkpoints/{step}").rglob("d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_passed_over_and_kept(folder, capsys):
    assert train(capsys, "--config.schedule.num_steps=4")[0] == 0
    spoil(4)
    status, out, err = train(capsys, "--config.schedule.num_steps=5")
    assert status == 0, err
    assert "resumed     at step 2 of 5" in out
    (said,) = (line for line in out.splitlines() if line.startswith("passed over"))
    assert "run/checkpoints/4: state/" in said
    assert "is not what was written" in said
    assert (folder / "run" / "quarantine" / "4").is_dir()


def test_a_run_begins_again_only_when_that_is_asked_for(folder, capsys):
    spoil(2)
    files = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    for _ in range(2):
        status, _, err = train(capsys, "--config.schedule.num_steps=3")
        assert status == 5
        assert "begin again at step 0 by --allow-fresh" in err
        assert {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()} == files
    assert run_command(dispatch, ["check", "--config=config.py"]) == 5
    status, out, err = train(capsys, "--config.schedule.num_steps=3", "--allow-fresh")
    assert status == 0, err
    assert "resumed" not in out
    assert not json.loads((folder / "run" / "config.json").read_text())["run"]["allow_fresh"]
    assert [json.loads(line)["step"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()] == [
        *range(1, 4)
    ]


def test_export_takes_the_newest_whole_step_and_refuses_a_damaged_one(folder, capsys):
    assert train(capsys, "--config.schedule.num_steps=4")[0] == 0
    spoil(4)
    assert run_command(dispatch, ["export", "--run=run", "--to=damaged", "--step=4"]) == 5
    assert "run/checkpoints/4: is damaged: state/" in capsys.readouterr().err
    assert not Path("damaged").exists()
    assert run_command(dispatch, ["export", "--run=run", "--to=whole"]) == 0
    said = capsys.readouterr()
    assert "step 2 exported" in said.out
    assert "passed over" in said.err
    assert (folder / "run" / "checkpoints" / "4").is_dir()
