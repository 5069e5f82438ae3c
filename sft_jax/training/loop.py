"""Batches in, a trained state out: the step, its log, evaluation, checkpoints, and every way in which a run ends.

The host runs one step ahead: it reads the metrics of step n after it has dispatched step n + 1.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from sft_jax.checkpoint.manager import CheckpointManager
from sft_jax.config_schema import Config, SpikeConfig
from sft_jax.datatypes import DataError, NumericError
from sft_jax.model.transformer import Params
from sft_jax.sharding import Batch
from sft_jax.training.evaluation import Evaluator, evaluate_all
from sft_jax.training.metrics import MetricsWriter, ProgressReporter, Record, StepMeter
from sft_jax.training.replay import ReplayCheck
from sft_jax.training.replicas import ReplicaCheck
from sft_jax.training.spikes import SpikeRewind, SpikeWatch
from sft_jax.training.state import TrainState
from sft_jax.training.step import StepFn
from sft_jax.training.stop_signal import Interrupted, Preempted, StopSignal
from sft_jax.training.watchdog import DEVICE, Watchdog


@dataclasses.dataclass
class EarlyStopping:
    """The lowest held-out losses so far."""

    best_saved_loss: float = float("inf")
    best_stop_loss: float = float("inf")
    evaluations_since_best: int = 0
    stopped: bool = False
    last_evaluation: int = -1
    """Its step: an evaluation that a stop has broken off is made when the run goes on."""

    def to_json(self) -> dict[str, Any]:
        """JSON has no infinity: a loss that was never seen is null."""
        return {name: None if value == float("inf") else value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "EarlyStopping":
        seen: dict[str, Any] = {name: float("inf") if value is None else value for name, value in fields.items()}
        return cls(**seen)


@dataclasses.dataclass
class Memory:
    """What the loop has seen, and decides by. It travels with the checkpoints, so that a resumed run decides alike."""

    stopping: EarlyStopping
    spikes: SpikeWatch

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any], config: SpikeConfig) -> "Memory":
        """That of a checkpoint; of a run that begins, {}."""
        return cls(EarlyStopping.from_json(meta.get("stopping", {})), SpikeWatch(config, meta.get("spikes")))

    def to_meta(self) -> dict[str, Any]:
        return {"stopping": self.stopping.to_json(), "spikes": self.spikes.to_json()}


class ProfileWindow:
    """A jax.profiler trace of steps `first` to `last`, or of those among them that this process runs."""

    def __init__(self, steps: tuple[int, ...], directory: epath.Path) -> None:
        self._steps, self._directory, self._tracing = steps, directory, False

    def before(self, step: int) -> None:
        if self._steps and not self._tracing and self._steps[0] <= step <= self._steps[1]:
            jax.profiler.start_trace(str(self._directory))
            self._tracing = True

    def after(self, step: int, metrics: Mapping[str, Any]) -> None:
        if self._tracing and step >= self._steps[1]:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainer:
    """All that a run needs, built by `main`. `train` is the loop."""

    config: Config
    run_dir: epath.Path
    num_steps: int
    train_step: StepFn
    batches: Callable[[int], Iterator[Batch]]
    """First step -> that batch and all after it."""
    evaluators: Sequence[Evaluator]
    manager: CheckpointManager
    meta: Mapping[str, Any]
    """Saved with every checkpoint: what the data were."""
    abstract_state: TrainState
    meter: StepMeter
    writer: MetricsWriter
    progress: ProgressReporter
    stop_signal: StopSignal
    watchdog: Watchdog
    replicas: ReplicaCheck | None
    """None: the copies of the state are not compared."""
    replay: ReplayCheck | None
    """None: no step is computed twice."""

    def train(self, state: TrainState, frozen: Params, memory: Memory) -> TrainState:
        """Run from `state.step` to the last step, or until held-out loss stops improving.

        Raises:
          Preempted: after SIGTERM, with the last finished step saved.
          NumericError: too many non-finite steps in a row; the last checkpoint is kept.
          DataError: a batch has no supervised token.
          StorageError: a checkpoint could not be written.
          MachineError: devices do not hold the same state, or do not compute the same twice.
        """
        while True:
            try:
                return self._train(state, frozen, memory)
            except SpikeRewind as spike:
                step = spike.step
            # Only here, where the error with its frames is gone, is the memory of the state that jumped.
            state = self._rewind(step, memory)

    def _train(self, state: TrainState, frozen: Params, memory: Memory) -> TrainState:
        step = first = int(state.step)
        pending: Mapping[str, Any] | None = None
        profile = ProfileWindow(self.config.log.profile_steps, self.run_dir / "profile")
        try:
            is_due = step == 0 or (self._evaluates_after(step) and memory.stopping.last_evaluation < step)
            if is_due and self._evaluate(step, state, frozen, memory.stopping):
                self._save(step, state, frozen, memory, is_best=True)
            batches = self.batches(step)
            self.meter.restart_clock()
            self.watchdog.rest()
            while step < self.num_steps and not memory.stopping.stopped:
                self.stop_signal.check()
                profile.before(step + 1)
                with self.stop_signal.waiting(), self.watchdog.at(f"step {step + 1}, reading its batch"):
                    batch = next(batches)
                step += 1
                if step in memory.spikes.skipped:
                    state, metrics = _pass_over(state), None
                else:
                    if self.replay and step % self.config.watch.replay_every == 0:
                        self.replay.check(step, state.params, frozen, batch)
                        self.watchdog.rest()
                    with self.watchdog.at(f"step {step}, {DEVICE}"):
                        state, metrics = self.train_step(state, frozen, batch)
                self.stop_signal.begin_training()
                profile.after(step, metrics or {})
                self._report(step - 1, pending, memory)
                pending = metrics
                if self.replicas and step % self.config.watch.replicas_every == 0:
                    self.replicas.check(step, {"state": state, "frozen": frozen})
                if self._evaluates_after(step) or self._saves_after(step):
                    self._report(step, pending, memory)
                    pending = None
                    is_best = self._evaluates_after(step) and self._evaluate(step, state, frozen, memory.stopping)
                    if is_best or memory.stopping.stopped or self._saves_after(step):
                        self._save(step, state, frozen, memory, is_best)
                    self.meter.restart_clock()
                    self.watchdog.rest()
                elif self.manager.poll():
                    self._report(step, pending, memory)
                    pending = None
                    self._save(step, state, frozen, memory)
                    self.watchdog.rest()
        except Interrupted:
            self._report(step, pending, memory)
            if step > first:
                self._save_now(step, state, frozen, memory)
            self.manager.wait()
            raise Preempted(
                f"stopped at step {step} of {self.num_steps}, saved. Run the same command to go on."
            ) from None
        finally:
            profile.close()
        if step > first:
            self._save_now(step, state, frozen, memory)
        self.stop_signal.end_training()
        return state

    def _rewind(self, step: int, memory: Memory) -> TrainState:
        """The state and memory of the last checkpoint, with `step` among those that are passed over."""
        saved = self.manager.last_saved
        assert saved is not None
        restored, meta = self.manager.restore(saved, vars(self.abstract_state))
        self.writer.rewind(saved)
        self.progress.say(f"step {step} has jumped: back to step {saved}, and its batch will be passed over")
        then = Memory.from_meta(meta, self.config.spikes)
        then.spikes.skipped = memory.spikes.skipped | {step}
        memory.stopping, memory.spikes = then.stopping, then.spikes
        return TrainState(**restored)

    def _evaluates_after(self, step: int) -> bool:
        every = self.config.evaluation.every_steps
        return bool(self.evaluators) and (step == self.num_steps or (every > 0 and step % every == 0))

    def _saves_after(self, step: int) -> bool:
        every = self.config.checkpoint.every_steps
        return step == self.num_steps or (every > 0 and step % every == 0)

    def _report(self, step: int, metrics: Mapping[str, Any] | None, memory: Memory) -> None:
        """Wait for a step's metrics, check them, and log them where they are due. None: there is nothing to report.

        Raises:
          SpikeRewind: it has jumped, and the config says to go back.
        """
        if metrics is None:
            return
        with self.watchdog.at(f"step {step}, {DEVICE}"):
            record = self.meter.add(jax.device_get(metrics))
        self.watchdog.step_is_over()
        if record["weight_sum"] == 0:
            raise DataError(f"step {step}: its batch has no supervised token, so it has no loss. Is the mask right?")
        skipped, limit = int(record["num_skipped"]), self.config.optimizer.max_skipped_steps
        if skipped >= limit:
            raise NumericError(
                f"step {step}: loss {record['loss']}, gradient norm {record['grad_norm']}: the {skipped}th non-finite "
                f"step in a row (config.optimizer.max_skipped_steps = {limit}). The last checkpoint is kept. "
                "Lower config.optimizer.learning_rate, lengthen the warmup, or look at these batches with sft-jax show."
            )
        jumps = memory.spikes.add(record)
        if jumps and memory.spikes.may_rewind:
            self.manager.wait()  # or processes would differ on whether the step that is being saved is there
            if self.manager.last_saved is not None:
                raise SpikeRewind(step)
        record |= jumps
        self.progress.advance(step)
        if step % self.config.log.every_steps == 0 or step == self.num_steps or jumps:
            record |= self.meter.rates()
            self.writer.write(step, record)
            self.progress.show(step, record)

    def _evaluate(self, step: int, state: TrainState, frozen: Params, stopping: EarlyStopping) -> bool:
        """Log every held-out set; True if the set of `checkpoint.best_by` has its lowest loss so far."""
        with self.stop_signal.waiting():
            record: Record = evaluate_all(self.evaluators, state.params, frozen, self.stop_signal.check)
        stopping.last_evaluation = step
        if not record:
            return False
        self.writer.write(step, record)
        self.progress.show(step, record)
        stop_by, best_by = self.config.evaluation.stop_by, self.config.checkpoint.best_by
        if stop_by:
            loss = record[f"eval/{stop_by}/loss"]
            better = loss < stopping.best_stop_loss
            stopping.best_stop_loss = min(loss, stopping.best_stop_loss)
            stopping.evaluations_since_best = 0 if better else stopping.evaluations_since_best + 1
            stopping.stopped = stopping.evaluations_since_best >= self.config.evaluation.stop_patience
        if best_by and step > 0 and record[f"eval/{best_by}/loss"] < stopping.best_saved_loss:
            stopping.best_saved_loss = record[f"eval/{best_by}/loss"]
            return True
        return False

    def _save(self, step: int, state: TrainState, frozen: Params, memory: Memory, is_best: bool = False) -> None:
        if self.replicas:
            self.replicas.check(step, {"state": state, "frozen": frozen})
        best_loss = memory.stopping.best_saved_loss if is_best else None
        self.manager.save(step, vars(state), {**self.meta, **memory.to_meta()}, best_loss)

    def _save_now(self, step: int, state: TrainState, frozen: Params, memory: Memory) -> None:
        """The last save of this process: there will be no later step to save in its place."""
        if self.replicas:
            self.replicas.check(step, {"state": state, "frozen": frozen})
        self.manager.save_now(step, vars(state), {**self.meta, **memory.to_meta()})


def _pass_over(state: TrainState) -> TrainState:
    """As after a step of which nothing but its number counts; placed as before, or the next one would be compiled."""
    return dataclasses.replace(state, step=jax.device_put(state.step + 1, state.step.sharding))
