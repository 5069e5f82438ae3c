"""A small run of training, with faults or without, in processes that a worker forks (train_worker.py)."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from runs import content

from sft_jax.checkpoint.reader import CheckpointReader
from sft_jax.testbed.make import BASE_MODEL

HERE = Path(__file__).parent
NUM_STEPS, EVAL_EVERY, SAVE_EVERY, FIRST = 12, 4, 5, 3
BATCH_SIZE = 16
CONFIG = """
from sft_jax.config import default_config

def get_config():
    config = default_config()
    config.run.compilation_cache = {cache!r}
    config.model.preset = "testbed"
    config.model.overrides = dict(num_layers=1, embed_dim=16, mlp_dim=32, num_heads=2, num_kv_heads=2, head_dim=8)
    config.model.compute_dtype = "float32"
    config.model.neftune_alpha = 5.0
    config.data.tokenizer = {tokenizer!r}
    config.data.chat_template = "chatml"
    config.data.new_tokens = ("<|im_start|>", "<|im_end|>")
    config.data.train = [dict(path={rows!r}, name="rows")]
    config.data.eval = [dict(path={rows!r}, name="held_out")]
    config.data.eval_overlap = "keep"
    config.data.store_dir = {store!r}
    config.data.max_seq_len = 64
    config.data.prepare_processes = 1
    config.batch.batch_size = {batch_size}
    config.batch.grad_accum_steps = 2
    config.mesh.fsdp = 2
    config.mesh.replica = -1
    config.optimizer.learning_rate = 1e-3
    config.schedule.name = "constant"
    config.schedule.num_steps = {num_steps}
    config.evaluation.every_steps = {eval_every}
    config.checkpoint.every_steps = {save_every}
    config.checkpoint.best_by = "held_out"
    config.log.tensorboard = False
    config.log.every_steps = 1
    return config
"""


def write_rows(path: Path, count: int) -> None:
    rows = ({"prompt": f"the fox {i}", "completion": f"has {'an old ' * (i % 5)}flute {i}"} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_world(folder: Path) -> Path:
    """The config, and what it reads; its runs share a store and a compilation cache."""
    folder.mkdir()
    write_rows(folder / "rows.jsonl", 600)
    places = dict(cache=folder / "cache", tokenizer=BASE_MODEL, rows=folder / "rows.jsonl", store=folder / "store")
    fields = {name: str(place) for name, place in places.items()}
    counts = dict(num_steps=NUM_STEPS, eval_every=EVAL_EVERY, save_every=SAVE_EVERY, batch_size=BATCH_SIZE)
    config = folder / "config.py"
    config.write_text(CONFIG.format(**fields, **counts))
    return config


def metrics(run_dir: Path) -> dict[tuple[int, str], str]:
    """The bits of each step's losses: a step that is there twice with two values is an error."""
    bits: dict[tuple[int, str], str] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, value in record.items():
            if name in ("loss", "grad_norm") or name.startswith("eval/"):
                assert bits.setdefault((record["step"], name), value.hex()) == value.hex(), record
    return bits


def newest_step(run_dir: Path) -> int | None:
    reader = CheckpointReader(run_dir)
    try:
        return reader.find_restorable().step
    finally:
        reader.close()


def xla_flags(num_devices: int) -> str:
    """They are read when a process first asks for its devices, which a worker does not: each trial has its own."""
    return (
        f"--xla_force_host_platform_device_count={num_devices} --xla_backend_optimization_level=0 "
        "--xla_cpu_parallel_codegen_split_count=1"
    )


def start_worker(num_devices: int) -> subprocess.Popen:
    flags = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(num_devices),
        "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
    }
    return subprocess.Popen(
        [sys.executable, HERE / "train_worker.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | flags,
    )  # fmt: skip


def stop_worker(worker: subprocess.Popen) -> None:
    worker.stdin.close()
    worker.wait()
    worker.stdout.close()


class TrainingLab:
    """Makes runs; `close` it."""

    def __init__(self, scratch: Path, seed: int = 0, num_devices: int = 8) -> None:
        self.scratch, self.seed, self.num_devices, self._number = scratch, seed, num_devices, 0

    @cached_property
    def config(self) -> Path:
        return write_world(self.scratch / "world")

    @cached_property
    def worker(self) -> subprocess.Popen:
        return start_worker(self.num_devices)

    @cached_property
    def finished(self) -> Path:
        """A run that nothing has disturbed: the oracle."""
        return self.make("finished", {}, 0)

    @cached_property
    def started(self) -> Path:
        """A run that was stopped after its first steps."""
        stop = dict(point="data", at=FIRST + 1, number=signal.SIGTERM, log=os.devnull, stall="python")
        return self.make("started", {"send": stop}, 75)

    def make(self, name: str, faults: dict[str, Any], status: int) -> Path:
        run_dir = self.scratch / name
        result = self.train(run_dir, faults=faults)
        assert result["status"] == status, result["log"]
        return run_dir

    def new(self) -> Path:
        """A run's folder that is not there yet."""
        self._number += 1
        return self.scratch / f"trained-{self._number}"

    def copy_started(self) -> Path:
        return Path(shutil.copytree(self.started, self.new()))

    def train(
        self,
        run_dir: Path,
        args: Sequence[str] = (),
        faults: Mapping[str, Any] = types.MappingProxyType({}),
        limit: float = 300.0,
    ) -> dict[str, Any]:
        """How a run ended: `status` (minus the signal), `ended` (time), and what it said, `log`."""
        self.begin(self.worker, run_dir, run_dir.with_suffix(".log"), args, faults)
        return self.end(self.worker, run_dir.with_suffix(".log"), limit)

    def begin(
        self,
        worker: subprocess.Popen,
        run_dir: Path,
        log: Path,
        args: Sequence[str],
        faults: Mapping[str, Any],
        env: Mapping[str, str] = types.MappingProxyType({}),
    ) -> None:
        given = [f"--config={self.config}", f"--config.run.dir={run_dir}", *args]
        trial = {"args": given, "faults": dict(faults), "log": str(log), "env": dict(env)}
        worker.stdin.write(json.dumps(trial) + "\n")
        worker.stdin.flush()

    def end(self, worker: subprocess.Popen, log: Path, limit: float) -> dict[str, Any]:
        pid = json.loads(worker.stdout.readline())["pid"]
        killer = threading.Timer(limit, os.kill, [pid, signal.SIGKILL])
        killer.start()
        answer = json.loads(worker.stdout.readline())
        killer.cancel()
        return answer | {"log": log.read_text()}

    def differences(self, run_dir: Path) -> str:
        """What of a run that is over is not as in the one that nothing has disturbed."""
        ours, theirs = metrics(run_dir), metrics(self.finished)
        if ours != theirs:
            keys = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
            return f"differs at {keys[:3]}"
        weights = [content(path / "export")["model.safetensors"] for path in (run_dir, self.finished)]
        return "" if weights[0] == weights[1] else "the export differs"

    def close(self) -> None:
        if "worker" in vars(self):
            stop_worker(self.worker)
