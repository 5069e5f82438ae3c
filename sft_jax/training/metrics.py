"""A step's sums on the device -> a flat record of numbers -> metrics.jsonl, TensorBoard and the terminal."""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sft_jax.checkpoint.storage import write_whole
from sft_jax.datatypes import StorageError

Record = dict[str, float]

# Peak dense bfloat16 FLOP/s of one device, by `device_kind`. Sources: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e;
# NVIDIA data sheets of A100 SXM and H100 SXM (without sparsity).
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
}


def source_record(metrics: Mapping[str, Any], prefix: str, names: Sequence[str]) -> Record:
    """Loss (nats per weight) and accuracy over all sources; where there are several, also `<prefix><name>/loss`."""
    weight, nll, correct = (np.asarray(metrics[key], np.float64) for key in ("weight_sum", "nll_sum", "correct_sum"))
    record = {"nll": float(nll.sum() / weight.sum()), "accuracy": float(correct.sum() / weight.sum())}
    if len(names) > 1:
        for i, name in enumerate(names):
            if weight[i]:
                record[f"{prefix}{name}/loss"] = float(nll[i] / weight[i])
                record[f"{prefix}{name}/accuracy"] = float(correct[i] / weight[i])
    return record


class StepMeter:
    """Turns each step's fetched metrics into a record, with rates over the time since the last logged step.

    Args:
      source_names: of the training data.
      flops_per_token: forward and backward, for `mfu`, which is given where the device's peak is known.
    """

    def __init__(self, source_names: Sequence[str], flops_per_token: int) -> None:
        self._names = source_names
        self._flops_per_token = flops_per_token
        self._peak = PEAK_FLOPS.get(jax.devices()[0].device_kind, 0.0) * jax.device_count()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what just happened (evaluation, a save) out of the next rates."""
        self._since, self._tokens, self._weight = time.perf_counter(), 0.0, 0.0

    def add(self, metrics: Mapping[str, Any]) -> Record:
        """The record of one step, without rates."""
        weight = float(np.sum(metrics["weight_sum"]))
        self._tokens += float(metrics["num_tokens"])
        self._weight += weight
        scalars = ["loss", "grad_norm", "learning_rate", "num_skipped", "padding_fraction"]
        scalars += [name for name in metrics if name.startswith("router/")]
        record = {name: float(metrics[name]) for name in scalars} | {"weight_sum": weight}
        return record | source_record(metrics, "train/", self._names) if weight else record

    def rates(self) -> Record:
        """Rates since the last call, all devices together; supervised tokens are counted by their loss weight."""
        seconds = time.perf_counter() - self._since
        rates = {"tokens_per_second": self._tokens / seconds, "supervised_tokens_per_second": self._weight / seconds}
        if self._peak:
            rates["mfu"] = rates["tokens_per_second"] * self._flops_per_token / self._peak
        self.restart_clock()
        return rates


class MetricsWriter:
    """Appends records to `<run>/metrics.jsonl` and `<run>/tensorboard/`; only process 0 writes.

    A resumed run drops the records after `start_step`: those steps are about to be done again. Lines that are no
    records go to `<run>/quarantine/metrics.jsonl`: what a disk has done to the log is no reason not to go on.

    Raises:
      StorageError: from whatever writes.
    """

    def __init__(self, run_dir: epath.Path, start_step: int, tensorboard: bool) -> None:
        self._run_dir, self._path = run_dir, run_dir / "metrics.jsonl"
        self._writes, self._uses_tensorboard = jax.process_index() == 0, tensorboard
        self._tensorboard = None
        self.num_damaged = 0
        """Lines of the log that are no records."""
        if self._writes:
            with self._refusals():
                self._open(start_step)

    def _open(self, start_step: int) -> None:
        lines: list[bytes] = []
        if self._path.exists():
            lines = self._path.read_bytes().split(b"\n")[:-1]  # what follows the last newline was being written
            steps = [_step_of(line) for line in lines]
            if damaged := [line for line, step in zip(lines, steps, strict=True) if step is None]:
                self.num_damaged = len(damaged)
                kept = self._run_dir / "quarantine" / self._path.name
                kept.parent.mkdir(exist_ok=True)
                with kept.open("ab") as out:
                    out.writelines(line + b"\n" for line in damaged)
            lines = [line for line, step in zip(lines, steps, strict=True) if step is not None and step <= start_step]
        write_whole(self._path, b"".join(line + b"\n" for line in lines))
        self._file = self._path.open("a")
        if self._uses_tensorboard:
            from tensorboardX import SummaryWriter  # half a second of import, only where it is used

            self._tensorboard = SummaryWriter(str(self._run_dir / "tensorboard"), purge_step=start_step + 1)

    def rewind(self, step: int) -> None:
        """Drop the records after `step`: those steps are about to be done again."""
        self.close()
        if self._writes:
            self._open(step)

    def write(self, step: int, record: Record) -> None:
        if not self._writes:
            return
        with self._refusals():
            self._file.write(json.dumps({"step": step, **record}) + "\n")
            self._file.flush()
        if self._tensorboard:
            for name, value in record.items():
                self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writes:
            with contextlib.suppress(OSError):  # what could not be written, which has been said
                self._file.close()
        if self._tensorboard:
            self._tensorboard.close()

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"{self._path}: cannot be written: {error.strerror or error}. Is there free space, and is the disk "
                "writable? Run the same command to go on."
            ) from error


def _step_of(line: bytes) -> int | None:
    """None: the line is no record."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


class ProgressReporter:
    """A progress bar on a terminal, a line per logged step elsewhere; silent on processes other than 0."""

    def __init__(self, console: Console, num_steps: int, start_step: int) -> None:
        self._console = console
        self._speaks = jax.process_index() == 0
        self._num_steps = num_steps
        self._bar = None
        if self._speaks and console.is_terminal:
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[text]}"), console=console)
            self._task = self._bar.add_task("", total=num_steps, completed=start_step, text="compiling")
            self._bar.start()

    def advance(self, step: int) -> None:
        if self._bar:
            self._bar.update(self._task, completed=step)

    def show(self, step: int, record: Record) -> None:
        """One line of the record's chief numbers."""
        units = {"loss": "", "tokens_per_second": " tok/s", "supervised_tokens_per_second": " supervised/s"}
        parts = [
            f"{name if not unit else ''} {record[name]:,.4g}{unit}".strip()
            for name, unit in units.items()
            if name in record
        ]
        parts += [f"{name} {value:.4g}" for name, value in record.items() if name.startswith("eval/")]
        text = "  ".join(parts)
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
        elif self._speaks:
            self._console.print(f"step {step}/{self._num_steps}  {text}", highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        if self._speaks:
            self._console.print(text, style="yellow", highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
