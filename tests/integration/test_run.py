"""Whole runs in processes of their own: killed, told to stop, resumed, exported. Eight devices each."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from sft_jax.testbed.make import BASE_MODEL

NUM_STEPS = 50
CONFIG = """
from sft_jax.config import default_config

def get_config():
    config = default_config()
    config.run.dir = {run_dir!r}
    config.run.compilation_cache = {cache!r}
    config.model.preset = "testbed"
    config.model.overrides = dict(
        num_layers=2, embed_dim=32, mlp_dim=64, num_heads=4, num_kv_heads=4, head_dim=8, max_position=64
    )
    config.model.compute_dtype = "float32"
    config.model.neftune_alpha = 5.0
    config.data.tokenizer = {tokenizer!r}
    config.data.chat_template = "chatml"
    config.data.new_tokens = ("<|im_start|>", "<|im_end|>")
    config.data.train = [dict(path={data!r}, name="chats")]
    config.data.eval = [dict(path={data!r}, name="held_out")]
    config.data.eval_overlap = "keep"
    config.data.store_dir = {store!r}
    config.data.max_seq_len = 128
    config.batch.batch_size = 16
    config.batch.grad_accum_steps = 2
    config.optimizer.learning_rate = 1e-3
    config.schedule.num_steps = {num_steps}
    config.evaluation.every_steps = 10
    config.checkpoint.every_steps = 7
    config.checkpoint.best_by = "held_out"
    config.mesh.fsdp = 4
    config.mesh.replica = -1
    config.log.every_steps = 1
    return config
"""


def write_chats(path, count=300):
    rng = np.random.default_rng(0)
    words = ["the", "town", "of", "Foxholm", "has", "a", "beaver", "and", "an", "old", "flute"]
    say = lambda: " ".join(rng.choice(words, rng.integers(2, 12)))  # noqa: E731
    with path.open("w") as out:
        for _ in range(count):
            turns = [(role, say()) for role in ("user", "assistant") * int(rng.integers(1, 3))]
            out.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A function: name of a run -> its config file; runs share data, store and compilation cache."""
    root = tmp_path_factory.mktemp("world")
    write_chats(root / "chats.jsonl")

    def write_config(name):
        path = root / f"{name}.py"
        fields = dict(run_dir=root / name, cache=root / "cache", data=root / "chats.jsonl", store=root / "store")
        strings = {key: str(value) for key, value in fields.items()}
        path.write_text(CONFIG.format(**strings, tokenizer=BASE_MODEL, num_steps=NUM_STEPS))
        return path

    return write_config


def start(config, *overrides):
    command = [sys.executable, "-m", "sft_jax.main", f"--config={config}", *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)


