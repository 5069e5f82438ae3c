"""ConfigDict in, frozen dataclasses out: the door through which every option enters, and every cross-field check.

A file in `configs/` starts from `default_config()` and sets only what differs:

    from sft_jax.config import default_config

    def get_config():
        config = default_config()
        config.model.path = "models/llama-3.1-8b"
        config.data.train = [dict(path="chats.jsonl")]
        return config

`from_config_dict` is the only door: it refuses unknown keys and wrong types, runs every check, and reports all errors
together. Below it there are no defaults and no look-ups by string.
"""

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Collection
from typing import Any

import ml_collections
from ml_collections import config_dict

from sft_jax.config_schema import Config, DataConfig, SourceConfig, source_name
from sft_jax.datatypes import ConfigError
from sft_jax.row_formats import FIELD_NAMES, FORMATS
from sft_jax.row_reasons import REASONS

MESH_AXES = ("replica", "fsdp", "context", "tensor", "expert")


def default_config() -> ml_collections.ConfigDict:
    """The defaults as a ConfigDict whose keys are locked: a misspelt key is an error where it is written."""
    return _to_config_dict(Config())


def _to_config_dict(section: Any) -> ml_collections.ConfigDict:
    out = ml_collections.ConfigDict()
    hints = typing.get_type_hints(type(section))
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if dataclasses.is_dataclass(value):
            out[f.name] = _to_config_dict(value)
        elif isinstance(value, dict):
            out[f.name] = ml_collections.ConfigDict(value)  # free keys: left unlocked below
        elif value is None:  # a placeholder knows its type, so that --config.a.b=3 is read as a number
            out[f.name] = config_dict.placeholder(_non_none(hints[f.name]))
        else:
            out[f.name] = value
    out.lock()
    for f in dataclasses.fields(section):
        if isinstance(getattr(section, f.name), dict):
            out[f.name].unlock()
    return out


def from_config_dict(values: ml_collections.ConfigDict | dict[str, Any]) -> Config:
    """Convert and check.

    Raises:
      ConfigError: with every unknown key, wrong type and failed check, each by its full dotted path.
    """
    if isinstance(values, ml_collections.ConfigDict):
        values = values.to_dict()
    errors: list[str] = []
    config = _read_section(Config, values, "config", errors)
    if not errors:
        errors = validate(config)
    if errors:
        raise ConfigError("\n".join(errors))
    return config


def _read_section(cls: Any, values: Any, path: str, errors: list[str]) -> Any:
    if not isinstance(values, dict):
        errors.append(f"{path}: is {values!r}; expected a section with the fields of {cls.__name__}.")
        return cls()
    fields = {f.name for f in dataclasses.fields(cls)}
    for key in values.keys() - fields:
        close = difflib.get_close_matches(str(key), fields, n=1)
        hint = f"Did you mean {path}.{close[0]}?" if close else f"Known: {', '.join(sorted(fields))}."
        errors.append(f"{path}.{key}: no such field. {hint}")
    hints = typing.get_type_hints(cls)
    read = {}
    for key in fields & values.keys():
        before = len(errors)
        value = _read(hints[key], values[key], f"{path}.{key}", errors)
        if len(errors) == before:
            read[key] = value
    return cls(**read)


