"""Adapters <-> a folder that `peft` loads: adapter_config.json and adapter_model.safetensors."""

import itertools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from sft_jax.checkpoint.agreement import gather_array
from sft_jax.checkpoint.export_folder import write_folder
from sft_jax.checkpoint.hf_names import EMBEDDING, HEAD, hf_tensors
from sft_jax.checkpoint.model_files import ModelFile, file_in, list_folder
from sft_jax.checkpoint.param_source import ParamSource, read_box
from sft_jax.checkpoint.peft_names import PREFIX, AdapterTensor, adapter_tensors
from sft_jax.checkpoint.peft_options import CONFIG_FILE, check_options, read_options
from sft_jax.checkpoint.safetensors_io import SINGLE_FILE, TensorInfo, read_header
from sft_jax.checkpoint.safetensors_writer import TensorSpec, write_json, write_tensors
from sft_jax.config_schema import LoraConfig
from sft_jax.datatypes import StorageError
from sft_jax.model.families import TransformerConfig
from sft_jax.model.transformer import Params
from sft_jax.typing import Array

WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"  # as PEFT has written it
_MERGE = "merge the adapter by PEFT (merge_and_unload), save the model, and set config.model.path to it"


def export_adapter(
    folder: str | os.PathLike[str],
    trained: Mapping[str, Array | ParamSource],
    config: TransformerConfig,
    lora: LoraConfig,
    base: str,
    dtype: str,
) -> None:
    """Write the trained parameters of a LoRA run as a folder that `peft` loads.

    All processes call it; process 0 writes, and where it cannot, all raise. One tensor is on the host at a time.

    Args:
      trained: on devices or on disk.
      base: what the adapter is for, as `base_model_name_or_path`.
      dtype: of the stored tensors.

    Raises:
      ConfigError: PEFT would not load what trains.
      StorageError: the folder holds files that no export wrote, or the disk refuses.
    """
    tensors = list(adapter_tensors(config, lora, {path: value.shape for path, value in trained.items()}))
    fields = adapter_config(tensors, config, lora, base)
    specs = [TensorSpec(tensor.name, jnp.dtype(dtype), tensor.shape) for tensor in tensors]
    values = ((tensor.name, _to_peft(trained, tensor, config, dtype)) for tensor in tensors)

    def fill(partial: Path) -> None:
        write_tensors(partial, specs, values, max_shard_bytes=2**62)
        (partial / SINGLE_FILE).replace(partial / WEIGHTS_FILE)
        write_json(partial / CONFIG_FILE, fields)

    write_folder(folder, fill, values)


def adapter_config(
    tensors: list[AdapterTensor], config: TransformerConfig, lora: LoraConfig, base: str
) -> dict[str, Any]:
    """The fields of adapter_config.json."""
    adapters = [tensor for tensor in tensors if tensor.kind == "lora_a"]
    experts = {tensor.module.rpartition(".")[2] for tensor in adapters if tensor.is_of_experts}
    targets = {tensor.module for tensor in adapters if not tensor.is_of_experts}
    saved = {tensor.module for tensor in tensors if tensor.kind == "whole"}
    ranks, alphas = _fused_patterns(tensors, lora)
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
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": sorted(experts | _shorten(targets, config)),
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
    all_names = {name.rpartition(".")[0] for name, rules, _ in hf_tensors(config) if not rules[0].num_experts}
    return short if {name for name in all_names if last(name) in short} == targets else targets


def _fused_patterns(tensors: list[AdapterTensor], lora: LoraConfig) -> tuple[dict[str, int], dict[str, float]]:
    """PEFT's rank and alpha of the adapters of fused tensors, by name; alpha is such that the factor stays ours."""
    parts = {t.module.rpartition(".")[2]: len(t.rules) for t in tensors if t.kind == "lora_a" and len(t.rules) > 1}
    ranks = {name: num * lora.rank for name, num in parts.items()}
    return ranks, {name: lora.alpha * (num**0.5 if lora.use_rslora else num) for name, num in parts.items()}


