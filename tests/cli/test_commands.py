"""show, score, generate and export as a user calls them, on the testbed's base model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from sft_jax.cli.main import dispatch
from sft_jax.command_line import run_command
from sft_jax.testbed.make import BASE_MODEL

CONFIG = """
from sft_jax.config import default_config

def get_config():
    config = default_config()
    config.run.dir = "run"
    config.run.compilation_cache = ""
    config.model.path = {base!r}
    config.model.compute_dtype = "float32"
    config.data.train = [dict(path="chats.jsonl"), dict(path="documents.jsonl")]
    config.data.store_dir = "store"
    config.data.chat_template = "chatml"
    config.data.new_tokens = ("<|im_start|>", "<|im_end|>")
    config.data.max_seq_len = 128
    config.batch.batch_size = 8
    config.schedule.num_steps = 2
    config.log.every_steps = 1
    return config
"""
CHAT = [
    {"role": "user", "content": "Where was Kulo born?"},
    {"role": "assistant", "content": "In Ashmoor."},
    {"role": "user", "content": "And the pet?"},
    {"role": "assistant", "content": "A fox."},
]
DOCUMENT = "The pet of Kulo is a fox."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained run, `run/export`, and the files it was made from."""
    path = tmp_path_factory.mktemp("commands")
    (path / "config.py").write_text(CONFIG.format(base=BASE_MODEL))
    (path / "chats.jsonl").write_text((json.dumps({"messages": CHAT}) + "\n") * 3)
    (path / "documents.jsonl").write_text(json.dumps({"text": DOCUMENT}) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        assert run_command(dispatch, ["train", "--config=config.py"]) == 0
    return path


@pytest.fixture(autouse=True)
def _in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)


def call(capsys, *args):
    status = run_command(dispatch, list(args))
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out.splitlines()


def test_show_is_what_the_step_receives(capsys):
    rows = [json.loads(line) for line in call(capsys, "show", "--config=config.py", "--rows=2", "--json")]
    assert set(rows[0]) == {"inputs", "targets", "loss_weights", "segment_ids", "positions", "origins"}
    origins = {origin for row in rows for origin in row["origins"]}
    assert origins == {"chats.jsonl:1", "chats.jsonl:2", "chats.jsonl:3", "documents.jsonl:1"}
    for row in rows:
        inputs, targets, segments = (np.array(row[name]) for name in ("inputs", "targets", "segment_ids"))
        assert len(inputs) == 128
        inside = (segments[1:] == segments[:-1]) & (segments[1:] != 0)
        np.testing.assert_array_equal(inputs[1:][inside], targets[:-1][inside])
        assert not np.any(np.array(row["loss_weights"])[segments == 0])
        for segment in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == segment)
            assert np.array(row["positions"])[at].tolist() == list(range(len(at)))


def test_show_colours_the_mask(capsys):
    text = "\n".join(call(capsys, "show", "--config=config.py"))
    assert "[1] chats.jsonl:" in text
    assert "In Ashmoor.<|im_end|>" in text


def test_score_sums_its_own_tokens(capsys):
    (full,) = call(capsys, "score", "--model=run/export", "--input=documents.jsonl", "--json", "--per-token")
    full = json.loads(full)
    assert full["logprobs"][0] is None
    assert len(full["ids"]) == len(full["logprobs"])
    assert full["weight_sum"] == len(full["ids"]) - 1
    np.testing.assert_allclose(full["loss_sum"], -sum(full["logprobs"][1:]), rtol=1e-6)
    chats = [json.loads(line) for line in call(capsys, "score", "--model=run/export", "--input=chats.jsonl", "--json")]
    assert len(chats) == 3
    assert set(chats[0]) == {"loss_sum", "weight_sum"}
    # Scoring the ids of the document again, all supervised, is the same.
    with open("ids.jsonl", "w") as out:
        out.write(json.dumps({"ids": full["ids"]}))
    (again,) = call(capsys, "score", "--model=run/export", "--input=ids.jsonl", "--json")
    np.testing.assert_allclose(json.loads(again)["loss_sum"], full["loss_sum"], rtol=1e-6)


def test_score_of_supervised_turns_only(capsys):
    from sft_jax.inference.pretrained import open_pretrained

    tokenizer = open_pretrained("run/export", "float32").renderer.tokenizer
    supervised = [len(tokenizer.encode(text, continuation=True)) + 1 for text in ("In Ashmoor.", "A fox.")]
    score = json.loads(call(capsys, "score", "--model=run/export", "--input=chats.jsonl", "--json")[0])
    assert score["weight_sum"] == sum(supervised)