def finish(process, expected=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == expected, f"exit {process.returncode}\n{out[-2000:]}\n{err[-4000:]}"
    return out, err


def records(config):
    path = config.with_suffix("") / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def losses(config):
    """Step -> the bits of its loss, and of each held-out loss."""
    bits = {}
    for record in records(config):
        for name, value in record.items():
            if name == "loss" or name.startswith("eval/"):
                bits[record["step"], name] = value.hex()
    return bits


def signal_at(process, config, step, number):
    """Send a signal as soon as the log shows `step`."""
    deadline = time.monotonic() + 240
    while not any(record["step"] >= step and "loss" in record for record in records(config)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)


def saved_steps(config):
    return sorted(int(path.name) for path in (config.with_suffix("") / "checkpoints").iterdir() if path.name.isdigit())


@pytest.fixture(scope="module")
def uninterrupted(world):
    config = world("uninterrupted")
    finish(start(config))
    return config


def assert_same_run(config, other):
    assert len([key for key in losses(other) if key[1] == "loss"]) == NUM_STEPS
    assert losses(config) == losses(other)
    ours, theirs = (load_file(path.with_suffix("") / "export" / "model.safetensors") for path in (config, other))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_killed_three_times_equals_uninterrupted_bit_for_bit(world, uninterrupted):
    config = world("killed")
    for step in (12, 23, 38):
        process = start(config)
        signal_at(process, config, step, signal.SIGKILL)
        finish(process, -signal.SIGKILL)
        assert saved_steps(config)
        assert max(saved_steps(config)) < NUM_STEPS
    finish(start(config))
    assert_same_run(config, uninterrupted)


def test_run_directory(uninterrupted):
    run = uninterrupted.with_suffix("")
    names = {path.name for path in run.iterdir()}
    files = {
        "config.json",
        "provenance.json",
        "data_report.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "export",
    }
    assert files <= names
    assert [str(path) for path in [run, *run.rglob("*")] if path.stat().st_mode & 0o077] == []
    report = json.loads((run / "data_report.json").read_text())
    assert report["rows_read"] == report["rows_trained"] + report["rows_bad"] + report["rows_dropped"] == 300
    first = records(uninterrupted)[0]
    assert first["step"] == 0
    assert {"eval/held_out/loss", "eval/held_out/accuracy"} < set(first)
    last = next(record for record in reversed(records(uninterrupted)) if "loss" in record)
    assert last["loss"] < next(record for record in records(uninterrupted) if "loss" in record)["loss"]
    names = {"learning_rate", "grad_norm", "weight_sum", "tokens_per_second", "supervised_tokens_per_second"}
    assert names | {"padding_fraction", "accuracy"} < set(last)
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["libraries"]["jax"]
    assert provenance["devices"]["count"] == 8


def test_a_finished_run_is_left_alone(uninterrupted):
    before = losses(uninterrupted), saved_steps(uninterrupted)
    finish(start(uninterrupted))
    assert (losses(uninterrupted), saved_steps(uninterrupted)) == before


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("--config.run.seed=1", "seed: 0 -> 1"),
        ("--config.batch.batch_size=32", "batch_size: 16 -> 32"),
        ("--config.optimizer.name=lion", "config.optimizer.name: adamw -> lion"),
        ("--config.model.freeze=('norm',)", "config.model.freeze: [] -> ['norm']"),
        ("--config.schedule.num_steps=20", "asks for 20 steps"),
    ],
)
def test_resuming_with_other_data_is_refused(uninterrupted, override, named):
    files = [uninterrupted.with_suffix("") / name for name in ("config.json", "data_report.json")]
    before = [path.read_text() for path in files]
    _, err = finish(start(uninterrupted, override), 2)
    assert named in err
    assert [path.read_text() for path in files] == before
    assert "Traceback" not in err


def test_export_of_an_earlier_step(uninterrupted, tmp_path):
    run = uninterrupted.with_suffix("")
    step = saved_steps(uninterrupted)[0]
    for name, args in (("last", []), ("earlier", [f"--step={step}"])):
        command = [sys.executable, "-m", "sft_jax.cli.export", f"--run={run}", f"--to={tmp_path / name}", *args]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    last, earlier, exported = (
        load_file(Path(folder) / "model.safetensors")
        for folder in (tmp_path / "last", tmp_path / "earlier", run / "export")
    )
    for name in exported:
        np.testing.assert_array_equal(last[name], exported[name])
    assert any(not np.array_equal(last[name], earlier[name]) for name in last)


def test_frozen_parameters_survive_training_resuming_and_export(world):
    config = world("frozen")
    args = ["--config.model.freeze=('norm', 'mlp.(gate|up|down)')", "--config.schedule.name=constant"]
    finish(start(config, *args, "--config.schedule.num_steps=7"))
    first = load_file(config.with_suffix("") / "export" / "model.safetensors")
    finish(start(config, *args, "--config.schedule.num_steps=14"))
    last = load_file(config.with_suffix("") / "export" / "model.safetensors")
    for name in first:
        frozen = "norm" in name or "mlp" in name
        assert np.array_equal(first[name], last[name]) == frozen, name


def test_early_stopping_is_said_and_remembered_and_a_profile_is_written(world):
    config = world("early")
    args = [
        "--config.evaluation.stop_by=held_out",
        "--config.optimizer.learning_rate=0.0",
        "--config.log.profile_steps=(3,4)",
    ]
    out, _ = finish(start(config, *args))
    assert "warning: config.data.max_seq_len: is 128, and the model was made for texts of 64 tokens" in out
    assert "stopped early at step 30" in out  # evaluated at 0, 10, 20, 30; none better than the first
    assert saved_steps(config)[-1] == max(record["step"] for record in records(config)) == 30
    assert list((config.with_suffix("") / "profile").rglob("*.xplane.pb"))
    out, _ = finish(start(config, *args))
    assert "stopped early at step 30" in out
