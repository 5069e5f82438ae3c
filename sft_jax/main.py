"""Config in, a run directory out. The composition root: it knows every room, and no room knows it.

python -m sft_jax.main --config=configs/demo.py --config.run.dir=runs/demo
"""

import contextlib
import dataclasses
import json
import math
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath
from rich.console import Console

from sft_jax.checkpoint.export_folder import check_export_target
from sft_jax.checkpoint.hf import read_generation_config
from sft_jax.checkpoint.hf_export import export_pretrained
from sft_jax.checkpoint.manager import CheckpointManager
from sft_jax.checkpoint.model_card import make_model_card, name_base
from sft_jax.checkpoint.peft import export_adapter
from sft_jax.checkpoint.retention import Retention
from sft_jax.checkpoint.storage import write_whole
from sft_jax.command_line import config_parser, read_config, run_command, say_error
from sft_jax.config import warnings_for
from sft_jax.config_schema import Config, digest_json
from sft_jax.data.pipeline import PackedDataset
from sft_jax.data.preview import preview_row
from sft_jax.data.rendering import Renderer
from sft_jax.datatypes import PREEMPTED_EXIT_CODE, ConfigError, NumericError, StorageError
from sft_jax.experiment import (
    ModelOnMesh,
    Start,
    export_dtypes,
    jit_train_step,
    open_evaluators,
    open_renderer,
    open_sources_of_step,
    open_start,
    open_train_data,
    place_batches,
    place_model,
    read_model_config,
    use_compilation_cache,
    warnings_for_model,
)
from sft_jax.model.families import num_params, train_flops_per_token
from sft_jax.model.transformer import Params
from sft_jax.processes import coordinator, join_processes, leave, process_place, wait_for_verdict
from sft_jax.provenance import describe_environment
from sft_jax.sharding import is_on_host
from sft_jax.training.evaluation import Evaluator
from sft_jax.training.loop import Trainer
from sft_jax.training.metrics import MetricsWriter, ProgressReporter, StepMeter
from sft_jax.training.replay import ReplayCheck
from sft_jax.training.replicas import ReplicaCheck
from sft_jax.training.state import TrainState
from sft_jax.training.step import make_gradients
from sft_jax.training.stop_signal import Preempted, StopSignal
from sft_jax.training.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class Opened:
    """What a config names."""

    config: Config
    renderer: Renderer
    placed: ModelOnMesh
    data: PackedDataset
    evaluators: list[Evaluator]

    @property
    def run_dir(self) -> epath.Path:
        return epath.Path(self.config.run.dir).expanduser()


def run(config: Config, console: Console | None = None) -> epath.Path:
    """Train what the config says, going on from the newest checkpoint in the run directory, and export.

    Returns:
      The run directory.

    Raises:
      SftError: of the kind whose exit status datatypes.py gives.
      Preempted: told to stop; saved.
    """
    with StopSignal() as stop_signal:
        if config.run.distributed:
            join_processes()
        console = console or Console(quiet=process_place()[0] > 0)
        use_compilation_cache(config)
        renderer = open_renderer(config)
        placed = place_model(config, renderer)
        data = open_train_data(config, renderer)
        opened = Opened(config, renderer, placed, data, open_evaluators(placed, renderer))
        if config.checkpoint.export:
            check_export_target(opened.run_dir / "export")
            check_export_target(opened.run_dir / "adapter")
        generation, base_name = read_generation_config(config.model.path), name_base(config.model.path)
        with private_files(), open_manager(opened) as manager:
            state, frozen = train(opened, manager, console, stop_signal)
            if config.checkpoint.export:
                export(opened, manager, console, state, frozen, generation, base_name)
        return opened.run_dir


def open_manager(opened: Opened) -> CheckpointManager:
    make_run_dir(opened.run_dir)
    checkpoint = opened.config.checkpoint
    return CheckpointManager(
        opened.run_dir,
        Retention(checkpoint.keep_latest, checkpoint.keep_every, bool(checkpoint.best_by)),
        config_digest=opened.config.digest(),
        data_fingerprint=digest_json(opened.data.fingerprint_fields),
        mesh=opened.placed.mesh.shape,
        allow_fresh=opened.config.run.allow_fresh,
    )