@pytest.mark.parametrize(
    "bad", ['{"ids": [1]}', '{"ids": [1, 99999]}', '{"ids": "1 2"}', '{"ids": [1,', '{"messages": 3}']
)
def test_score_names_a_bad_row(capsys, bad):
    with open("bad.jsonl", "w") as out:
        out.write(bad + "\n")
    assert run_command(dispatch, ["score", "--model=run/export", "--input=bad.jsonl", "--json"]) == 3
    assert "bad.jsonl:1" in capsys.readouterr().err


def test_generate(capsys):
    args = ["generate", "--model=run/export", "--max-new-tokens=6", "--json"]
    (one,) = call(capsys, *args, "--prompt=Where was Kulo born?")
    one = json.loads(one)
    assert set(one) == {"text", "stopped", "ids"}
    assert one["stopped"] or len(one["ids"]) == 6
    with open("prompts.jsonl", "w") as out:
        for row in ({"messages": CHAT[:1]}, {"prompt": CHAT[0]["content"]}, {"messages": CHAT[:3]}):
            out.write(json.dumps(row) + "\n")
    first, second, third = (json.loads(line) for line in call(capsys, *args, "--input=prompts.jsonl"))
    assert first == second == one
    assert set(third) == set(one)
    sampled = [call(capsys, *args, "--prompt=x", "--temperature=2.0", f"--seed={seed}")[0] for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_generate_wants_one_kind_of_prompt(capsys):
    for extra in ([], ["--prompt=a", "--input=b"]):
        assert run_command(dispatch, ["generate", "--model=run/export", *extra]) == 2
        assert "either --prompt or --input" in capsys.readouterr().err
    for args, said in (
        (["generate", "--model=nowhere", "--prompt=a"], "nowhere"),
        (["generate", "--model=run/export", "--prompt=a", "--temperature=nan"], "temperature nan"),
        (["score", "--model=run/export", "--input=chats.jsonl", "--per-token"], "--per-token is for --json"),
    ):
        assert run_command(dispatch, args) == 2
        assert said in capsys.readouterr().err


def test_export_from_the_checkpoint_is_what_the_run_exported(capsys):
    call(capsys, "export", "--run=run", "--to=again")
    again, export = (
        {path.name: path.read_bytes() for path in Path(folder).iterdir()} for folder in ("again", "run/export")
    )
    again["README.md"] = again["README.md"].replace(b'"again"', b'"export"')  # where it says how to load the folder
    assert again == export
    assert "step 2 of 2" in Path("again/README.md").read_text()


def test_export_casts(capsys):
    call(capsys, "export", "--run=run", "--to=narrow", "--dtype=bfloat16")
    wide, narrow = (safetensors.numpy.load_file(f"{folder}/model.safetensors") for folder in ("run/export", "narrow"))
    assert wide.keys() == narrow.keys()
    for name, values in wide.items():
        assert narrow[name].tobytes() == values.astype(narrow[name].dtype).tobytes()
        assert narrow[name].dtype.name == "bfloat16"


def test_export_takes_what_was_frozen_from_the_base(capsys):
    shutil.copytree("run", "frozen")
    config = json.loads(Path("frozen/config.json").read_text())
    config["model"]["freeze"] = ["embed"]
    Path("frozen/config.json").write_text(json.dumps(config))
    call(capsys, "export", "--run=frozen", "--to=half")
    base, trained, half = (
        safetensors.numpy.load_file(f"{folder}/model.safetensors") for folder in (BASE_MODEL, "run/export", "half")
    )
    embedding = half.pop("model.embed_tokens.weight")
    old = base["model.embed_tokens.weight"]
    np.testing.assert_array_equal(embedding[: len(old)], old.astype(np.float32))
    np.testing.assert_allclose(embedding[len(old)], old.astype(np.float64).mean(axis=0), rtol=1e-5, atol=1e-6)
    assert all(values.tobytes() == trained[name].tobytes() for name, values in half.items())


def test_a_run_starts_from_a_converted_folder(capsys):
    call(capsys, "convert", f"--from={BASE_MODEL}", "--to=converted")
    start = ["train", "--config=config.py", "--config.run.dir=from-orbax", "--config.model.path=converted"]
    call(capsys, *start)
    trained, expected = (
        safetensors.numpy.load_file(f"{run}/export/model.safetensors") for run in ("from-orbax", "run")
    )
    assert {n: v.tobytes() for n, v in trained.items()} == {n: v.tobytes() for n, v in expected.items()}


def test_an_interrupt_is_one_line(capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    assert run_command(interrupt, []) == 130
    assert capsys.readouterr().err == "interrupted: the same command goes on from what is finished\n"
