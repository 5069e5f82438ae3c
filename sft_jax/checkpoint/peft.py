"""Adapters <-> a folder that `peft` loads: adapter_config.json and adapter_model.safetensors.

    ours, of layers.0.0.                    theirs, of base_model.model.model.layers.{layer}.
    attention.query.lora_a     [S, D, R]    self_attn.q_proj.lora_A.weight          [R, D]
    attention.query.lora_b     [S, R, N, H] self_attn.q_proj.lora_B.weight          [N*H, R]
    attention.query.magnitude  [S, N, H]    self_attn.q_proj.lora_magnitude_vector  [N*H]

and what trains whole, such as embed.embedding [V, D], under its own name.

Source of the names: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from sft_jax.checkpoint.hf_names import EMBEDDING, HEAD, TensorRule, hf_tensors, tensor_rules
from sft_jax.checkpoint.model_files import file_in
from sft_jax.checkpoint.safetensors_io import SINGLE_FILE, TensorInfo, read_header
from sft_jax.checkpoint.safetensors_writer import TensorSpec, write_tensors
from sft_jax.config_schema import LoraConfig
from sft_jax.datatypes import ConfigError, StorageError
from sft_jax.model.families import TransformerConfig
from sft_jax.model.transformer import Params

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SUFFIXES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
# What every family's maps may be called in config.lora, though its own files hold them under other names, or fused.
_FAMILIAR = {
    "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj", "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}  # fmt: skip
# Options of PEFT that would change the numbers, unless they have one of these values.
_ONLY_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    **{
        name: (None, False, {}, [])
        for name in ("rank_pattern", "alpha_pattern", "lora_bias", "layer_replication", "trainable_token_indices",
                     "target_parameters", "alora_invocation_tokens", "arrow_config", "use_qalora", "use_bdlora")
    },
}  # fmt: skip


class AdapterTensor(NamedTuple):
    """One tensor of an adapter folder, and where its values stand among our parameters."""

    name: str
    path: str
    place: int | None
    """In the stack of layers; None: the parameter belongs to no layer."""
    shape: tuple[int, ...]


def module_names(config: TransformerConfig) -> dict[str, set[str]]:
    """Path of each module with parameters -> all that config.lora may call it."""
    names: dict[str, set[str]] = {}
    for rule in tensor_rules(config):
        module = rule.path.rpartition(".")[0]
        called = names.setdefault(module, {module})
        called.add(rule.hf_name.removesuffix(".weight"))
        called |= {familiar for ours, familiar in _FAMILIAR.items() if module.endswith(f".{ours}")}
    return names


def adapter_tensors(config: TransformerConfig, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[AdapterTensor]:
    """Every tensor of the folder of a run whose trained parameters have `shapes`."""
    for hf_name, (rule, *_), stacked_at in hf_tensors(config):
        module, place = rule.path.removesuffix(".kernel"), stacked_at if rule.is_stacked else None
        name = _PREFIX + hf_name
        if rule.path in shapes:
            yield AdapterTensor(name, rule.path, place, rule.hf_shape(config))
            if rule is EMBEDDING and config.tie_embeddings:  # PEFT copies what it saves, which unties the two
                yield AdapterTensor(_PREFIX + HEAD.hf_name, rule.path, place, rule.hf_shape(config))
        if f"{module}.lora_a" in shapes:
            outs, ins = rule.hf_shape(config)
            rank = shapes[f"{module}.lora_a"][-1]
            for ours, shape in {"lora_a": (rank, ins), "lora_b": (outs, rank), "magnitude": (outs,)}.items():
                if f"{module}.{ours}" in shapes:
                    yield AdapterTensor(name.removesuffix("weight") + _SUFFIXES[ours], f"{module}.{ours}", place, shape)


def export_adapter(
    folder: str | os.PathLike[str], trained: Params, config: TransformerConfig, lora: LoraConfig, base: str, dtype: str
) -> None:
    """Write the trained parameters of a LoRA run as a folder that `peft` loads.

    All processes call it; process 0 writes.

    Args:
      base: what the adapter is for, as `base_model_name_or_path`.
      dtype: of the stored tensors.

    Raises:
      StorageError: the folder is not empty, or the disk refuses.
    """
    tensors = list(adapter_tensors(config, {path: value.shape for path, value in trained.items()}))
    rules = {rule.path: rule for rule in tensor_rules(config)}
    target = Path(folder)
    values = ((tensor.name, _to_peft(trained, tensor, rules, dtype)) for tensor in tensors)
    if jax.process_index() != 0:
        for _ in values:  # gathering takes all processes
            pass
        return
    if target.exists() and any(path.name not in (CONFIG_FILE, WEIGHTS_FILE) for path in target.iterdir()):
        raise StorageError(f"{target}: holds files that are no adapter's. Choose another folder, or remove it.")
    fields = adapter_config(tensors, config, lora, base)
    try:
        target.mkdir(parents=True, exist_ok=True)
        specs = [TensorSpec(tensor.name, jnp.dtype(dtype), tensor.shape) for tensor in tensors]
        write_tensors(target, specs, values, max_shard_bytes=2**62)
        (target / SINGLE_FILE).replace(target / WEIGHTS_FILE)
        (target / CONFIG_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(fields), indent=2) + b"\n")
    except OSError as error:
        raise StorageError(f"{target}: export failed: {error}. Free some space, or choose another folder.") from error


def adapter_config(
    tensors: list[AdapterTensor], config: TransformerConfig, lora: LoraConfig, base: str
) -> dict[str, Any]:
    """The fields of adapter_config.json."""
    suffix = f".{_SUFFIXES['lora_a']}"
    names = [tensor.name.removeprefix(_PREFIX) for tensor in tensors]
    targets = {name.removesuffix(suffix) for name in names if name.endswith(suffix)}
    saved = {name.rpartition(".")[0] for name in names if ".lora_" not in name}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "target_modules": sorted(_shorten(targets, config)),
        "modules_to_save": sorted(saved) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        **({"ensure_weight_tying": True} if config.tie_embeddings and "model.embed_tokens" in saved else {}),
    }


def _shorten(targets: set[str], config: TransformerConfig) -> set[str]:
    """`q_proj` for the maps of that name in all layers; full names where only some of them have an adapter."""
    last = lambda name: name.rpartition(".")[2]  # noqa: E731
    short = {last(name) for name in targets}
    all_names = {name.rpartition(".")[0] for name, _, _ in hf_tensors(config)}
    return short if {name for name in all_names if last(name) in short} == targets else targets


def _to_peft(trained: Params, tensor: AdapterTensor, rules: Mapping[str, TensorRule], dtype: str) -> np.ndarray:
    value = trained[tensor.path]
    part = value if tensor.place is None else value[tensor.place]
    if not part.is_fully_addressable:
        part = multihost_utils.process_allgather(part, tiled=True)
    host = np.asarray(part)
    if tensor.path in rules:
        host = rules[tensor.path].to_hf(host)
    else:
        name = tensor.path.rpartition(".")[2]
        rank = tensor.shape[0] if name == "lora_a" else tensor.shape[-1]
        host = host.reshape(-1, rank).T if name == "lora_a" else host.reshape(rank, -1).T if name == "lora_b" else host
    host = host.reshape(tensor.shape).astype(jnp.dtype(dtype))
    if not np.isfinite(host).all():
        raise StorageError(f"export: {tensor.name} has NaN or infinite values (as {dtype}). Export an earlier step.")
    return host


def load_adapter(
    folder: str | os.PathLike[str],
    config: TransformerConfig,
    lora: LoraConfig,
    shapes: Mapping[str, tuple[int, ...]],
    shardings: Mapping[str, Sharding],
    dtype: str,
) -> Params:
    """The trained parameters of a run, from a folder that `peft` or `export_adapter` wrote.

    Args:
      shapes: of the parameters that train by config.lora.

    Raises:
      ConfigError: the folder's options are not those of config.lora; says which.
      StorageError: a tensor is missing, is of another shape, is left over or is not finite.
    """
    folder = Path(folder)
    fields = _read_fields(folder)
    _check_options(fields, lora, folder)
    index = read_header(file_in(folder, WEIGHTS_FILE))
    tensors = list(adapter_tensors(config, shapes))
    _check_tensors(index, tensors, folder)
    rules = {rule.path: rule for rule in tensor_rules(config)}
    host = {path: np.empty(shape, jnp.dtype(dtype)) for path, shape in shapes.items()}
    for tensor in tensors:
        values = _from_peft(_read(index[tensor.name]), tensor, rules, config)
        if not np.isfinite(values).all():
            raise StorageError(f"{index[tensor.name]} has NaN or infinite values. Use another adapter.")
        out = host[tensor.path] if tensor.place is None else host[tensor.path][tensor.place]
        if tensor.name == _PREFIX + HEAD.hf_name and config.tie_embeddings:
            if not np.array_equal(out, values.reshape(out.shape).astype(out.dtype)):
                raise StorageError(
                    f"{index[tensor.name]} differs from the embedding, and this model ties them. Merge the adapter by "
                    "PEFT into a model with tie_word_embeddings false, and train that."
                )
        else:
            out[...] = values.reshape(out.shape)
    return {
        path: jax.make_array_from_callback(values.shape, shardings[path], values.__getitem__)
        for path, values in host.items()
    }


def _read(tensor: TensorInfo) -> np.ndarray:
    return tensor.read_box(tuple(slice(0, size) for size in tensor.shape))


def _read_fields(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}. Name an adapter folder.") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not a JSON object: {error}. Download it again.") from error


def _check_options(fields: Mapping[str, Any], lora: LoraConfig, folder: Path) -> None:
    where = folder / CONFIG_FILE
    ours = {"r": ("rank", lora.rank), "lora_alpha": ("alpha", lora.alpha)}
    ours |= {"use_rslora": ("use_rslora", lora.use_rslora), "use_dora": ("use_dora", lora.use_dora)}
    errors = [
        f"config.lora.{name}: is {value!r}, and {where} has {key} {fields.get(key, False)!r}. Set it to that."
        for key, (name, value) in ours.items()
        if fields.get(key, False) != value
    ]
    errors += [
        f"{where}: {key} is {fields[key]!r}; only {accepted[0]!r} is supported."
        for key, accepted in _ONLY_VALUES.items()
        if fields.get(key, accepted[0]) not in accepted
    ]
    if errors:
        raise ConfigError("\n".join(errors))


def _check_tensors(index: Mapping[str, TensorInfo], tensors: list[AdapterTensor], folder: Path) -> None:
    wanted = {tensor.name: tensor for tensor in tensors}
    for name, tensor in wanted.items():
        if name not in index:
            raise StorageError(
                f"{folder / WEIGHTS_FILE}: has no tensor {name}, which config.lora.targets or "
                "modules_to_save ask for. Set them to what the adapter has."
            )
        if index[name].shape != tensor.shape:
            raise StorageError(f"{index[name]} is {list(index[name].shape)}; expected {list(tensor.shape)}. Same base?")
        if index[name].dtype.name not in ("float64", "float32", "float16", "bfloat16"):
            raise StorageError(f"{index[name]} has dtype {index[name].dtype.name}; expected floating point.")
    unknown = sorted(index.keys() - wanted.keys())
    if unknown:
        raise StorageError(
            f"{folder / WEIGHTS_FILE}: holds {len(unknown)} tensors that config.lora would not use, such as "
            f"{unknown[0]}. Add their modules to config.lora.targets or modules_to_save."
        )


def _from_peft(
    values: np.ndarray, tensor: AdapterTensor, rules: Mapping[str, TensorRule], config: TransformerConfig
) -> np.ndarray:
    values = values.astype(np.float32) if values.dtype.itemsize < 4 else np.asarray(values)
    if tensor.path in rules:
        return rules[tensor.path].from_hf(values, config)
    return values.T if values.ndim == 2 else values
