"""A LoRA run on the testbed's base model as a user makes one: trained, resumed, exported both ways."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sft_jax.checkpoint.reader import CheckpointReader
from sft_jax.cli.main import dispatch
from sft_jax.command_line import run_command
from sft_jax.testbed.make import BASE_MODEL

CONFIG = """
from sft_jax.config import default_config

def get_config():
    config = default_config()
    config.run.dir = "run"
    config.run.compilation_cache = ""
    config.model.path = "base"
    config.model.compute_dtype = "float32"
    config.lora.rank = 4
    config.lora.targets = ("q_proj", "down_proj")
    config.lora.modules_to_save = ("embed_tokens",)
    config.lora.quantize = "nf4"
    config.lora.dropout = 0.1
    config.data.train = [dict(path="chats.jsonl")]
    config.data.store_dir = "store"
    config.data.chat_template = "chatml"
    config.data.new_tokens = ("<|im_start|>", "<|im_end|>")
    config.data.max_seq_len = 64
    config.batch.batch_size = 8
    config.schedule.name = "constant"
    config.schedule.num_steps = 4
    config.schedule.warmup_steps = 0
    config.checkpoint.every_steps = 2
    config.log.every_steps = 1
    return config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run of four steps, `run`, and another, `half`, of two."""
    path = tmp_path_factory.mktemp("adapters")
    (path / "config.py").write_text(CONFIG)
    shutil.copytree(BASE_MODEL, path / "base")
    (path / "base" / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 9}')
    with (path / "chats.jsonl").open("w") as file:
        for i in range(40):
            turns = [("user", f"Where was Kulo {i} born?"), ("assistant", f"In Ashmoor, house {i}.")]
            file.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        assert run_command(dispatch, ["train", "--config=config.py"]) == 0
        half = ["--config.run.dir=half", "--config.schedule.num_steps=2"]
        assert run_command(dispatch, ["train", "--config=config.py", *half]) == 0
    return path


@pytest.fixture(autouse=True)
def _in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)


def call(capsys, *args):
    status = run_command(dispatch, list(args))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def read_adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_checkpoints_hold_what_trains_and_nothing_else(folder):
    reader = CheckpointReader(folder / "run")
    assert all(reader.read_meta(step) for step in (2, 4))
    meta = reader.read_meta(4)["model"]
    assert meta["config.lora.rank"] == 4
    assert len(meta["weights in config.model.path"]) == 64
    reader.close()
    saved = sum(file.stat().st_size for file in (folder / "run" / "checkpoints" / "4").rglob("*") if file.is_file())
    trained = sum(values.nbytes for values in read_adapter(folder / "run" / "adapter").values())
    assert saved < 3.5 * trained  # with both moments of Adam; embed_tokens is in the adapter twice
    fields = json.loads((folder / "run" / "adapter" / "adapter_config.json").read_text())
    assert fields["target_modules"] == ["down_proj", "q_proj"]
    assert fields["modules_to_save"] == ["lm_head", "model.embed_tokens"]
    assert fields["base_model_name_or_path"] == "base"


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(folder, capsys):
    shutil.copytree("half", "resumed")
    status, out, err = call(capsys, "train", "--config=config.py", "--config.run.dir=resumed")
    assert status == 0, err
    assert "resumed     at step 2 of 4" in out
    expected, found = (read_adapter(folder / name / "adapter") for name in ("run", "resumed"))
    assert all(np.array_equal(found[name], values) for name, values in expected.items())
    assert any(name.endswith("lora_B.weight") and np.any(values) for name, values in found.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--config.lora.rank=8", "config.lora.rank: 4 -> 8"),
        ("--config.lora.quantize=int8", "config.lora.quantize: nf4 -> int8"),
        ("--config.model.path=other", "weights in config.model.path: its content changed"),
    ],
)
def test_another_base_or_adapter_is_refused(folder, capsys, change, message):
    if not (folder / "other").exists():
        shutil.copytree("base", "other")
        tensors = load_file("other/model.safetensors")
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.01
        save_file(tensors, "other/model.safetensors", {"format": "pt"})
    more = ["--config.data.tokenizer=base", "--config.schedule.num_steps=6", change]
    status, _, err = call(capsys, "train", "--config=config.py", *more)
    assert status == 2
    assert message in err


def test_export_gives_the_adapter_or_the_merged_model(folder, capsys):
    config = folder / "run" / "config.json"
    there = config.read_text()
    fields = json.loads(there)
    fields["mesh"]["fsdp"] = 64  # the run's devices are not needed
    config.write_text(json.dumps(fields))
    try:
        assert call(capsys, "export", "--run=run", "--to=adapter", "--step=4", "--adapter")[0] == 0
    finally:
        config.write_text(there)
    assert call(capsys, "export", "--run=run", "--to=merged", "--merge")[0] == 0
    expected = read_adapter(folder / "run" / "adapter")
    assert all(np.array_equal(values, expected[name]) for name, values in read_adapter(folder / "adapter").items())
    merged, base = (load_file(folder / name / "model.safetensors") for name in ("merged", "base"))
    assert merged.keys() == base.keys()
    for name in ("merged", "run/export"):
        generation = json.loads((folder / name / "generation_config.json").read_text())
        assert generation["temperature"] == 0.6
        assert 9 not in generation["eos_token_id"]
    assert 'from_pretrained("export"' in (folder / "run" / "export" / "README.md").read_text()
    card = (folder / "merged" / "README.md").read_text()
    assert 'from_pretrained("merged"' in card
    assert "the base, its kernels in nf4, but for adapters that are merged here: LoRA of rank 4, alpha 16, on" in card
    changed = {name.split(".", 3)[-1] for name in base if not np.array_equal(merged[name], base[name])}
    assert "self_attn.q_proj.weight" in changed
    np.testing.assert_array_equal(merged["model.norm.weight"], base["model.norm.weight"])
    assert call(capsys, "generate", "--model=merged", "--prompt=Where?", "--max-new-tokens=3")[0] == 0


@pytest.mark.parametrize("part", ["--merge", "--adapter"])
def test_export_refuses_another_base(folder, capsys, part):
    tensors = load_file("base/model.safetensors")
    try:
        changed = tensors | {"model.norm.weight": tensors["model.norm.weight"] * 1.01}
        save_file(changed, "base/model.safetensors", {"format": "pt"})
        status, _, err = call(capsys, "export", "--run=run", "--to=wrong", part)
    finally:
        save_file(tensors, "base/model.safetensors", {"format": "pt"})
    assert status == 2
    assert "config.model.path: base is not the model that run trained" in err
    assert "weights in config.model.path: its content changed" in err
    assert not (folder / "wrong").exists()


def test_a_base_whose_config_has_changed_is_refused(folder, capsys):
    path = folder / "base" / "config.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(before) | {"rms_norm_eps": 0.25}))
        exported = call(capsys, "export", "--run=run", "--to=wrong", "--merge")
        resumed = call(capsys, "train", "--config=config.py", "--config.schedule.num_steps=9")
    finally:
        path.write_text(before)
    for status, _, err in (exported, resumed):
        assert status == 2
        assert "rms_norm_eps of the model: " in err
        assert "-> 0.25" in err


@pytest.mark.parametrize(("key", "value"), [("init_lora_weights", "pissa"), ("kasa_config", {"beta": 1})])
def test_adapters_that_change_the_base_are_refused(folder, capsys, key, value):
    shutil.copytree("run/adapter", f"with_{key}")
    path = folder / f"with_{key}" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    more = ["--config.run.dir=no", f"--config.lora.init_from=with_{key}"]
    status, _, err = call(capsys, "train", "--config=config.py", *more)
    assert status == 2
    assert f"{key} is {value!r}; only" in err


def test_a_run_goes_on_from_a_folder(folder, capsys):
    more = ["--config.run.dir=third", "--config.lora.init_from=run/adapter", "--config.schedule.num_steps=1"]
    status, _, err = call(capsys, "train", "--config=config.py", *more)
    assert status == 0, err
    first, then = (read_adapter(folder / name / "adapter") for name in ("run", "third"))
    moved = [np.linalg.norm(then[name] - first[name]) / np.linalg.norm(first[name]) for name in first]
    assert 0 < max(moved) < 0.5  # a fourth of the steps
    status, _, err = call(capsys, "train", "--config=config.py", *more, "--config.lora.alpha=4", "--config.run.dir=no")
    assert status == 2
    assert "config.lora.alpha: is 4.0, and run/adapter/adapter_config.json has lora_alpha 16.0" in err


def test_what_is_no_adapter_run_has_none_to_export(folder, capsys):
    config = json.loads((folder / "run" / "config.json").read_text())
    (folder / "plain").mkdir()
    config["lora"] = {}
    (folder / "plain" / "config.json").write_text(json.dumps(config))
    shutil.copytree("run/checkpoints", "plain/checkpoints")
    status, _, err = call(capsys, "export", "--run=plain", "--to=none", "--adapter")
    assert status == 2
    assert "has no adapter (config.lora.rank is 0)" in err
