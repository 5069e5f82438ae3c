"""Config in, the parts of an experiment out: each function opens one of them, and none of them trains."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import logging
from etils import epath
from jax.sharding import AbstractMesh, Mesh, SingleDeviceSharding

from sft_jax.checkpoint.hf import grow_sources, open_sources, read_config
from sft_jax.checkpoint.hf_names import EMBEDDING, HEAD
from sft_jax.checkpoint.param_source import ParamSource
from sft_jax.checkpoint.reader import CheckpointReader
from sft_jax.config_schema import Config, MeshConfig
from sft_jax.data import rendering
from sft_jax.data.pipeline import PackedDataset, open_dataset
from sft_jax.data.rendering import Renderer
from sft_jax.datatypes import ConfigError
from sft_jax.model.families import TransformerConfig, longest_text
from sft_jax.model.presets import preset_config
from sft_jax.model.transformer import Params
from sft_jax.placed_model import BASE_WEIGHTS, OF_MODEL, ModelOnMesh
from sft_jax.sharding import (
    Batch,
    build_abstract_mesh,
    build_mesh,
    check_batch_divides,
    place_batch,
    replicated,
    rows_of_process,
)
from sft_jax.training.evaluation import Evaluator, make_held_out_loss
from sft_jax.training.loop import Memory
from sft_jax.training.optimizer import build_schedule
from sft_jax.training.state import TrainState, init_state
from sft_jax.training.step import make_eval_step, make_train_step
from sft_jax.typing import Array

COMPILER_OPTIONS: dict[str, dict[str, str | int]] = {
    # A product is not cut into pieces that are made while its other factor is gathered, whatever its size in MiB: each
    # piece reads and writes the whole result in memory (docs/scaling.md, "What the compiler is told").
    "tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000},
}
"""What XLA is told of a platform beside the program; a run and its plan tell it the same."""


def use_compilation_cache(config: Config) -> None:
    if config.run.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(epath.Path(config.run.compilation_cache).expanduser()))


def open_renderer(config: Config) -> Renderer:
    """The tokenizer and the chat template, held against each other."""
    return rendering.open_renderer(config.data, config.model.path)


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
        held_out=config.data.eval,
    )


def open_eval_data(config: Config, renderer: Renderer) -> dict[str, PackedDataset]:
    """Every set of `config.data.eval` by name: one pass, in a fixed order."""
    rows = config.batch.eval_rows
    sets = [
        open_dataset((source,), config, renderer, batch_size=rows, num_epochs=1, num_steps=None, shuffle=False)
        for source in config.data.eval
    ]
    return {data.source_names[0]: data for data in sets}


def place_batches(data: PackedDataset, mesh: Mesh | AbstractMesh, batch_size: int) -> Callable[..., Iterator[Batch]]:
    """First step (0) -> that batch on the mesh, and all after it."""

    def batches(start_step: int = 0) -> Iterator[Batch]:
        batches_of_rows = data.iterate(start_step, rows_of_process(mesh, batch_size))
        return (place_batch(batch, mesh, batch_size) for batch in batches_of_rows)

    return batches


def open_model_config(config: Config, renderer: Renderer) -> TransformerConfig:
    """The architecture, from the folder or the preset, with a row of the embedding for every id of the tokenizer.

    Raises:
      ConfigError: the folder is not what `config.model.preset` says.
    """
    model = read_model_config(config)
    return dataclasses.replace(model, vocab_size=max(model.vocab_size, renderer.tokenizer.vocab_size))


def read_model_config(config: Config) -> TransformerConfig:
    """The same without a tokenizer, whose new tokens would have rows of their own."""
    if not config.model.path:
        model = preset_config(config.model.preset, config.model.overrides)
    else:
        model, _ = read_config(config.model.path)
        expected = preset_config(config.model.preset, {}) if config.model.preset else model
        fields = [field.name for field in dataclasses.fields(model)]
        differing = [
            f"{name} {getattr(model, name)} for {getattr(expected, name)}"
            for name in fields
            if getattr(model, name) != getattr(expected, name)
        ]
        if differing:
            raise ConfigError(
                f"config.model.path: {config.model.path} is not a {config.model.preset}: {', '.join(differing)}. "
                "Name the right folder, or leave config.model.preset empty."
            )
    return model


def warnings_for_model(config: Config, model: TransformerConfig) -> list[str]:
    """What of a config is allowed and seldom meant, given the model; said once at the start."""
    length, longest = config.data.max_seq_len, longest_text(model)
    if length <= longest:
        return []
    return [
        f"config.data.max_seq_len: is {length:,}, and the model was made for texts of {longest:,} tokens "
        "(max_position_embeddings, and what its rope_scaling adds). Longer examples reach where it has seen no token, "
        f"and servers refuse or cut such texts. Set {longest} or less, or have a rope_scaling in the model's "
        "config.json that reaches so far. Longer rows of shorter examples do no harm."
    ]


def place_model(config: Config, renderer: Renderer) -> ModelOnMesh:
    """Check that the model and the batch divide over the mesh.

    Raises:
      ConfigError: they do not, and says which size does; config.lora names what the model has not; or tokens are new
        and their rows would never train.
    """
    mesh = build_mesh(config.mesh)
    check_batch_divides(config, mesh)
    placed = ModelOnMesh(config, open_model_config(config, renderer), mesh)
    assert placed.shardings  # made now, so that a wrong size or name is said before anything is read
    check_new_rows_train(placed, read_model_config(config).vocab_size)
    return placed


def check_new_rows_train(placed: ModelOnMesh, num_old: int) -> None:
    """Raises ConfigError where tokens are new and embedding or head are frozen: the base has `num_old` rows."""
    config, num_new = placed.config, placed.model.vocab_size - num_old
    untrained = [path for path in (EMBEDDING.path, HEAD.path) if path in placed.leaves[1]]
    if not untrained or not (config.data.new_tokens or num_new):
        return
    what = (
        "config.data.new_tokens adds tokens" if config.data.new_tokens else f"the tokenizer has {num_new} more tokens"
    )
    frozen = " and ".join(untrained)
    if config.lora.rank:
        raise ConfigError(
            f"config.lora.modules_to_save: leaves out {frozen}, and {what}, whose rows would never train. Add "
            "embed_tokens, and lm_head where the model has its own."
        )
    raise ConfigError(
        f"config.model.freeze: freezes {frozen}, and {what}, whose rows would never train. Take the pattern out."
    )


def jit_train_step(placed: ModelOnMesh, num_steps: int, num_sources: int) -> jax.stages.Wrapped:
    """The compiled step: the old state's memory is given to the new one, and metrics are on every device."""
    config = placed.config
    schedule = build_schedule(config.schedule, config.optimizer.learning_rate, num_steps)
    step = make_train_step(config, placed.model, placed.optimizer, schedule, placed.mesh, num_sources=num_sources)
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, placed.abstract_state)
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(state_shardings, replicated(placed.mesh)),
        compiler_options=_known_options(placed.mesh) if isinstance(placed.mesh, Mesh) else None,
    )