def _to_peft(
    trained: Mapping[str, Array | ParamSource], tensor: AdapterTensor, config: TransformerConfig, dtype: str
) -> np.ndarray:
    hosts = [_pull(trained[tensor.path(rule)], tensor.place) for rule in tensor.rules]
    if tensor.kind == "whole":
        values = np.empty(tensor.shape, hosts[0].dtype)
        for rule, host in zip(tensor.rules, hosts, strict=True):
            rule.from_hf(values, config)[...] = host
    elif tensor.kind == "lora_a":
        values = np.concatenate([host.reshape(-1, host.shape[-1]).T for host in hosts])
    elif tensor.kind == "lora_b":
        values = _on_diagonal([host.reshape(len(host), -1).T for host in hosts])
    else:
        values = np.concatenate([host.reshape(-1) for host in hosts])
    values = values.reshape(tensor.shape).astype(jnp.dtype(dtype))
    if not np.isfinite(values).all():
        raise StorageError(f"export: {tensor.name} has NaN or infinite values (as {dtype}). Export an earlier step.")
    return values


def _pull(value: Array | ParamSource, place: tuple[int, ...]) -> np.ndarray:
    if isinstance(value, ParamSource):
        rest = (slice(0, size) for size in value.shape[len(place) :])
        return read_box(value, (*(slice(at, at + 1) for at in place), *rest), value.dtype)[(0,) * len(place)]
    part = value[place] if place else value
    return np.asarray(part) if part.is_fully_addressable else gather_array("the export of an adapter's array", part)


