"""Config in, a run directory out. The composition root: it knows every room, and no room knows it.

python -m sft_jax.main --config=configs/demo.py --config.run.dir=runs/demo
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh, NamedSharding
from rich.console import Console

from sft_jax.checkpoint.hf import export_pretrained, load_pretrained, read_config
from sft_jax.checkpoint.manager import CheckpointManager
from sft_jax.command_line import config_parser, parse_config, run_command
from sft_jax.config import warnings_for
from sft_jax.config_schema import Config
from sft_jax.data.pipeline import PackedDataset, open_dataset
from sft_jax.data.preview import preview_row
from sft_jax.data.rendering import Renderer
from sft_jax.data.templates import load_template
from sft_jax.data.tokenizer import load_tokenizer
from sft_jax.datatypes import PREEMPTED_EXIT_CODE, ConfigError
from sft_jax.model.families import TransformerConfig, num_params, preset_config
from sft_jax.model.transformer import Params, abstract_params, init_params, logical_dims
from sft_jax.provenance import describe_environment
from sft_jax.sharding import Batch, build_mesh, check_batch_divides, place_batch, replicated, shardings_for
from sft_jax.training.evaluation import Evaluator, make_held_out_loss
from sft_jax.training.loop import EarlyStopping, Preempted, StopSignal, Trainer
from sft_jax.training.metrics import MetricsWriter, ProgressReporter, StepMeter
from sft_jax.training.optimizer import build_optimizer, build_schedule
from sft_jax.training.state import TrainState, abstract_state, init_state, split_params
from sft_jax.training.step import make_eval_step, make_train_step


def run(config: Config, console: Console | None = None) -> epath.Path:
    """Train what the config says, going on from the newest checkpoint in the run directory, and export.

    Returns:
      The run directory.

    Raises:
      SftError: of the kind whose exit status datatypes.py gives.
      Preempted: told to stop; saved.
    """
    console = console or Console()
    if config.run.distributed:
        jax.distributed.initialize()
    stop_signal = StopSignal()
    use_compilation_cache(config)
    mesh = build_mesh(config.mesh)
    check_batch_divides(config, mesh)
    run_dir = epath.Path(config.run.dir).expanduser()

    renderer = open_renderer(config)
    data = open_train_data(config, renderer)
    model = open_model_config(config, renderer)
    optimizer = build_optimizer(config.optimizer)
    schedule = build_schedule(config.schedule, config.optimizer.learning_rate, data.num_steps)

    shapes = abstract_params(model, config.model.param_dtype)
    dims = {path: logical_dims(path) for path in shapes}
    shardings = shardings_for(mesh, dims, {path: leaf.shape for path, leaf in shapes.items()})
    trainable, _ = split_params(shapes, config.model.freeze)
    abstract = abstract_state(trainable, shardings, optimizer, mesh)

    if jax.process_index() == 0:
        write_run_files(run_dir, config, data)
    manager = CheckpointManager(
        run_dir / "checkpoints", config.checkpoint.keep_latest, keep_best=bool(config.checkpoint.best_by)
    )
    describe_run(console, config, mesh, model, abstract, data, renderer)
    state, frozen, stopping = open_state(config, model, shardings, optimizer, abstract, manager, data)
    step = int(state.step)

    num_sources = len(data.source_names)
    train_step = jax.jit(
        make_train_step(config, model, optimizer, schedule, mesh, num_sources),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, abstract), replicated(mesh)),
    )
    writer = MetricsWriter(run_dir, step, config.log.tensorboard)
    progress = ProgressReporter(console, data.num_steps, step)
    trainer = Trainer(
        config=config,
        run_dir=run_dir,
        num_steps=data.num_steps,
        train_step=train_step,
        batches=place_batches(data, mesh, config.batch.batch_size),
        evaluators=open_evaluators(config, renderer, model, mesh),
        manager=manager,
        meta={"data": data.fingerprint_fields},
        meter=StepMeter(data.source_names, train_flops_per_token(model, config.data.max_seq_len)),
        writer=writer,
        progress=progress,
        stop_signal=stop_signal,
    )
    try:
        state = trainer.train(state, frozen, stopping)
    finally:
        progress.close()
        writer.close()
        manager.close()
    if config.checkpoint.export:
        export_pretrained(
            run_dir / "export",
            {**state.params, **frozen},
            model,
            renderer.tokenizer,
            renderer.template.text,
            renderer.stop_ids,
            config.model.param_dtype,
        )
        console.print(f"exported to {run_dir / 'export'}")
    return run_dir


# --- The parts, each from the config ---------------------------------------------------------------------------------


def use_compilation_cache(config: Config) -> None:
    if config.run.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(epath.Path(config.run.compilation_cache).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def open_renderer(config: Config) -> Renderer:
    data = config.data
    tokenizer = load_tokenizer(data.tokenizer or config.model.path, data.new_tokens)
    template = load_template(data.chat_template, tokenizer, data.chat_template_kwargs)
    return Renderer(tokenizer, template, data.stop_token, data.unknown_tokens)


def open_train_data(config: Config, renderer: Renderer) -> PackedDataset:
    epochs, steps = config.schedule.num_epochs, config.schedule.num_steps
    return open_dataset(
        config.data.train,
        config,
        renderer,
        batch_size=config.batch.batch_size,
        num_epochs=epochs if steps is None else None,
        num_steps=steps,
        shuffle=True,
    )


def open_eval_data(config: Config, renderer: Renderer) -> dict[str, PackedDataset]:
    """Every set of `config.data.eval` by name: one pass, in a fixed order."""
    rows = config.batch.eval_rows
    sets = [
        open_dataset((source,), config, renderer, batch_size=rows, num_epochs=1, num_steps=None, shuffle=False)
        for source in config.data.eval
    ]
    return {data.source_names[0]: data for data in sets}


def open_model_config(config: Config, renderer: Renderer) -> TransformerConfig:
    """The architecture, from the folder or the preset, with a row of the embedding for every id of the tokenizer."""
    if config.model.path:
        model, _ = read_config(config.model.path)
        if config.model.preset and (expected := preset_config(config.model.preset, {})) != model:
            differing = [
                f"{f.name} {getattr(model, f.name)} for {getattr(expected, f.name)}"
                for f in dataclasses.fields(model)
                if getattr(model, f.name) != getattr(expected, f.name)
            ]
            raise ConfigError(
                f"config.model.path: {config.model.path} is not a {config.model.preset}: {', '.join(differing)}. "
                "Name the right folder, or leave config.model.preset empty."
            )
    else:
        model = preset_config(config.model.preset, config.model.overrides)
    return dataclasses.replace(model, vocab_size=max(model.vocab_size, renderer.tokenizer.vocab_size))


def open_params(config: Config, model: TransformerConfig, shardings: Mapping[str, NamedSharding]) -> Params:
    """Pretrained weights, each tensor straight to its shards; or random ones where the config names no folder."""
    if config.model.path:
        return load_pretrained(config.model.path, model, shardings, config.model.param_dtype)
    init = jax.jit(init_params, static_argnums=(0, 2), out_shardings=dict(shardings))
    return init(model, jax.random.key(config.run.seed), config.model.param_dtype)


def open_state(
    config: Config,
    model: TransformerConfig,
    shardings: Mapping[str, NamedSharding],
    optimizer: Any,
    abstract: TrainState,
    manager: CheckpointManager,
    data: PackedDataset,
) -> tuple[TrainState, Params, EarlyStopping]:
    """(state, frozen parameters, early stopping): of the newest checkpoint, or before the first step."""
    latest = manager.latest_step()
    if latest is None:
        trainable, frozen = split_params(open_params(config, model, shardings), config.model.freeze)
        return init_state(trainable, optimizer), frozen, EarlyStopping()
    saved = manager.read_meta(latest)["data"]
    changed = [
        f"{name}: {saved.get(name)} -> {now}" for name, now in data.fingerprint_fields.items() if saved.get(name) != now
    ]
    if changed:
        raise ConfigError(
            f"config.run.dir: {config.run.dir} has a checkpoint of step {latest} that was trained on other data or in "
            f"another order ({'; '.join(changed)}). Restore the old settings, or start in a new config.run.dir."
        )
    restored, meta = manager.restore(latest, vars(abstract))
    frozen = {}
    if config.model.freeze:
        _, frozen = split_params(open_params(config, model, shardings), config.model.freeze)
    return TrainState(**restored), frozen, EarlyStopping.from_json(meta["stopping"])


def place_batches(data: PackedDataset, mesh: Mesh, batch_size: int) -> Callable[[int], Iterator[Batch]]:
    """First step -> that batch on the mesh, and all after it."""

    def batches(start_step: int = 0) -> Iterator[Batch]:
        rows = data.iterate(start_step, process_index=jax.process_index(), process_count=jax.process_count())
        return (place_batch(batch, mesh, batch_size) for batch in rows)

    return batches


def open_evaluators(config: Config, renderer: Renderer, model: TransformerConfig, mesh: Mesh) -> list[Evaluator]:
    eval_step = jax.jit(make_eval_step(config, model, mesh), out_shardings=replicated(mesh))
    return [
        make_held_out_loss(name, eval_step, place_batches(data, mesh, config.batch.eval_rows))
        for name, data in open_eval_data(config, renderer).items()
    ]


def train_flops_per_token(model: TransformerConfig, length: int) -> float:
    """Forward and backward matmul FLOPs per token: 6 per parameter that multiplies, and causal attention over rows of
    `length`. Source: PaLM (arXiv:2204.02311), appendix B, with half of the attention square."""
    embedding = 0 if model.tie_embeddings else model.vocab_size * model.embed_dim
    attention = 6 * model.num_layers * model.num_heads * model.head_dim * length
    return 6 * (num_params(model) - embedding) + attention


# --- What a run tells ------------------------------------------------------------------------------------------------


def write_run_files(run_dir: epath.Path, config: Config, data: PackedDataset) -> None:
    """`config.json`, `provenance.json` and `data_report.json`."""
    run_dir.mkdir(parents=True, exist_ok=True)
    files = {"config": config.to_dict(), "provenance": describe_environment(config), "data_report": data.report}
    for name, content in files.items():
        (run_dir / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def describe_run(
    console: Console,
    config: Config,
    mesh: Mesh,
    model: TransformerConfig,
    abstract: TrainState,
    data: PackedDataset,
    renderer: Renderer,
) -> None:
    """Once per run: what will train, on what, and the first row with its mask."""
    if jax.process_index() != 0:
        return
    for warning in warnings_for(config):
        console.print(f"warning: {warning}", style="yellow")
    state_bytes = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract)
    )
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    trained = sum(math.prod(leaf.shape) for leaf in abstract.params.values())
    report = data.report
    console.print(f"mesh        {axes} ({jax.devices()[0].device_kind})")
    console.print(f"parameters  {num_params(model):,}, of which {trained:,} train")
    console.print(f"state       {state_bytes / 2**20:,.1f} MiB per device: parameters and optimizer")
    console.print(
        f"data        {report['examples']:,} examples in {report['rows_per_epoch']:,} rows, "
        f"{report['fill_fraction']:.1%} full, {report['supervised_fraction']:.1%} of tokens supervised",
        soft_wrap=True,
    )
    console.print(f"steps       {data.num_steps:,} of {config.batch.batch_size} rows of {config.data.max_seq_len}")
    console.print("first row   green is trained on, dim is only read:")
    console.print(preview_row(data.row(0), renderer.tokenizer), soft_wrap=True)


def main(args: list[str]) -> int:
    """The command `python -m sft_jax.main`."""
    parser = config_parser("python -m sft_jax.main", "Fine-tune.", "python -m sft_jax.main --config=configs/demo.py")
    config = parse_config(parser, args)
    try:
        run(config)
    except Preempted as stop:
        print(f"preempted: {stop}", file=sys.stderr)
        return PREEMPTED_EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
