"""check accounts for every row in the terminal and in data_report.json; show makes a page of it."""

import json

import pytest

from sft_jax.checkpoint.restorable import Found
from sft_jax.cli.main import dispatch
from sft_jax.command_line import run_command
from sft_jax.testbed.make import BASE_MODEL

CONFIG = """
from sft_jax.config import default_config

def get_config():
    config = default_config()
    config.run.dir = "run"
    config.model.path = {base!r}
    config.data.train = [dict(path="chats.jsonl")]
    config.data.eval = [dict(path="held_out.jsonl")]
    config.data.store_dir = "store"
    config.data.chat_template = "chatml"
    config.data.new_tokens = ("<|im_start|>", "<|im_end|>")
    config.data.max_seq_len = 64
    config.data.max_bad_fraction = 0.5
    config.batch.batch_size = 2
    return config
"""


def chat(answer):
    return json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]})


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.py").write_text(CONFIG.format(base=str(BASE_MODEL)))
    (tmp_path / "chats.jsonl").write_text("\n".join([chat("Yes."), chat("<script>x</script>"), "{broken", chat("No.")]))
    (tmp_path / "held_out.jsonl").write_text(chat("A fox."))


def call(capsys, *args, status=0):
    assert run_command(dispatch, [args[0], "--config=config.py", *args[1:]]) == status
    captured = capsys.readouterr()
    return captured.err if status else captured.out


def test_check_prints_and_writes_the_account(capsys, tmp_path):
    text = " ".join(call(capsys, "check").split())
    for part in ("train chats", "rows read │ 4 │ = 3 trained + 1 bad", "bad: malformed_json │ 1 │ chats.jsonl:3"):
        assert part in text
    for part in ("turns │ 3 │", "eval held_out held_out", "steps an epoch", "report: run/data_report.json"):
        assert part in text
    assert "files read │ 1 │" in text
    assert "held out │" not in text
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert report["rows_read"] == report["rows_trained"] + report["rows_bad"] == 4
    assert report["eval"]["held_out"]["rows_trained"] == 1


def test_check_warns_of_rows_longer_than_the_model_was_made_for(capsys):
    warning = "warning: config.data.max_seq_len: is 1,025, and the model was made for texts of 1,024 tokens"
    assert warning not in call(capsys, "check", "--config.data.max_seq_len=1024")
    assert warning in call(capsys, "check", "--config.data.max_seq_len=1025")


def test_check_refuses_what_the_step_would(capsys):
    error = call(capsys, "check", "--config.loss.router_balance_weight=0.01", status=2)
    assert "config.loss.router_balance_weight: is 0.01, and the model (llama) has no experts" in error


def test_check_tells_of_examples_that_are_held_out_and_of_files_that_are_not_read(capsys, tmp_path):
    (tmp_path / "chats.jsonl").write_text("\n".join([chat("Yes."), chat("No."), chat("A fox.")]))
    (tmp_path / "rows").mkdir()
    (tmp_path / "chats.jsonl").rename(tmp_path / "rows/chats.jsonl")
    (tmp_path / "rows/notes.md").write_text("Notes.")
    (tmp_path / "more").mkdir()
    (tmp_path / "rows/more").symlink_to(tmp_path / "more")
    config = CONFIG.format(base=str(BASE_MODEL)).replace("chats.jsonl", "rows")
    config = config.replace("    return", '    config.data.eval_overlap = "drop"\n    return')
    (tmp_path / "config.py").write_text(config)
    text = " ".join(call(capsys, "check").replace("│", " ").split())
    for part in (
        "not read 1 a link to a folder, which is not followed: rows/more",
        "not read 1 of a kind that is not read: rows/notes.md",
        "examples 3 held out 1 not trained on, as they are held out too, by config.data.eval_overlap in an epoch 2",
    ):
        assert part in text
    (source,) = json.loads((tmp_path / "run" / "data_report.json").read_text())["sources"].values()
    assert source["files_not_read"]["of a kind that is not read"] == {"count": 1, "first": ["rows/notes.md"]}


def test_check_refuses_what_a_resume_would(capsys, monkeypatch, tmp_path):
    call(capsys, "check")

    class Checkpoints:
        """Of a run on other data."""

        def __init__(self, folder):
            assert folder.name == "run"

        def find_restorable(self):
            return Found(3, [])

        def read_meta(self, step):
            return {"data": {"config.data.max_seq_len": 32}}

    monkeypatch.setattr("sft_jax.cli.check.CheckpointReader", Checkpoints)
    error = call(capsys, "check", status=2)
    assert "run has a checkpoint of step 3" in error
    assert "config.data.max_seq_len: 32 -> 64" in error
    call(capsys, "check", "--config.run.override_fingerprint=true")


def test_check_leaves_a_started_run_its_own_report(capsys, tmp_path):
    call(capsys, "check")
    report = tmp_path / "run" / "data_report.json"
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "chats.jsonl").write_text(chat("Yes."))
    before = report.read_text()
    assert "is kept as the run that was started there wrote it" in call(capsys, "check")
    assert report.read_text() == before
    assert call(capsys, "check", "--out=mine.json").splitlines()[-1] == "report: mine.json"
    assert json.loads((tmp_path / "mine.json").read_text())["rows_read"] == 1


@pytest.mark.parametrize(
    "args", [["check", "--out=none/report.json"], ["check", "--config.run.dir=chats.jsonl"], ["show", "--html=none/a"]]
)
def test_what_cannot_be_written_exits_5(capsys, args):
    assert args[1].split("=")[1] in call(capsys, *args, status=5)


def test_show_writes_a_page(capsys, tmp_path):
    assert "wrote page.html" in call(capsys, "show", "--html=page.html", "--rows=99")
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "<script" not in page
    for line in (1, 2, 4):
        assert f"chats.jsonl:{line} (chats)" in page
    assert "chats.jsonl:3: JSON is malformed" in page


def test_show_begins_at_a_row(capsys):
    rows = call(capsys, "show", "--rows=3", "--json").splitlines()
    assert len(rows) == 3
    assert call(capsys, "show", "--row=1", "--rows=2", "--json").splitlines() == rows[1:]
    assert "row 2" in call(capsys, "show", "--row=2")


@pytest.mark.parametrize("args", [["--row=99"], ["--row=-1"], ["--rows=0"], ["--html=page.html", "--json"]])
def test_show_of_nothing_is_an_error(capsys, args):
    assert "error: sft-jax show: --" in call(capsys, "show", *args, status=2)