def _on_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    rows, columns = (sum(block.shape[dim] for block in blocks) for dim in (0, 1))
    out, row, column = np.zeros((rows, columns), blocks[0].dtype), 0, 0
    for block in blocks:
        out[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return out


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
    fields = read_options(folder)
    tensors = list(adapter_tensors(config, lora, shapes))
    has_patterns = check_options(fields, lora, _fused_patterns(tensors, lora), folder)
    index = _own_names(read_header(_weights_in(folder)))
    _check_tensors(index, tensors, has_patterns, folder)
    host = {path: np.empty(shape, jnp.dtype(dtype)) for path, shape in shapes.items()}
    for tensor in tensors:
        info = index[tensor.name]
        values = _read(info)
        if not np.isfinite(values).all():
            raise StorageError(f"{info} has NaN or infinite values. Use another adapter.")
        for rule, part in zip(tensor.rules, _from_peft(values, tensor, shapes, lora.rank, config, info), strict=True):
            out = host[tensor.path(rule)][tensor.place]
            part = part.reshape(out.shape).astype(out.dtype)
            if tensor.name == PREFIX + HEAD.hf_name and config.tie_embeddings and not np.array_equal(out, part):
                raise StorageError(
                    f"{info} differs from the embedding, and this model ties them. Load the base with "
                    f"tie_word_embeddings false, and {_MERGE}."
                )
            out[...] = part
    return {
        path: jax.make_array_from_callback(values.shape, shardings[path], values.__getitem__)
        for path, values in host.items()
    }


def _weights_in(folder: Path) -> ModelFile:
    names = list_folder(folder)
    if _PICKLE in names and WEIGHTS_FILE not in names:
        raise StorageError(
            f"{folder}: has no {WEIGHTS_FILE}, only {_PICKLE}. Pickle files can run code and are never opened. Convert "
            "it on a machine that may: PeftModel.from_pretrained(base, folder).save_pretrained(folder)."
        )
    return file_in(folder, WEIGHTS_FILE)


def _read(tensor: TensorInfo) -> np.ndarray:
    values = tensor.read_box(tuple(slice(0, size) for size in tensor.shape))
    return values.astype(np.float32) if values.dtype.itemsize < 4 else np.asarray(values)


def _own_names(index: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors by the names of what trains whole, such as `lm_head.weight`.

    Where the vocabulary was changed too, PEFT saves such a module once more as it is in memory, as
    `lm_head.modules_to_save.weight`, and the base's beside it, as `lm_head.original_module.weight`.
    """
    tensors: dict[str, TensorInfo] = {}
    for name, tensor in index.items():
        if ".original_module." in name:
            continue
        first = tensors.setdefault(name.replace(".modules_to_save.", "."), tensor)
        if first is not tensor and not np.array_equal(_read(first), _read(tensor)):
            raise StorageError(
                f"{tensor} differs from {first}, which is the same weight. Save the adapter again by PEFT."
            )
    return tensors


def _check_tensors(
    index: Mapping[str, TensorInfo], tensors: list[AdapterTensor], has_patterns: bool, folder: Path
) -> None:
    wanted = {tensor.name: tensor for tensor in tensors}
    for name, tensor in wanted.items():
        if name not in index and name == PREFIX + HEAD.hf_name and tensor.rules[0] is EMBEDDING:
            raise StorageError(
                f"{folder / WEIGHTS_FILE}: has an embedding and no {name}, so PEFT left the head as it was, and this "
                f"model ties the two. Train it by PEFT with ensure_weight_tying, or {_MERGE}."
            )
        if name not in index:
            raise StorageError(
                f"{folder / WEIGHTS_FILE}: has no tensor {name}, which config.lora.targets or "
                "modules_to_save ask for. Set them to what the adapter has."
            )
        if tensor.rules[0] in (EMBEDDING, HEAD) and index[name].shape[:1] != tensor.shape[:1]:
            raise StorageError(
                f"{index[name]} is {list(index[name].shape)}; expected {list(tensor.shape)}: another vocabulary. "
                "Name the same tokens in config.data.new_tokens, or resize the base by transformers, and set "
                "config.model.path to that."
            )
        shape = tensor.shape if has_patterns else _shared_shape(tensor)
        if index[name].shape != shape:
            raise StorageError(f"{index[name]} is {list(index[name].shape)}; expected {list(shape)}. Same base?")
        if index[name].dtype.name not in ("float64", "float32", "float16", "bfloat16"):
            raise StorageError(f"{index[name]} has dtype {index[name].dtype.name}; expected floating point.")
    unknown = sorted(index.keys() - wanted.keys())
    if unknown:
        raise StorageError(f"{folder / WEIGHTS_FILE}: {_describe_unknown(unknown)}")


def _describe_unknown(names: list[str]) -> str:
    modules = [rule.hf_name.removesuffix(".weight") for rule in (EMBEDDING, HEAD)]
    for name, module in itertools.product(names, modules):
        if not name.startswith(f"{PREFIX}{module}."):
            continue
        if name != f"{PREFIX}{module}.weight":
            return f"{name} is of an adapter of {module}, which trains whole here or not at all. For that, {_MERGE}."
        return (
            f"holds all of {name}, as PEFT saves it after a change of the vocabulary, and config.lora does not. "
            f"Add {module} to config.lora.modules_to_save."
        )
    return (
        f"holds {len(names)} tensors that config.lora would not use, such as {names[0]}. Add their modules to "
        "config.lora.targets or modules_to_save."
    )


def _shared_shape(tensor: AdapterTensor) -> tuple[int, ...]:
    """That of PEFT's own adapter of a fused tensor, whose parts share lora_A."""
    by = len(tensor.rules)
    outs, ins = tensor.shape[0], tensor.shape[-1]
    return {"lora_a": (outs // by, ins), "lora_b": (outs, ins // by)}.get(tensor.kind, tensor.shape)


def _from_peft(
    values: np.ndarray,
    tensor: AdapterTensor,
    shapes: Mapping[str, tuple[int, ...]],
    rank: int,
    config: TransformerConfig,
    info: TensorInfo,
) -> list[np.ndarray]:
    """The values of each rule's parameter."""
    if tensor.kind == "whole":
        return [rule.from_hf(values, config) for rule in tensor.rules]
    if tensor.kind == "lora_a":  # of a fused tensor: all parts read the same, unless it is an export of ours
        return [part.T for part in _cut(values, [rank] * len(tensor.rules))]
    num_other = len(tensor.place) + (tensor.kind == "lora_b")  # of layers, experts and ranks
    sizes = [math.prod(shapes[tensor.path(rule)][num_other:]) for rule in tensor.rules]
    rows = np.split(values, np.cumsum(sizes)[:-1])
    if tensor.kind == "magnitude" or values.shape[1] == rank:
        return [part.T for part in rows]
    blocks = [part[:, i * rank : (i + 1) * rank] for i, part in enumerate(rows)]
    if not np.array_equal(_on_diagonal(blocks), values):
        raise StorageError(f"{info} mixes the ranks of fused parts, for which we have no form. Merge it by PEFT.")
    return [block.T for block in blocks]


def _cut(values: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    return np.split(values, np.cumsum(sizes)[:-1]) if len(values) == sum(sizes) else [values for _ in sizes]
