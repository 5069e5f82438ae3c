"""Real input, end to end: TinyStories-656K on Open Assistant and self-instruct, resumed, exported. Needs the assets."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from sft_jax.cli.main import dispatch
from sft_jax.command_line import run_command
from sft_jax.testbed import real_data

CONFIG = Path(__file__).parents[2] / "configs" / "tinystories.py"
NUM_STEPS = 24


@pytest.fixture(scope="module")
def trained(tmp_path_factory, assets):
    """A folder with `run/`, trained in one go."""
    folder = tmp_path_factory.mktemp("tinystories")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run_command(real_data.main, [f"--assets={assets}", "--to=build/tinystories"]) == 0
        assert train() == 0
    return folder


def train(*overrides):
    options = {"run.dir": "run", "run.compilation_cache": "", "data.store_dir": "store", "log.every_steps": 1}
    options |= {"schedule.num_steps": NUM_STEPS, "evaluation.every_steps": 8, "mesh.fsdp": 4, "mesh.replica": 1}
    options |= {"mesh.tensor": 2, "checkpoint.every_steps": 10}
    args = [f"--config.{name}={value}" for name, value in options.items()]
    return run_command(dispatch, ["train", f"--config={CONFIG}", *args, *overrides])


def records(folder):
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["oasst", "self_instruct"])
def test_held_out_loss_falls(trained, name):
    losses = [record[f"eval/{name}/loss"] for record in records(trained) if f"eval/{name}/loss" in record]
    assert len(losses) == 1 + NUM_STEPS // 8
    assert losses[-1] < losses[0] - 0.3


def test_rows_it_cannot_say_are_dropped_and_counted(trained):
    report = json.loads((trained / "run" / "data_report.json").read_text())
    assert report["rows_read"] == report["rows_trained"] + report["rows_bad"] + report["rows_dropped"]
    for source in report["sources"].values():
        assert source["dropped"]["unknown_token"]["count"] > 10
        assert source["dropped"]["unknown_token"]["first"][0]["origin"].startswith(source["path"] + ":")
    assert report["rows_trained"] > 100


def test_both_sources_are_reported(trained):
    names = {name for record in records(trained) for name in record if name.startswith("train/")}
    assert names == {f"train/{name}/{what}" for name in ("oasst", "self_instruct") for what in ("loss", "accuracy")}


def test_resumes_where_it_was(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    shutil.rmtree("run/checkpoints/24")
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["20"]
    assert train() == 0
    bits = [{r["step"]: r["loss"].hex() for r in records(path) if "loss" in r} for path in (trained, tmp_path / "copy")]
    assert bits[0] == bits[1]
    before, after = (load_file(path / "run/export/model.safetensors") for path in (trained, tmp_path / "copy"))
    for key in before:
        np.testing.assert_array_equal(before[key], after[key])


def test_step_0_is_the_pretrained_model(assets, tmp_path, capsys):
    expected = json.loads((assets / "models/TinyStories-656K/expected.json").read_text())
    (tmp_path / "ids.jsonl").write_text(json.dumps({"ids": expected["prompt_ids"]}))
    args = [f"--model={assets}/models/TinyStories-656K", f"--input={tmp_path}/ids.jsonl", "--json", "--per-token"]
    assert run_command(dispatch, ["score", *args]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["ids"] == expected["prompt_ids"]
    got, wanted = scored["logprobs"][1:], expected["next_token_logprobs"]
    np.testing.assert_allclose(got, wanted[: len(got)], atol=1e-4)


@pytest.mark.parity
def test_export_has_the_same_logits_in_transformers(trained):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from sft_jax.inference.pretrained import open_pretrained
    from sft_jax.model.transformer import forward, output_head

    model, info = transformers.AutoModelForCausalLM.from_pretrained(trained / "run/export", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ours = open_pretrained(str(trained / "run/export"), "float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained / "run/export")
    chat = [{"role": "user", "content": "What is a dog?"}]
    ids = tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=True)["input_ids"]
    from sft_jax.datatypes import Message

    assert ids == ours.renderer.prompt_ids([Message("user", "What is a dog?")])
    row = jnp.asarray([ids])
    positions, segments = jnp.arange(len(ids))[None], jnp.ones_like(row)
    hidden = forward(
        ours.params, ours.config, row, positions, segments, compute_dtype="float32", remat="none", attention="reference"
    )
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(hidden @ output_head(ours.params).T, theirs, atol=1e-4)