def train(
    opened: Opened, manager: CheckpointManager, console: Console, stop_signal: StopSignal
) -> tuple[TrainState, Params]:
    """As the only trainer in the run directory. Returns the state after the last step, and the frozen parameters."""
    config, placed, data, run_dir = opened.config, opened.placed, opened.data, opened.run_dir
    start = open_start(placed, manager, data)
    step = int(start.state.step)
    if step > data.num_steps:
        raise ConfigError(
            f"config.schedule: asks for {data.num_steps} steps, and {run_dir} has already done {step}. "
            "Ask for as many at least, or start in a new config.run.dir."
        )
    manager.check_space(placed.abstract_state, data.num_steps)
    if jax.process_index() == 0:  # only now: a refused resume must not rewrite what the run was made from
        write_run_files(run_dir, config, data)
        describe_run(console, placed, data, opened.renderer)
        describe_start(console, start, data.num_steps)
    writer = MetricsWriter(run_dir, step, config.log.tensorboard)
    progress = ProgressReporter(console, data.num_steps, step)
    if writer.num_damaged:
        progress.say(
            f"damaged     {writer.num_damaged} lines of metrics.jsonl: they are in quarantine/metrics.jsonl now"
        )
    trees = {"state": start.state, "frozen": start.frozen}
    sum_grads = make_gradients(config, placed.model, placed.mesh)
    watchdog = Watchdog(config.watch.stall_factor, config.watch.stall_seconds)
    trainer = Trainer(
        config=config,
        run_dir=run_dir,
        num_steps=data.num_steps,
        train_step=jit_train_step(placed, data.num_steps, len(data.source_names)),
        batches=place_batches(data, placed.mesh, config.batch.batch_size),
        evaluators=opened.evaluators,
        manager=manager,
        meta={"data": data.fingerprint_fields, "model": placed.identity, "overrides": list(start.overrides)},
        abstract_state=placed.abstract_state,
        meter=StepMeter(data.source_names, train_flops_per_token(placed.model, config.data.max_seq_len)),
        writer=writer,
        progress=progress,
        stop_signal=stop_signal,
        watchdog=watchdog,
        replicas=ReplicaCheck(trees, placed.mesh) if config.watch.replicas_every else None,
        replay=ReplayCheck(sum_grads, start.state.params, placed.mesh) if config.watch.replay_every else None,
    )
    try:
        state = trainer.train(start.state, start.frozen, start.memory)
    finally:
        watchdog.close()
        progress.close()
        writer.close()
    if int(state.num_updates) == 0:
        raise NumericError(f"config.run.dir: {run_dir}: every step was skipped as non-finite; nothing was trained.")
    stopping = start.memory.stopping
    if stopping.stopped:
        console.print(
            f"stopped early at step {int(state.step)}: {config.evaluation.stop_by} has had no better loss for "
            f"{stopping.evaluations_since_best} evaluations. The last step is exported; sft-jax export takes others.",
            soft_wrap=True,
        )
    return state, start.frozen


def export(
    opened: Opened,
    manager: CheckpointManager,
    console: Console,
    state: TrainState,
    frozen: Params,
    generation: Mapping[str, Any],
    base_name: str,
) -> None:
    """The run's last step as a Hugging Face folder, and its adapter alone where it has one.

    Args:
      generation: the base's generation_config.json, and `base_name` its name, as they were when the run began.
    """
    config, model, renderer, run_dir = opened.config, opened.placed.model, opened.renderer, opened.run_dir
    params: Mapping[str, Any] = {**state.params, **frozen}
    if config.lora.rank:  # from disk: a merged model beside this one would want its memory twice
        _, params = open_sources_of_step(config, renderer, manager, int(state.step))
    target = run_dir / "export"
    card = make_model_card(run_dir, int(state.step), target, base_name) if jax.process_index() == 0 else ""
    export_pretrained(
        target,
        params,
        model,
        renderer.tokenizer,
        renderer.template.text,
        renderer.stop_ids,
        export_dtypes(config),
        model_card=card,
        generation=generation,
    )
    console.print(f"exported to {target}", soft_wrap=True)
    if config.lora.rank:
        try:
            kept = config.model.param_dtype
            export_adapter(run_dir / "adapter", state.params, model, config.lora, config.model.path, kept)
            console.print(f"adapter alone in {run_dir / 'adapter'}", soft_wrap=True)
        except ConfigError as error:  # PEFT has no form for it, and the merged model is there
            console.print(f"no adapter folder: {error}", soft_wrap=True)


