"""Config in, the parts of an experiment out: each function opens one of them, and none of them trains."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import optax
from etils import epath
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from sft_jax.checkpoint.hf import grow_sources, load_pretrained, open_sources, read_config
from sft_jax.checkpoint.manager import CheckpointManager
from sft_jax.checkpoint.param_source import ParamSource
from sft_jax.config_schema import Config
from sft_jax.data import rendering
from sft_jax.data.pipeline import PackedDataset, open_dataset
from sft_jax.data.rendering import Renderer
from sft_jax.datatypes import ConfigError
from sft_jax.model.families import TransformerConfig
from sft_jax.model.presets import preset_config
from sft_jax.model.transformer import Params, abstract_params, init_params, logical_dims
from sft_jax.sharding import Batch, build_mesh, check_batch_divides, place_batch, replicated, shardings_for
from sft_jax.training.evaluation import Evaluator, make_held_out_loss
from sft_jax.training.loop import EarlyStopping
from sft_jax.training.optimizer import build_optimizer
from sft_jax.training.state import TrainState, abstract_state, init_state, split_params
from sft_jax.training.step import make_eval_step
from sft_jax.typing import Array


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
        rows = data.iterate(start_step, process_index=jax.process_index(), process_count=jax.process_count())
        return (place_batch(batch, mesh, batch_size) for batch in rows)

    return batches


def open_model_config(config: Config, renderer: Renderer) -> TransformerConfig:
    """The architecture, from the folder or the preset, with a row of the embedding for every id of the tokenizer.

    Raises:
      ConfigError: the folder is not what `config.model.preset` says.
    """
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
    return dataclasses.replace(model, vocab_size=max(model.vocab_size, renderer.tokenizer.vocab_size))


@dataclasses.dataclass(frozen=True)
class ModelOnMesh:
    """A model, its optimizer and where every array of both lives; no array yet."""

    config: Config
    model: TransformerConfig
    mesh: Mesh | AbstractMesh
    shardings: dict[str, NamedSharding]

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return build_optimizer(self.config.optimizer)

    @cached_property
    def abstract_state(self) -> TrainState:
        shapes = abstract_params(self.model, self.config.model.param_dtype)
        trainable, _ = self.split(shapes)
        return abstract_state(trainable, self.shardings, self.optimizer, self.mesh)

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint of this model may be resumed as, by name."""
        section = self.config.model
        return {
            "config.model.path": section.path or f"{section.preset} {section.overrides}",
            "config.model.param_dtype": section.param_dtype,
            "config.model.freeze": list(section.freeze),
            "config.optimizer.name": self.config.optimizer.name,
        }

    def split(self, params: dict) -> tuple[dict, dict]:
        """(those that train, the frozen ones)."""
        return split_params(params, self.config.model.freeze)

    def open_params(self) -> Params:
        """Pretrained weights, each tensor straight to its shards; random ones where the config names no folder."""
        config = self.config
        dtype = config.model.param_dtype
        if config.model.path:
            return load_pretrained(config.model.path, self.model, self.shardings, dtype)
        init = jax.jit(init_params, static_argnums=(0, 2), out_shardings=self.shardings)
        return init(self.model, jax.random.key(config.run.seed), dtype)

    def open_frozen(self) -> Params:
        """The frozen parameters; they are in no checkpoint, since they do not change."""
        return self.split(self.open_params())[1] if self.config.model.freeze else {}


def place_model(config: Config, renderer: Renderer) -> ModelOnMesh:
    """Check that the model and the batch divide over the mesh.

    Raises:
      ConfigError: they do not; says which size does.
    """
    mesh = build_mesh(config.mesh)
    check_batch_divides(config, mesh)
    model = open_model_config(config, renderer)
    shapes = abstract_params(model, config.model.param_dtype)
    dims = {path: logical_dims(path) for path in shapes}
    return ModelOnMesh(config, model, mesh, shardings_for(mesh, dims, {path: s.shape for path, s in shapes.items()}))


def open_sources_of_step(
    config: Config, renderer: Renderer, manager: CheckpointManager, step: int
) -> tuple[TransformerConfig, dict[str, Array | ParamSource]]:
    """The model and, for each of its parameters, where it lies on disk: in the checkpoint, or in `config.model.path`
    where it was frozen. Neither a mesh nor memory for the model is needed. Frozen random parameters are made again."""
    model = open_model_config(config, renderer)
    trained, frozen = split_params(abstract_params(model, config.model.param_dtype), config.model.freeze)
    sources: dict[str, Array | ParamSource] = dict(manager.open_params(step, trained))
    if frozen and config.model.path:
        stored, _ = read_config(config.model.path)
        base = grow_sources(open_sources(config.model.path, stored), model)
        sources |= {path: base[path] for path in frozen}
    elif frozen:
        sources |= place_model(config, renderer).open_frozen()
    return model, sources


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins: before its first step, or at its newest checkpoint."""

    state: TrainState
    frozen: Params
    stopping: EarlyStopping
    overrides: tuple[dict[str, Any], ...] = ()
    """Each resume on other data that `config.run.override_fingerprint` has let through: its step, and what changed."""


def open_start(placed: ModelOnMesh, manager: CheckpointManager, data: PackedDataset) -> Start:
    """
    Raises:
      ConfigError: the checkpoint is of another model; or on other data or in another order, and the config does not
        override that. Names all that changed.
    """
    latest = manager.latest_step()
    if latest is None:
        trainable, frozen = placed.split(placed.open_params())
        return Start(init_state(trainable, placed.optimizer), frozen, EarlyStopping())
    meta = manager.read_meta(latest)
    in_model = describe_changes(meta["model"], placed.identity)
    in_data = refuse_changes(placed.config, latest, meta["data"], data.fingerprint_fields, in_model)
    overrides = tuple(meta["overrides"])
    if in_data:
        overrides += ({"step": latest, "changes": in_data},)
    restored, meta = manager.restore(latest, vars(placed.abstract_state))
    return Start(TrainState(**restored), placed.open_frozen(), EarlyStopping.from_json(meta["stopping"]), overrides)


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
        way_on = "" if in_model else ", or go on with the new data by --override-fingerprint"
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
