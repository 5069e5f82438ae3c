"""Config in, the parts of an experiment out: each function opens one of them, and none of them trains."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from sft_jax.checkpoint.hf import digest_weights, grow_sources, held_arrays, load_pretrained, open_sources, read_config
from sft_jax.checkpoint.manager import CheckpointManager
from sft_jax.checkpoint.merged_source import MergedSource
from sft_jax.checkpoint.param_source import ParamSource, read_box
from sft_jax.checkpoint.peft import load_adapter, module_names
from sft_jax.checkpoint.quantized_source import HeldArray
from sft_jax.config_schema import Config, MeshConfig
from sft_jax.data import rendering
from sft_jax.data.pipeline import PackedDataset, open_dataset
from sft_jax.data.rendering import Renderer
from sft_jax.datatypes import ConfigError
from sft_jax.model.families import TransformerConfig
from sft_jax.model.linear import ADAPTERS
from sft_jax.model.lora import Kernel, Leaf, find_kernels, init_adapters, lay_out, match_names, merge_adapters
from sft_jax.model.presets import preset_config
from sft_jax.model.quantized import SCALES
from sft_jax.model.router import dtype_among
from sft_jax.model.transformer import Params, abstract_params, init_params, logical_dims
from sft_jax.sharding import (
    Batch,
    build_abstract_mesh,
    build_mesh,
    check_batch_divides,
    num_parts,
    place_batch,
    replicated,
    shardings_for,
)
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

    @cached_property
    def kernels(self) -> dict[str, Kernel]:
        """The linear maps of the layers, those that may have an adapter."""
        return find_kernels(self.model, self._base)

    @cached_property
    def _base(self) -> dict[str, jax.ShapeDtypeStruct]:
        return abstract_params(self.model, self.config.model.param_dtype)

    @cached_property
    def leaves(self) -> tuple[dict[str, Leaf], dict[str, Leaf]]:
        """(the parameters that train, the frozen ones)."""
        section, lora = self.config.model, self.config.lora
        frozen_dtype = section.frozen_dtype or section.param_dtype
        if lora.rank:
            targets, saved = choose_modules(self.config, self.model, self.kernels)
            whole = {path for path in self._base if path.rpartition(".")[0] in saved}
            return lay_out(self._base, self.kernels, targets, whole, lora, frozen_dtype)
        trainable, frozen = split_params(self._base, section.freeze)
        leaf = lambda path, dtype: Leaf(logical_dims(path), self._base[path].shape, dtype_among(path, dtype))  # noqa: E731
        return {p: leaf(p, section.param_dtype) for p in trainable}, {p: leaf(p, frozen_dtype) for p in frozen}

    @cached_property
    def shardings(self) -> dict[str, NamedSharding]:
        trainable, frozen = self.leaves
        leaves = trainable | frozen
        dims, shapes = ({path: getattr(leaf, name) for path, leaf in leaves.items()} for name in ("dims", "shape"))
        for path in shapes:
            if path.endswith(f".{SCALES}"):  # small enough to be everywhere, where there are fewer blocks than parts
                fits = (
                    size % num_parts(self.mesh, dim) == 0 for dim, size in zip(dims[path], shapes[path], strict=True)
                )
                dims[path] = tuple(dim if fit else None for dim, fit in zip(dims[path], fits, strict=True))
        return shardings_for(self.mesh, dims, shapes)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return build_optimizer(self.config.optimizer)

    @cached_property
    def abstract_state(self) -> TrainState:
        trainable = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in self.leaves[0].items()}
        return abstract_state(trainable, self.shardings, self.optimizer, self.mesh)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint of this model may be resumed as, by name."""
        section, lora = self.config.model, self.config.lora
        identity = {
            "config.model.path": section.path or f"{section.preset} {section.overrides}",
            "config.model.param_dtype": section.param_dtype,
            "config.model.freeze": list(section.freeze),
            "config.optimizer.name": self.config.optimizer.name,
        }
        if self.leaves[1]:
            identity["config.model.frozen_dtype"] = section.frozen_dtype
            identity["weights in config.model.path"] = digest_weights(section.path) if section.path else ""
        if lora.rank:
            options = dataclasses.asdict(lora)
            kept = ("rank", "alpha", "use_rslora", "use_dora", "targets", "modules_to_save", "quantize")
            identity |= {f"config.lora.{name}": options[name] for name in kept}
        return json.loads(json.dumps(identity))  # as a checkpoint gives it back

    def open_params(self) -> tuple[Params, Params]:
        """(those that train, the frozen ones), before the first step: pretrained weights, each tensor straight to its
        shards, or random ones where the config names no folder; and adapters that change nothing yet, or those of
        `config.lora.init_from`."""
        base, lora = self._open_base(), self.config.lora
        trainable = {path: base.pop(path) for path in self.leaves[0] if path in base}
        if lora.init_from:
            shapes = {path: leaf.shape for path, leaf in self.leaves[0].items()}
            dtype = self.config.model.param_dtype
            return load_adapter(lora.init_from, self.model, lora, shapes, self.shardings, dtype), base
        adapters = {path: leaf for path, leaf in self.leaves[0].items() if path not in trainable}
        if adapters:
            init = partial(init_adapters, adapters, self.kernels)
            shardings = {path: self.shardings[path] for path in adapters}
            trainable |= jax.jit(init, out_shardings=shardings)(base, jax.random.key(self.config.run.seed))
        return trainable, base

    def open_frozen(self) -> Params:
        """The frozen parameters; they are in no checkpoint, since they do not change."""
        if not self.leaves[1]:
            return {}
        base = self._open_base()
        return {path: base[path] for path in self.leaves[1]}

    def merge(self, params: Params) -> Params:
        """The plain model of these parameters: adapters added to their kernels, quantized kernels decoded."""
        if not self.config.lora.rank:
            return params
        return dict(
            merge_adapters(params, self.kernels, self.config.lora.scale, jnp.dtype(self.config.model.param_dtype))
        )

    def merge_sources(
        self, base: Mapping[str, ParamSource], trained: Mapping[str, ParamSource]
    ) -> dict[str, MergedSource]:
        """`merge` of sources: those kernels that are not the base's own."""
        merged = {}
        for module, kernel in self.kernels.items():
            path, dtype = f"{module}.kernel", self.config.model.param_dtype
            names = [name for name in ADAPTERS if f"{module}.{name}" in trained]
            if path in trained or (not names and path in self.leaves[1]):
                continue
            held = held_arrays(path, base[path], self._base_dtypes[path], self.model)
            parts = {held_path.rpartition(".")[2]: array for held_path, array in held.items()}
            for name in names:
                source = trained[f"{module}.{name}"]
                parts[name] = HeldArray(source.shape, partial(read_box, source, dtype=dtype))
            merged[path] = MergedSource(base[path], parts, len(kernel.outs), self.config.lora.scale)
        return merged

    @cached_property
    def _base_dtypes(self) -> dict[str, str]:
        """How each parameter of the base is held: a dtype, or a format of quantized.py."""
        trainable, frozen = self.leaves
        return {
            path: str(trainable[path].dtype) if path in trainable
            else str(frozen[path].dtype) if path in frozen
            else self.config.lora.quantize
            for path in self._base
        }  # fmt: skip

    def _open_base(self) -> Params:
        """The parameters of the model without adapters, as they are held."""
        config, dtypes = self.config, self._base_dtypes
        if config.model.path:
            return load_pretrained(config.model.path, self.model, self.shardings, dtypes)

        def init(key: Array) -> Params:
            params = init_params(self.model, key, config.model.param_dtype)
            return {path: value.astype(dtypes[path]) for path, value in params.items()}

        shardings = {path: self.shardings[path] for path in self._base}
        return jax.jit(init, out_shardings=shardings)(jax.random.key(config.run.seed))