def _read(hint: Any, value: Any, path: str, errors: list[str]) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _read_section(hint, value, path, errors)
    if origin is types.UnionType:
        return None if value is None else _read(_non_none(hint), value, path, errors)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_read(args[0], item, f"{path}[{i}]", errors) for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        item_hint = args[1]
        if item_hint is Any:
            return dict(value)
        return {key: _read(item_hint, item, f"{path}.{key}", errors) for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    expected = hint.__name__ if isinstance(hint, type) and not args else str(hint).replace("sft_jax.config.", "")
    errors.append(f"{path}: is {value!r} ({type(value).__name__}); expected {expected}.")
    return value


def _non_none(hint: Any) -> Any:
    return next(arg for arg in typing.get_args(hint) if arg is not types.NoneType)


_CHOICES: dict[str, tuple[str, ...]] = {
    "model.param_dtype": ("float32", "bfloat16", "float64"),
    "model.frozen_dtype": ("", "float32", "bfloat16", "float64"),
    "model.compute_dtype": ("float32", "bfloat16", "float64"),
    "model.attention": ("reference", "splash", "pallas_gpu"),
    "model.remat": ("none", "dots", "attention", "full", "offload", "offload_attention"),
    "data.packing": ("best_fit", "none"),
    "data.supervise": ("all", "last", "weighted"),
    "data.averaging": ("token", "example"),
    "loss.router_tokens": ("all", "supervised"),
    "data.row_order": ("shuffled", "longest_first"),
    "data.too_long": ("error", "drop", "drop_early_turns", "split_turns", "truncate"),
    "data.unknown_tokens": ("error", "drop", "keep"),
    "data.eval_overlap": ("error", "drop", "keep"),
    "lora.quantize": ("none", "int8", "int4", "nf4"),
    "optimizer.name": ("adamw", "adafactor", "lion", "sgd"),
    "optimizer.accum_dtype": ("float32", "bfloat16", "float64"),
    "optimizer.moment_dtype": ("float32", "bfloat16", "float64"),
    "schedule.name": ("cosine", "linear", "constant", "wsd"),
}
_SOURCE_FORMATS = ("auto", *FORMATS)
_POLICIES = ("error", "drop", "keep")
_SPLITS = ("all", "train", "held_out")
_AT_LEAST: dict[str, float] = {
    "data.max_seq_len": 2, "data.read_threads": 0, "data.prepare_processes": 0, "data.max_segments_per_row": 0,
    "batch.batch_size": 1, "batch.grad_accum_steps": 1, "batch.eval_batch_size": 0,
    "loss.z_loss_weight": 0, "loss.label_smoothing": 0, "loss.chunk_tokens": 1, "loss.router_balance_weight": 0,
    "loss.router_z_loss_weight": 0,
    "model.neftune_alpha": 0, "optimizer.learning_rate": 0, "optimizer.weight_decay": 0, "optimizer.grad_clip_norm": 0,
    "optimizer.max_skipped_steps": 1, "schedule.num_epochs": 1, "schedule.num_steps": 1, "schedule.warmup_steps": 0,
    "schedule.warmup_fraction": 0, "schedule.final_fraction": 0, "schedule.decay_fraction": 0,
    "lora.rank": 0, "lora.dropout": 0,
    "evaluation.every_steps": 0, "evaluation.stop_patience": 1, "checkpoint.every_steps": 0,
    "checkpoint.keep_latest": 1, "checkpoint.keep_every": 0, "log.every_steps": 1, "run.seed": 0,
    "data.max_bad_fraction": 0, "data.prompt_loss_weight": 0,
    "optimizer.b1": 0, "optimizer.b2": 0, "optimizer.eps": 0,
    "spikes.window": 0, "spikes.threshold": 0, "spikes.max_rewinds": 1,
    "watch.stall_factor": 0, "watch.stall_seconds": 0.1, "watch.replicas_every": 0, "watch.replay_every": 0,
}  # fmt: skip
_AT_MOST: dict[str, float] = {
    "data.max_bad_fraction": 1, "data.prompt_loss_weight": 1,
    "schedule.warmup_fraction": 1, "schedule.final_fraction": 1,
    "schedule.decay_fraction": 1, "run.seed": 2**31 - 1,
}  # fmt: skip
# Fields that only some optimizers or schedules read; set for another one they are an error, never ignored.
_ONLY_FOR: dict[str, tuple[str, ...]] = {
    "optimizer.b1": ("adamw", "lion", "sgd"),
    "optimizer.b2": ("adamw", "lion"),
    "optimizer.eps": ("adamw",),
    "schedule.final_fraction": ("cosine", "linear", "wsd"),
    "schedule.decay_fraction": ("wsd",),
}


def validate(config: Config) -> list[str]:
    """All errors of a config, each beginning with its dotted path; empty when it is good."""
    errors: list[str] = []

    def require(ok: bool, path: str, message: str) -> None:
        if not ok:
            errors.append(f"config.{path}: {message}")

    def get(path: str) -> Any:
        section, name = path.split(".")
        return getattr(getattr(config, section), name)

    for section in dataclasses.fields(config):
        for f in dataclasses.fields(getattr(config, section.name)):
            value = getattr(getattr(config, section.name), f.name)
            finite = not isinstance(value, float) or math.isfinite(value)
            require(finite, f"{section.name}.{f.name}", f"is {value}; expected a finite number.")
    for path, choices in _CHOICES.items():
        require(get(path) in choices, path, f"is {get(path)!r}; expected one of {', '.join(choices)}.")
    for path, low in _AT_LEAST.items():
        require(get(path) is None or get(path) >= low, path, f"is {get(path)}; expected at least {low}.")
    for path, high in _AT_MOST.items():
        require(get(path) is None or get(path) <= high, path, f"is {get(path)}; expected at most {high}.")
    for path, users in _ONLY_FOR.items():
        name = get(path.split(".")[0] + ".name")
        require(get(path) is None or name in users, path, f"is set, but {name} has no such parameter. Leave it None.")

    model, data, batch, mesh = config.model, config.data, config.batch, config.mesh
    require(bool(model.path or model.preset), "model.path", "is empty, and so is model.preset. Set one of them.")
    require(not (model.overrides and model.path), "model.overrides", "change a preset, and model.path is a folder.")
    require(bool(data.tokenizer or model.path), "data.tokenizer", "is empty, and so is model.path. Name a tokenizer.")
    require(bool(data.train), "data.train", "is empty. Name at least one source: [dict(path='chats.jsonl')].")
    for group, sources in (("train", data.train), ("eval", data.eval)):
        names = [source_name(source) for source in sources]
        for i, source in enumerate(sources):
            path = f"data.{group}[{i}]"
            formats = ", ".join(_SOURCE_FORMATS)
            require(bool(source.path), f"{path}.path", "is empty. Name a file, a folder or a pattern.")
            require(source.format in _SOURCE_FORMATS, f"{path}.format", f"is {source.format!r}; expected {formats}.")
            errors.extend(_check_fields(source, path))
            require(names[i] not in names[:i], f"{path}.name", f"{names[i]!r} is used twice. Name each source.")
            errors.extend(f"config.{path}.{error}" for error in _check_share(source, group))
    weighted = [source.weight is not None for source in data.train]
    same = all(weighted) or not any(weighted)
    require(same, "data.train", "has sources with a weight and sources without. Give a weight to all, or to none.")
    errors.extend(_check_held_out_files(data))
    roles = ("system", "user", "assistant", "tool")
    for name, role in data.role_map.items():
        require(role in roles, f"data.role_map.{name}", f"is {role!r}; expected one of {', '.join(roles)}.")
    for reason, policy in data.policies.items():
        problem = _find_policy_problem(reason, policy)
        require(not problem, f"data.policies.{reason}", problem)
    eval_names = ["", *(source_name(source) for source in data.eval)]
    for path in ("evaluation.stop_by", "checkpoint.best_by"):
        require(get(path) in eval_names, path, f"is {get(path)!r}; no set in data.eval has that name.")
    rows, parts = batch.batch_size, batch.grad_accum_steps
    require(parts < 1 or rows % parts == 0, "batch.grad_accum_steps", f"{parts} does not divide batch_size {rows}.")
    narrow = config.optimizer.moment_dtype == "bfloat16"
    small = "is 'bfloat16', and adafactor's moments are small and float32. Set float32, or adamw."
    require(not narrow or config.optimizer.name != "adafactor", "optimizer.moment_dtype", small)
    by_layers = not narrow and config.optimizer.name != "adafactor"
    apart = "is True, and adafactor's moments, or those in bfloat16, have no layers apart. Set False, or change those."
    require(by_layers or not config.optimizer.offload, "optimizer.offload", apart)
    kept, saved = config.checkpoint.keep_every, config.checkpoint.every_steps
    of_saved = saved > 0 and kept % saved == 0
    expected = f"expected a multiple of checkpoint.every_steps, {saved}"
    require(kept <= 0 or of_saved, "checkpoint.keep_every", f"is {kept}; {expected}.")
    require(config.spikes.window > 0 or not config.spikes.rewind, "spikes.rewind", "is true, and spikes.window is 0.")
    for path in ("loss.label_smoothing", "optimizer.b1", "optimizer.b2", "lora.dropout"):
        require(get(path) is None or get(path) < 1, path, f"is {get(path)}; expected below 1.")
    require(bool(config.run.dir), "run.dir", "is empty. Name a folder for the run.")
    for path in ("model.freeze", "lora.targets", "lora.modules_to_save"):
        for pattern in get(path):
            try:
                re.compile(pattern)
            except re.error as error:
                require(False, path, f"{pattern!r} is no regular expression: {error}.")
            flags = re.match(r"\(\?(\w+)\)", pattern)
            mended = f"(?{flags[1]}:{pattern[flags.end() :]})" if flags else ""
            require(not flags, path, f"{pattern!r} sets flags for more than itself. Write {mended!r}.")
    errors.extend(_check_lora(config))
    sizes = [getattr(mesh, axis) for axis in MESH_AXES]
    for axis, size in zip(MESH_AXES, sizes, strict=True):
        require(size == -1 or size >= 1, f"mesh.{axis}", f"is {size}; expected at least 1, or -1 for what is left.")
    require(sizes.count(-1) <= 1, "mesh", "has more than one axis at -1. Leave only one to fill.")
    steps = config.log.profile_steps
    ordered = not steps or (len(steps) == 2 and 0 <= steps[0] <= steps[1])
    require(ordered, "log.profile_steps", f"is {steps}; expected (first, last), or () for none.")
    return errors


def _check_lora(config: Config) -> list[str]:
    """The errors of `config.lora` beyond ranges: no option there is ignored."""
    lora, model = config.lora, config.model
    errors = []
    if lora.rank == 0:
        default = type(lora)()
        changed = [f.name for f in dataclasses.fields(lora) if getattr(lora, f.name) != getattr(default, f.name)]
        errors += [f"config.lora.{name}: is set, and lora.rank is 0. Set a rank, such as 16." for name in changed]
        if model.frozen_dtype and not model.freeze:
            errors.append("config.model.frozen_dtype: is set, and nothing is frozen. Set param_dtype, or lora.rank.")
        return errors
    if lora.alpha <= 0:
        errors.append(f"config.lora.alpha: is {lora.alpha}; expected more than 0.")
    if not lora.targets:
        errors.append("config.lora.targets: is empty. Name the linear maps that get an adapter, such as 'q_proj'.")
    if model.freeze:
        errors.append(
            "config.model.freeze: is set, and lora.rank too, with which all but adapters and lora.modules_to_save is "
            "frozen. Set one of them."
        )
    if lora.quantize != "none" and not model.path:
        errors.append(f"config.lora.quantize: is {lora.quantize!r}, and model.path is empty: no base to quantize.")
    return errors


def _check_fields(source: SourceConfig, path: str) -> list[str]:
    """The errors of a source's field map: what it maps must be read."""
    known = FORMATS[source.format].reads if source.format in FORMATS else FIELD_NAMES
    errors = []
    for name, theirs in source.fields.items():
        if name not in known:
            errors.append(f"config.{path}.fields.{name}: no field of the format {source.format}. {_hint(name, known)}")
        if not theirs:
            errors.append(f"config.{path}.fields.{name}: is empty. Name a field of the rows.")
    return errors


def _find_policy_problem(reason: str, policy: str) -> str:
    """What is wrong with a reason's policy, or an empty string."""
    if reason not in REASONS:
        return f"no such reason. {_hint(reason, REASONS.keys())}"
    if policy not in _POLICIES:
        return f"is {policy!r}; expected one of {', '.join(_POLICIES)}."
    if REASONS[reason].option:
        return f"is decided by config.{REASONS[reason].option}. Set that."
    if policy == "keep" and not REASONS[reason].keep:
        return "is 'keep', and such a row cannot be trained on. Choose error or drop."
    return ""


def _hint(name: Any, known: Collection[str]) -> str:
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"Did you mean {close[0]}?" if close else f"Known: {', '.join(sorted(known))}."


def _check_share(source: SourceConfig, group: str) -> list[str]:
    """What is wrong with the part of a source that is taken, each beginning with a field's name."""
    errors = []
    split, fraction = source.split, source.held_out_fraction
    if split not in _SPLITS:
        errors.append(f"split: is {split!r}; expected {', '.join(_SPLITS)}.")
    elif split == "all" and fraction != 0:
        errors.append(f"held_out_fraction: is {fraction}, and split is 'all'. Set split to 'train' or 'held_out'.")
    elif split != "all" and not 0 < fraction < 1:
        errors.append(f"held_out_fraction: is {fraction}; split {split!r} needs one between 0 and 1.")
    if source.max_rows < 0:
        errors.append(f"max_rows: is {source.max_rows}; expected at least 0.")
    for name in ("epochs", "weight", "loss_weight"):
        value = getattr(source, name)
        if value is not None and not 0 < value < math.inf:
            errors.append(f"{name}: is {value}; expected a positive number.")
        if group == "eval" and value != getattr(SourceConfig(), name):
            errors.append(f"{name}: is set; a held-out set is seen once, as it is. Leave it out.")
    if source.weight is not None and source.epochs != 1:
        errors.append("epochs: is set, and so is weight, from which the epochs follow. Leave one of them out.")
    return errors


def _check_held_out_files(data: DataConfig) -> list[str]:
    """A file that is both trained on and held out needs the two sides of one split."""
    errors = []
    for i, held_out in enumerate(data.eval):
        for j, source in enumerate(data.train):
            same_file = bool(source.path) and os.path.normpath(source.path) == os.path.normpath(held_out.path)
            sides = {source.split, held_out.split}
            apart = sides == {"train", "held_out"} and source.held_out_fraction == held_out.held_out_fraction
            if same_file and not apart and data.eval_overlap != "keep":
                errors.append(
                    f"config.data.eval[{i}].path: {held_out.path} is config.data.train[{j}].path too. Give one "
                    "split='train' and the other split='held_out', both with the same held_out_fraction."
                )
    return errors


def warnings_for(config: Config) -> list[str]:
    """What is allowed but seldom meant; logged once at the start."""
    schedule = config.schedule
    if schedule.num_steps is None and not 1 <= schedule.num_epochs <= 5:
        return [f"config.schedule.num_epochs: is {schedule.num_epochs}; 2 to 3 suit most SFT runs."]
    return []
