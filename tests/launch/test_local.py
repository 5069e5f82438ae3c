"""`launch/local.py`: several processes train as one does, go on as another number of them, and end together."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from local import LocalProcesses, process_env, worst_status

from sft_jax.testbed.make import BASE_MODEL

DISTRIBUTED = "--config.run.distributed=true"
ROOT = Path(__file__).parents[2]
CONFIG = """
from sft_jax.config import default_config

def get_config():
    config = default_config()
    config.run.compilation_cache = {cache!r}
    config.model.preset = "testbed"
    config.model.overrides = dict(num_layers=1, embed_dim=16, mlp_dim=32, num_heads=2, num_kv_heads=2, head_dim=8)
    config.model.compute_dtype = "float32"
    config.data.tokenizer = {tokenizer!r}
    config.data.chat_template = "chatml"
    config.data.new_tokens = ("<|im_start|>", "<|im_end|>")
    config.data.train = [dict(path={data!r})]
    config.data.store_dir = {store!r}
    config.data.max_seq_len = 64
    config.data.prepare_processes = 1
    config.batch.batch_size = 8
    config.optimizer.learning_rate = 1e-3
    config.schedule.name = "constant"
    config.schedule.num_steps = 6
    config.mesh.fsdp = 2
    config.mesh.replica = -1
    config.checkpoint.every_steps = 2
    config.checkpoint.export = False
    config.log.tensorboard = False
    config.log.every_steps = 1
    return config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    rows = [{"prompt": f"the fox {i}", "completion": f"has {'an old ' * (i % 5)}flute {i}"} for i in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = dict(cache=folder / "cache", tokenizer=BASE_MODEL, data=folder / "rows.jsonl", store=folder / "store")
    (folder / "config.py").write_text(CONFIG.format(**{name: str(place) for name, place in places.items()}))
    return folder


def start(folder, run, processes, devices, *args, **popen):
    command = [sys.executable, "launch/local.py", f"--processes={processes}", f"--devices={devices}"]
    command += [f"--config={folder}/config.py", f"--config.run.dir={folder}/{run}", *args]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes, **popen)


def train(folder, run, processes, devices, *args):
    process = start(folder, run, processes, devices, *args)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def losses(folder, run):
    lines = (folder / run / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


def assert_same_losses(folder, run, reference, num_steps):
    got, expected = losses(folder, run), losses(folder, reference)
    assert list(got) == list(expected) == list(range(1, num_steps + 1))
    assert got == pytest.approx(expected, rel=1e-6)
    assert len(set(expected.values())) == num_steps


def test_two_processes_train_as_one_does_and_one_goes_on_from_them(folder):
    status, out, err = train(folder, "one", 1, 4)
    assert status == 0, err
    status, out, err = train(folder, "two", 2, 2, "--config.schedule.num_steps=4")
    assert status == 0, err
    assert "[0] mesh        replica 2, fsdp 2 (cpu)" in out
    status, out, err = train(folder, "two", 1, 4)
    assert status == 0, err
    assert "[0] resumed     at step 4 of 6" in out
    assert_same_losses(folder, "two", "one", 6)


@pytest.mark.slow
def test_any_split_of_eight_devices_is_the_same_run(folder):
    """2 x 4 is stopped on its way, and 4 x 2 goes on."""
    steps = "--config.schedule.num_steps=40"
    for run, processes, devices in (("1x8", 1, 8), ("2x4", 2, 4), ("4x2", 4, 2)):
        status, _, err = train(folder, run, processes, devices, steps)
        assert status == 0, err
    process = start(folder, "mixed", 2, 4, steps)
    while not (folder / "mixed" / "metrics.jsonl").exists() or len(losses(folder, "mixed")) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, out + err
    assert "[0] preempted: stopped at step" in err
    assert "[1] preempted: stopped at step" in err
    assert len(losses(folder, "mixed")) < 40
    status, out, err = train(folder, "mixed", 4, 2, steps)
    assert status == 0, err
    assert "[0] resumed     at step" in out
    for run in ("2x4", "4x2", "mixed"):
        assert_same_losses(folder, run, "1x8", 40)


def test_an_error_of_all_is_the_status(folder):
    status, _, err = train(folder, "wrong", 2, 2, "--config.batch.batch_size=0")
    assert status == 2
    assert "[0] error: config.batch.batch_size" in err
    assert not (folder / "wrong").exists()


# What follows needs no jax: processes that do one thing each.


def run_scripts(grace_seconds, *scripts, stop_after=None):
    stop = threading.Event()
    processes = LocalProcesses(
        [sys.executable, "-c", "import os; exec(os.environ['SCRIPT'])"], [{"SCRIPT": script} for script in scripts]
    )
    if stop_after:
        threading.Timer(0.1, lambda: (stop_after(), stop.set())).start()
    return processes.wait(stop, grace_seconds)


SAVES = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
pathlib.Path(r'{ready}').touch()
time.sleep(60)
"""
SLEEPS = "import time; time.sleep(60)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEPS}; print('not killed')"


def test_output_has_the_number_of_its_process(capfd):
    assert run_scripts(5, "print('a\\nb')", "import sys; print('c', file=sys.stderr)") == 0
    out, err = capfd.readouterr()
    assert out.splitlines() == ["[0] a", "[0] b"]
    assert err.splitlines() == ["[1] c"]


@pytest.mark.parametrize("others", [SLEEPS, STUBBORN], ids=["sleeping", "ignores SIGTERM"])
def test_where_one_fails_all_end_with_its_status(others, capfd):
    assert run_scripts(1, others, "import time; time.sleep(1); raise SystemExit(3)", others) == 3
    assert "not killed" not in capfd.readouterr().out


def test_a_kill_is_the_status_that_a_shell_gives():
    assert run_scripts(1, "import os; os.kill(os.getpid(), 9)", SLEEPS) == 137


def test_sigterm_reaches_all_and_saved_is_the_status(tmp_path):
    ready = [tmp_path / "0", tmp_path / "1"]

    def all_ready():
        while not all(path.exists() for path in ready):
            time.sleep(0.01)

    assert run_scripts(300, *(SAVES.format(ready=path) for path in ready), stop_after=all_ready) == 75


def test_those_that_save_later_are_waited_for():
    assert run_scripts(300, "raise SystemExit(75)", "import time; time.sleep(1); raise SystemExit(5)") == 5


@pytest.mark.parametrize(
    ("returncodes", "status"), [((0, 0), 0), ((0, 75), 75), ((75, 2), 2), ((-9, 75), 137), ((3, 5), 5), ((), 0)]
)
def test_the_worst_status(returncodes, status):
    assert worst_status(returncodes) == status


def test_a_dry_run_prints_every_command():
    args = ["--processes=2", "--dry-run", "--config=a b.py", "--config.run.dir=it's"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "launch/local.py", *args], cwd=ROOT, env=env, text=True, capture_output=True)
    first, second = out.stdout.splitlines()
    assert shlex.split(first)[-4:] == ["sft_jax.main", "--config=a b.py", "--config.run.dir=it's", DISTRIBUTED]
    assert "JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0" in first
    assert "JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=1" in second


def test_the_environment_of_a_process(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    env = process_env(1, 2, 4, 4000)
    assert env["XLA_FLAGS"] == "--xla_a=1 --xla_force_host_platform_device_count=4"
    assert env["JAX_COORDINATOR_ADDRESS"] == env["JAX_COORDINATOR_BIND_ADDRESS"] == "127.0.0.1:4000"
