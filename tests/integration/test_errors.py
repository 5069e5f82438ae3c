"""What a user gets wrong: each gives one message that says what, where and how to mend it, and its own exit status."""

import json

import pytest

from sft_jax.cli.main import dispatch
from sft_jax.command_line import run_command
from sft_jax.testbed.make import BASE_MODEL

GOOD_ROW = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The pet is a fox."}]}
TEXT = json.dumps(GOOD_ROW)
CONFIG = """
from sft_jax.config import default_config

def get_config():
    config = default_config()
    config.run.dir = "run"
    config.run.compilation_cache = ""
    config.model.path = {base!r}
    config.data.train = [dict(path="chats.jsonl")]
    config.data.store_dir = "store"
    config.data.chat_template = "chatml"
    config.data.new_tokens = ("<|im_start|>", "<|im_end|>")
    config.data.max_seq_len = 128
    return config
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.py").write_text(CONFIG.format(base=BASE_MODEL))
    (tmp_path / "chats.jsonl").write_text(f"{TEXT}\n{TEXT}\n")
    return tmp_path


def run(capsys, *args, command="check"):
    status = run_command(dispatch, [command, "--config=config.py", *args])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.err


def test_a_good_config_passes(folder, capsys):
    assert run(capsys) == (0, "")


def test_what_a_check_writes_in_a_run_is_for_its_owner_alone(folder, capsys):
    assert run(capsys) == (0, "")
    written = [folder / "run", folder / "run" / "data_report.json"]
    assert [oct(path.stat().st_mode & 0o777) for path in written] == ["0o700", "0o600"]


@pytest.mark.parametrize("command", ["check", "show", "train"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.data.tokeniser=x", "config.data has no tokeniser. Did you mean tokenizer?"),
        ("--config.batch.batch_size=many", "many"),
        ("--config.batch.grad_accum_steps=7", "config.batch.grad_accum_steps: 7 does not divide batch_size 64"),
        ("--config.batch.grad_accum_steps=0", "config.batch.grad_accum_steps: is 0; expected at least 1"),
        ("--config.optimizer.b2=-1.0", "config.optimizer.b2: is -1.0; expected at least 0"),
        ("--config.model.freeze=('[',)", "config.model.freeze: '[' is no regular expression"),
        (
            "--config.lora.targets=('(?i)Q_proj|K',)",
            "config.lora.targets: '(?i)Q_proj|K' sets flags for more than itself. Write '(?i:Q_proj|K)'.",
        ),
        ("--config.data.train[3].path=x", "IndexError"),
        ("--config.run.dir=", "config.run.dir: is empty"),
        ("--config.model.path=nowhere", "nowhere"),
        ("--config.data.chat_template=nowhere.jinja", "nowhere.jinja"),
        ("--config.data.tokenizer=nowhere", "nowhere"),
    ],
)
def test_config_errors_exit_2(folder, capsys, command, override, message):
    status, err = run(capsys, override, command=command)
    assert (status, err.startswith("error: ")) == (2, True), err
    assert message in err


@pytest.mark.parametrize("command", ["check", "train"])
def test_a_folder_that_is_not_the_preset(folder, capsys, command):
    status, err = run(capsys, "--config.model.preset=llama3.1-8b", command=command)
    assert status == 2
    assert "is not a llama3.1-8b" in err


def test_missing_config_file(folder, capsys):
    assert run_command(dispatch, ["train", "--config=none.py"]) == 2
    assert "none.py: no such file" in capsys.readouterr().err
    assert run_command(dispatch, ["trian"]) == 2
    assert "no such command. Known: train" in capsys.readouterr().err


def test_missing_data_file(folder, capsys):
    (folder / "chats.jsonl").unlink()
    status, err = run(capsys)
    assert status == 3
    assert "config.data.train[0].path" in err
    assert "chats.jsonl" in err


def turns(*roles, content="x"):
    return json.dumps({"messages": [{"role": role, "content": content} for role in roles]})


@pytest.mark.parametrize(
    ("line", "reason", "said"),
    [
        ('{"messages": [', "malformed_json", "chats.jsonl:2"),
        (turns("user", "bot"), "unknown_role", "config.data.role_map"),
        ('{"messages": []}', "empty_conversation", "chats.jsonl:2"),
        (turns("user"), "no_assistant_turn", "chats.jsonl:2"),
        (turns("user", "assistant", content="fox " * 200), "too_long", "config.data.max_seq_len"),
    ],
)
def test_bad_rows_exit_3_and_are_counted_once_allowed(folder, capsys, line, reason, said):
    (folder / "chats.jsonl").write_text(f"{TEXT}\n{line}\n{TEXT}\n")
    status, err = run(capsys)
    assert status == 3
    assert "1 of 3 rows of chats.jsonl are bad" in err
    assert reason in err
    assert said in err
    assert run(capsys, "--config.data.max_bad_fraction=0.4") == (0, "")


def test_a_file_without_any_supervised_token(folder, capsys):
    (folder / "chats.jsonl").write_text(turns("user") + "\n")
    status, err = run(capsys, "--config.data.max_bad_fraction=1.0")
    assert status == 3
    assert "chats.jsonl" in err


def test_batch_that_does_not_divide_over_the_devices(folder, capsys):
    status, err = run(capsys, "--config.batch.batch_size=6", command="train")
    assert status == 2
    assert "Choose a multiple of 8" in err


def test_too_many_non_finite_steps_exit_4(folder, capsys):
    args = [
        "--config.optimizer.learning_rate=1e38",
        "--config.optimizer.grad_clip_norm=0.0",
        "--config.batch.batch_size=8",
    ]
    args += ["--config.optimizer.max_skipped_steps=2", "--config.schedule.num_steps=20", "--config.optimizer.name=sgd"]
    status, err = run(capsys, *args, "--config.model.compute_dtype=float32", command="train")
    assert status == 4, err
    assert "config.optimizer.max_skipped_steps = 2" in err


def test_a_freeze_pattern_must_find_something(folder, capsys):
    cases = {
        "nothing": "'nothing' finds no parameter",
        "embed|mlps": "'mlps', a part of 'embed|mlps', finds no parameter",
        ".*": "leaves no parameter to train",
    }
    for pattern, message in cases.items():
        args = [f"--config.model.freeze=('{pattern}',)", "--config.batch.batch_size=8"]
        status, err = run(capsys, *args, command="train")
        assert (status, message in err) == (2, True), err


def test_a_run_dir_that_is_a_file(folder, capsys):
    status, err = run(capsys, "--config.run.dir=chats.jsonl", "--config.checkpoint.export=false", command="train")
    assert status == 5
    assert "config.run.dir: chats.jsonl" in err


@pytest.mark.parametrize(
    "body", ["1 / 0", "raise SystemExit(3)", "x = 1", "def get_config(): return 3", "import nothing"]
)
def test_a_config_file_that_does_not_run(folder, capsys, body):
    (folder / "config.py").write_text(body)
    status, err = run(capsys)
    assert status == 2
    assert "--config=config.py: " in err


def test_debug_raises_instead(folder):
    from sft_jax.datatypes import ConfigError

    with pytest.raises(ConfigError):
        run_command(dispatch, ["check", "--config=none.py", "--debug"])


@pytest.mark.parametrize("command", ["render", "show", "check", "generate", "score", "export", "train", "demo"])
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        run_command(dispatch, [command, "--help"])
    assert stop.value.code == 0
    assert "example: " in capsys.readouterr().out