@contextlib.contextmanager
def private_files() -> Iterator[None]:
    """What is written within is for its owner alone: 0700 and 0600."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def make_run_dir(run_dir: epath.Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"config.run.dir: {run_dir} cannot be made a folder: {error}. Name another.") from error


def write_run_files(run_dir: epath.Path, config: Config, data: PackedDataset) -> None:
    """`config.json`, `provenance.json` and `data_report.json`."""
    # What is let through is let through by whoever starts a run, and not again by its config.
    this_start = dataclasses.replace(config.run, override_fingerprint=False, allow_fresh=False)
    config = dataclasses.replace(config, run=this_start)
    files = {"config": config.to_dict(), "provenance": describe_environment(config), "data_report": data.report}
    for name, content in files.items():
        path = run_dir / f"{name}.json"
        try:
            write_whole(path, (json.dumps(content, indent=1) + "\n").encode())
        except OSError as error:
            raise StorageError(
                f"{path}: cannot be written: {error.strerror or error}. Is there free space, and is the disk writable? "
                "Run the same command to go on."
            ) from error


def describe_run(console: Console, placed: ModelOnMesh, data: PackedDataset, renderer: Renderer) -> None:
    """Once per run: what will train, on what, and on a terminal the first row with its mask."""
    config, mesh = placed.config, placed.mesh
    for warning in [*warnings_for(config), *warnings_for_model(config, placed.model)]:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    leaves = [leaf for leaf in jax.tree.leaves(placed.abstract_state) if not is_on_host(leaf)]
    state_bytes = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    trained = sum(math.prod(leaf.shape) for leaf in placed.abstract_state.params.values())
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    report = data.report
    lines = {
        "mesh": f"{axes} ({jax.devices()[0].device_kind})",
        "parameters": f"{num_params(placed.model):,}, and {trained:,} train",
        "state": f"{state_bytes / 2**20:,.1f} MiB per device: trained parameters and optimizer",
        "data": f"{report['examples']:,} examples in {report['rows_per_epoch']:,} rows, "
        f"{report['fill_fraction']:.1%} full, {report['supervised_fraction']:.1%} of tokens supervised",
        "steps": f"{data.num_steps:,} of {config.batch.batch_size} rows of {config.data.max_seq_len} tokens",
    }
    num_old = read_model_config(config).vocab_size
    if config.model.path and placed.model.vocab_size > num_old:
        new = f"{placed.model.vocab_size - num_old:,} of embedding and head"
        lines = {"new rows": f"{new}: each began as the mean of the {num_old:,} in {config.model.path}"} | lines
    if console.is_terminal:
        lines["first row"] = "green is trained on, dim is only read:"
    for name, text in lines.items():
        console.print(f"{name:12}{text}", soft_wrap=True, highlight=False)
    if console.is_terminal:  # and in no log: it goes where the rows may not
        console.print(preview_row(data.row(0), renderer.tokenizer), soft_wrap=True)


def describe_start(console: Console, start: Start, num_steps: int) -> None:
    """Where the run goes on, and what it has passed over or let through."""
    if step := int(start.state.step):
        console.print(f"{'resumed':12}at step {step:,} of {num_steps:,}", highlight=False)
    for line in start.passed_over:
        console.print(f"{'passed over':12}{line}", style="yellow", soft_wrap=True, highlight=False)
    for override in start.overrides:
        changes = "; ".join(override["changes"])
        console.print(f"{'overridden':12}at step {override['step']:,}: {changes}", soft_wrap=True, highlight=False)


def main(args: list[str]) -> int:
    """The command `python -m sft_jax.main`."""
    parser = config_parser("python -m sft_jax.main", "Fine-tune.", "python -m sft_jax.main --config=configs/demo.py")
    parser.add_argument(
        "--override-fingerprint", action="store_true", help="resume on other data than the checkpoint's, and say so"
    )
    parser.add_argument(
        "--allow-fresh", action="store_true", help="where no checkpoint is whole, begin again at step 0"
    )
    options, rest = parser.parse_known_args(args)
    short = [f"--config.run.{name}=true" for name, given in vars(options).items() if given]
    config = read_config([*rest, *short])
    try:
        run(config)
    except Exception as error:
        if any(isinstance(one, RuntimeError) for one in _causes(error)):  # of a collective or a barrier, maybe
            wait_for_verdict()
        if coordinator() is None:
            raise
        # The others may be in a step, and jax would have this process wait for them for five minutes.
        status = say_error(error)
        if status is None:
            traceback.print_exc()
            status = 1
        leave(status)
    except Preempted as stop:
        print(f"preempted: {stop}", file=sys.stderr)
        if coordinator() is not None:
            leave(PREEMPTED_EXIT_CODE)
        return PREEMPTED_EXIT_CODE
    return 0


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came of: the collective of a save fails as a save that could not be written."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


if __name__ == "__main__":
    sys.exit(run_command(main))