def choose_modules(
    config: Config, model: TransformerConfig, kernels: Mapping[str, Kernel]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(modules that get an adapter, modules that train whole), by path.

    Raises:
      ConfigError: a name finds nothing, a module is both, or tokens are new and their rows would never train.
    """
    names, lora = module_names(model), config.lora
    of_kernels = {path: called for path, called in names.items() if path in kernels}
    targets = match_names(of_kernels, lora.targets, "config.lora.targets")
    saved = match_names(names, lora.modules_to_save, "config.lora.modules_to_save")
    both = sorted(set(targets) & set(saved))
    if both:
        raise ConfigError(f"config.lora: {both[0]} is in targets and in modules_to_save. Take it out of one.")
    untrained = sorted({"embed", "head"} & names.keys() - set(saved))
    if config.data.new_tokens and untrained:
        raise ConfigError(
            f"config.lora.modules_to_save: leaves out {' and '.join(untrained)}, and config.data.new_tokens adds "
            "tokens, whose rows would never train. Add embed_tokens, and lm_head where the model has its own."
        )
    return targets, saved


def place_model(config: Config, renderer: Renderer) -> ModelOnMesh:
    """Check that the model and the batch divide over the mesh.

    Raises:
      ConfigError: they do not, and says which size does; or config.lora names what the model has not.
    """
    mesh = build_mesh(config.mesh)
    check_batch_divides(config, mesh)
    placed = ModelOnMesh(config, open_model_config(config, renderer), mesh)
    assert placed.shardings  # made now, so that a wrong size or name is said before anything is read
    return placed


def open_sources_of_step(
    config: Config, renderer: Renderer, manager: CheckpointManager, step: int
) -> tuple[TransformerConfig, dict[str, Array | ParamSource]]:
    """The plain model and, for each of its parameters, where it lies on disk: in the checkpoint; in `config.model.path`
    where it was frozen; of a kernel with an adapter, in both. Neither a mesh nor memory for the model is needed. Frozen
    random parameters are made again."""
    model = open_model_config(config, renderer)
    placed = ModelOnMesh(config, model, build_abstract_mesh(MeshConfig(fsdp=1), 1))
    if placed.leaves[1] and not config.model.path:
        on_mesh = place_model(config, renderer)
        trained = manager.restore_params(step, on_mesh.abstract_state.params)
        return model, dict(on_mesh.merge(trained | on_mesh.open_frozen()))
    opened = manager.open_params(step, placed.leaves[0])
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
        trainable, frozen = placed.open_params()
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