def _known_options(mesh: Mesh) -> dict[str, str | int] | None:
    """COMPILER_OPTIONS of the platform, or none where its XLA, another version, refuses them."""
    device = next((one for one in mesh.devices.flat if one.process_index == jax.process_index()), mesh.devices.flat[0])
    options = COMPILER_OPTIONS.get(device.platform)
    if options is None:
        return None
    nothing = jax.ShapeDtypeStruct((), "float32", sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(nothing).compile()
    except jax.errors.JaxRuntimeError as error:
        logging.warning("the compiler does not take %s, and goes without: %s", options, error)
        return None
    return options


def open_sources_of_step(
    config: Config, renderer: Renderer, reader: CheckpointReader, step: int
) -> tuple[TransformerConfig, dict[str, Array | ParamSource]]:
    """The plain model and, for each of its parameters, where it lies on disk: in the checkpoint; in `config.model.path`
    where it was frozen; of a kernel with an adapter, in both. Neither a mesh nor memory for the model is needed. Frozen
    random parameters are made again."""
    model = open_model_config(config, renderer)
    check_model(config, model, reader, step)
    placed = ModelOnMesh(config, model, build_abstract_mesh(MeshConfig(fsdp=1), 1))
    if placed.leaves[1] and not config.model.path:
        on_mesh = place_model(config, renderer)
        trained = reader.restore_params(step, on_mesh.abstract_state.params)
        return model, dict(on_mesh.merge(trained | on_mesh.open_frozen()))
    opened = reader.open_params(step, placed.leaves[0])
    if not placed.leaves[1]:
        return model, dict(opened)
    stored, _ = read_config(config.model.path)
    base = grow_sources(open_sources(config.model.path, stored), model)
    merged = placed.merge_sources(base, opened) if config.lora.rank else {}
    sources: dict[str, Array | ParamSource] = {path: opened.get(path, source) for path, source in base.items()}
    return model, sources | merged


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins: before its first step, or at its newest checkpoint."""

    state: TrainState
    frozen: Params
    memory: Memory
    overrides: tuple[dict[str, Any], ...] = ()
    """Each resume on other data that `config.run.override_fingerprint` has let through: its step, and what changed."""
    passed_over: tuple[str, ...] = ()
    """What passes for a newer checkpoint, and why it was not taken."""


def open_start(placed: ModelOnMesh, reader: CheckpointReader, data: PackedDataset) -> Start:
    """
    Raises:
      ConfigError: the checkpoint is of another model; or on other data or in another order, and the config does not
        override that. Names all that changed.
      StorageError: there are checkpoints, and none is whole.
    """
    found = reader.find_restorable()
    latest, passed_over = found.step, tuple(found.rejected)
    if latest is None:
        trainable, frozen = placed.open_params()
        memory = Memory.from_meta({}, placed.config.spikes)
        state = init_state(trainable, placed.optimizer, placed.config.optimizer.offload)
        return Start(state, frozen, memory, passed_over=passed_over)
    meta = reader.read_meta(latest)
    in_model = describe_changes(meta["model"], placed.identity)
    in_data = refuse_changes(placed.config, latest, meta["data"], data.fingerprint_fields, in_model)
    overrides = tuple(meta["overrides"])
    if in_data:
        overrides += ({"step": latest, "changes": in_data},)
    restored, meta = reader.restore(latest, vars(placed.abstract_state))
    memory = Memory.from_meta(meta, placed.config.spikes)
    return Start(TrainState(**restored), placed.open_frozen(), memory, overrides, passed_over)


def check_model(config: Config, model: TransformerConfig, reader: CheckpointReader, step: int) -> None:
    """Raises ConfigError where the model in `config.model.path` is not the one that a run trained: its config.json says
    other things, or, where parameters are frozen, its weights are others."""
    placed = ModelOnMesh(config, model, build_abstract_mesh(MeshConfig(fsdp=1), 1))
    saved = reader.read_meta(step)["model"]
    names = [name for name in saved if name == BASE_WEIGHTS or name.endswith(OF_MODEL)]
    saved, now = ({name: all_of[name] for name in names if name in all_of} for all_of in (saved, placed.identity))
    changes = describe_changes(saved, now)
    if changes:
        listed = "\n".join(f"  {change}" for change in changes)
        raise ConfigError(
            f"config.model.path: {config.model.path} is not the model that {config.run.dir} trained, and what it "
            f"learned means nothing in another:\n{listed}\nRestore it."
        )


def export_dtypes(config: Config) -> str | dict[str, str]:
    """That of each parameter in `config.model.path`, by path, so that bfloat16 stays bfloat16; without a folder, the
    one of all parameters."""
    if not config.model.path:
        return config.model.param_dtype
    stored, _ = read_config(config.model.path)
    return {path: source.dtype.name for path, source in open_sources(config.model.path, stored).items()}


def refuse_changes(
    config: Config, step: int, saved: Mapping[str, Any], now: Mapping[str, Any], in_model: Sequence[str] = ()
) -> list[str]:
    """What of a run's data is not what its checkpoint of `step` has, which `override_fingerprint` lets through.

    Raises:
      ConfigError: as `open_start`.
    """
    in_data = describe_changes(saved, now)
    if in_model or (in_data and not config.run.override_fingerprint):
        changed = "\n".join(f"  {change}" for change in [*in_model, *in_data])
        way_on = "" if in_model else ", or go on with the new data: `sft-jax train --override-fingerprint`"
        raise ConfigError(
            f"config.run.dir: {config.run.dir} has a checkpoint of step {step} of another model, on other data or in "
            f"another order:\n{changed}\nRestore what it was, name a new config.run.dir{way_on}."
        )
    return in_data


def describe_changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between the fields of a checkpoint and those of now, a line for each. A source that is gone or new
    is one line."""
    changes = []
    for name in {**saved, **now}:
        source, _, field = name.rpartition(".")
        of_source = source.endswith("]")
        if name not in now:
            if not of_source or field == "path":
                changes.append(f"{source if of_source else name}: is no longer there")
        elif name not in saved:
            if not of_source or field == "path":
                changes.append(f"{source if of_source else name}: is new")
        elif saved[name] != now[name]:
            digests = _is_digest(saved[name]) or _is_digest(now[name])
            changes.append(f"{name}: " + ("its content changed" if digests else f"{saved[name]} -> {now[name]}"))
    return changes


def _is_digest(value: Any) -> bool:
    """sha256 in hex, or a list of them, which tells nobody anything."""
    values = value if isinstance(value, list) else [value]
    return any(isinstance(item, str) and re.fullmatch("[0-9a-f]{64}", item) for item in values)


def open_evaluators(placed: ModelOnMesh, renderer: Renderer) -> list[Evaluator]:
    """One for each held-out set."""
    eval_step = jax.jit(make_eval_step(placed.config, placed.model, placed.mesh), out_shardings=replicated(placed.mesh))
    rows = placed.config.batch.eval_rows
    return [
        make_held_out_loss(name, eval_step, place_batches(data, placed.mesh, rows))
        for name, data in open_eval_data(placed.config, renderer).items()
    ]
