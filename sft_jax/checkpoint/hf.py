"""A Hugging Face folder -> Params on their shards; Params -> a folder that transformers and vLLM load.

Neither way holds the model on a host. Import reads, for each shard of each parameter, that shard's bytes; export pulls
one layer of one parameter at a time.

    files --map--> view in our dims --slice, cast--> one shard on the host --> its device(s)
"""

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Sharding, SingleDeviceSharding

from sft_jax.checkpoint.hf_names import EMBEDDING, HEAD, TensorRule, hf_tensors, join_parts, match_tensors, tensor_rules
from sft_jax.checkpoint.safetensors_io import (
    MAX_SHARD_BYTES,
    TensorInfo,
    TensorSpec,
    map_tensor,
    read_index,
    write_json,
    write_tensors,
)
from sft_jax.data.tokenizer import Tokenizer
from sft_jax.datatypes import ConfigError, StorageError
from sft_jax.model.families import TransformerConfig
from sft_jax.model.hf_config import read_hf_config, to_hf_config
from sft_jax.model.transformer import Params
from sft_jax.typing import Array

Index = tuple[slice, ...]

_EXPORT_DTYPES = ("float32", "bfloat16", "float16", "float64")
_EXPORT_RECORD = "sft_jax_export.json"
_CACHE_BYTES = 2**18  # a quarter of a usual L2 cache
_BLOCK_ROWS = 4096  # rows of an embedding held at once while it is averaged or compared


def read_config(folder: str | os.PathLike[str]) -> tuple[TransformerConfig, dict[str, Any]]:
    """The model that a folder's `config.json` describes, and the file's fields.

    Raises:
      StorageError: where the file cannot be read.
      ConfigError: where it is not JSON, or not a model that we build.
    """
    path = Path(folder) / "config.json"
    try:
        fields = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}. Name a Hugging Face model folder.") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not a JSON object: {error}. Download it again.") from error
    return read_hf_config(fields, str(path)), fields


@dataclass(frozen=True)
class _Source:
    """Where one parameter comes from."""

    rule: TensorRule
    tensors: tuple[TensorInfo, ...]  # by place in the stack
    stored: TransformerConfig  # of the folder
    shape: tuple[int, ...]  # wanted: as stored, or with more rows
    new_row: np.ndarray | None  # float32 [D]: the value of each row that the folder does not have


def load_pretrained(
    folder: str | os.PathLike[str],
    config: TransformerConfig,
    shardings: Mapping[str, Sharding] | None,
    dtype: str,
) -> Params:
    """Read a folder's weights, each device's part straight onto it.

    Names, shapes and dtypes of all tensors are checked before any is read.

    Args:
      config: the folder's, from `read_config`, or with a larger vocabulary. New rows of embedding and head are the mean
        of the folder's, so that a new token starts as an average one (https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
      shardings: by parameter path; None: everything on the default device.
      dtype: of the parameters.

    Raises:
      StorageError: where the folder is not exactly what its config.json describes, or a weight is NaN or infinite.
      ConfigError: for float64 without `jax_enable_x64`.
    """
    if jax.dtypes.canonicalize_dtype(dtype) != jnp.dtype(dtype):
        raise ConfigError(f"config.model.param_dtype: is {dtype}, which jax would narrow. Set JAX_ENABLE_X64=1.")
    stored, _ = read_config(folder)
    assert dataclasses.replace(stored, vocab_size=config.vocab_size) == config, f"{folder} holds {stored}"
    assert stored.vocab_size <= config.vocab_size, f"{folder} has {stored.vocab_size} rows, not {config.vocab_size}"
    index = read_index(folder)
    matched = match_tensors(stored, index, str(folder))
    if stored.tie_embeddings:
        _check_tied(index)
    params = {}
    for rule in tensor_rules(config):
        source = _make_source(rule, matched[rule.path], stored, config)
        sharding = shardings[rule.path] if shardings is not None else SingleDeviceSharding(jax.devices()[0])
        params[rule.path] = _place_shards(source.shape, sharding, partial(_read_shard, source, dtype=dtype))
    return params


def _check_tied(index: Mapping[str, TensorInfo]) -> None:
    """A tied folder that stores the head beside the embedding must store the same one."""
    if EMBEDDING.hf_name not in index or HEAD.hf_name not in index:
        return
    embedding, head = index[EMBEDDING.hf_name], index[HEAD.hf_name]
    for ours, theirs in zip(_row_blocks(embedding), _row_blocks(head), strict=True):
        if not np.array_equal(ours, theirs, equal_nan=True):
            raise StorageError(
                f"{head} differs from {embedding.name}, but config.json ties them. Set tie_word_embeddings to false to "
                f"keep both, or remove {head.name}."
            )


def _row_blocks(tensor: TensorInfo) -> Iterator[np.ndarray]:
    """A tensor's rows as float32, some at a time."""
    values = map_tensor(tensor)
    for start in range(0, len(values), _BLOCK_ROWS):
        yield values[start : start + _BLOCK_ROWS].astype(np.float32)


def _make_source(
    rule: TensorRule, tensors: tuple[TensorInfo, ...], stored: TransformerConfig, wanted: TransformerConfig
) -> _Source:
    shape, old, new = rule.shape(wanted), stored.vocab_size, wanted.vocab_size
    if rule.shape(stored) == shape:
        return _Source(rule, tensors, stored, shape, None)
    mean = sum(block.sum(axis=0, dtype=np.float64) for block in _row_blocks(tensors[0])) / old
    logging.info("%s: rows [%d, %d) are new: the mean of the %d that the folder has", tensors[0], old, new, old)
    return _Source(rule, tensors, stored, shape, np.asarray(mean, np.float32))


def _place_shards(shape: tuple[int, ...], sharding: Sharding, read: Callable[[Index], np.ndarray]) -> Array:
    """`jax.make_array_from_callback`, with one shard on the host at a time instead of all of a process's."""
    devices_by_part: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        if device in sharding.addressable_devices:
            part = tuple(dim.indices(size)[:2] for dim, size in zip(index, shape, strict=True))
            devices_by_part.setdefault(part, []).append(device)
    shards = []
    for part, devices in devices_by_part.items():
        values = read(tuple(slice(*bounds) for bounds in part))
        copies = [jax.device_put(values, device) for device in devices]
        shards += jax.block_until_ready(copies)
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _read_shard(source: _Source, index: Index, dtype: str) -> np.ndarray:
    """One shard of one parameter, read layer by layer."""
    out = np.empty([at.stop - at.start for at in index], jnp.dtype(dtype))
    if not source.rule.is_stacked:
        _read_into(out, source, 0, index)
    else:
        stack = source.rule.stack
        for place in np.ndindex(out.shape[: len(stack)]):
            stacked_at = tuple(at.start + i for at, i in zip(index, place, strict=False))
            _read_into(out[place], source, int(np.ravel_multi_index(stacked_at, stack)), index[len(stack) :])
    return out


def _read_into(out: np.ndarray, source: _Source, number: int, index: Index) -> None:
    tensor = source.tensors[number]
    values = source.rule.from_hf(map_tensor(tensor), source.stored)[index]  # rows past the end are not there
    _copy_in_blocks(out[: len(values)], values)
    if not np.isfinite(out[: len(values)]).all():
        raise StorageError(
            f"{tensor} has NaN or infinite values (as {out.dtype.name}). The checkpoint is damaged or was saved from a "
            "diverged run: use another."
        )
    if len(values) < len(out):
        assert source.new_row is not None
        out[len(values) :] = source.new_row[index[1:]]


def _copy_in_blocks(out: np.ndarray, values: np.ndarray) -> None:
    """`out[:] = values` for a transposed view of a file, about four times as fast: a few of the file's rows at a time,
    which a core's cache holds, so that each page is read once and in order."""
    outermost = int(np.argmax(values.strides))
    step = max(1, _CACHE_BYTES // values.strides[outermost])
    out, values = np.moveaxis(out, outermost, 0), np.moveaxis(values, outermost, 0)
    with np.errstate(over="ignore", invalid="ignore"):  # the caller refuses what overflows
        for start in range(0, len(values), step):
            out[start : start + step] = values[start : start + step]


def export_pretrained(
    folder: str | os.PathLike[str],
    params: Params,
    config: TransformerConfig,
    tokenizer: Tokenizer,
    chat_template: str,
    stop_ids: Sequence[int],
    dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a folder that serves what was trained: weights, config, tokenizer, the trained template and its stop.

    All processes call it; process 0 writes. The folder is made beside its target and renamed when complete, so the
    target is the old export or the new one, never a part.

    Args:
      config: with the vocabulary that `params` have.
      stop_ids: of the tokens that end an assistant turn; generation stops at them, and at the tokenizer's own EOS.
      dtype: of the stored weights: float32, bfloat16, float16 or float64.

    Raises:
      StorageError: where the target holds files that no export wrote, or the disk refuses.
    """
    if dtype not in _EXPORT_DTYPES:
        raise ConfigError(f"export: dtype is {dtype!r}; expected one of {', '.join(_EXPORT_DTYPES)}.")
    for rule in tensor_rules(config):
        assert params[rule.path].shape == rule.shape(config), f"{rule.path} is {params[rule.path].shape}"
    tensors = _pull_tensors(params, config, dtype)
    if jax.process_index() != 0:
        for _ in tensors:  # gathering takes all processes
            pass
        return
    target = Path(folder)
    check_export_target(target)
    specs = [TensorSpec(name, jnp.dtype(dtype), parts[0].hf_shape(config)) for name, parts, _ in hf_tensors(config)]
    try:
        partial = _empty_sibling(target, "partial")
        write_tensors(partial, specs, tensors, max_shard_bytes)
        _write_configs(partial, config, tokenizer, stop_ids, dtype)
        tokenizer.save(partial, chat_template)
        write_json(partial / _EXPORT_RECORD, {"written_by": "sft_jax", "files": _files_in(partial)})
        old = _empty_sibling(target, "replaced")
        if target.exists():
            target.replace(old)
        partial.replace(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"{target}: export failed: {error}. Free some space, or choose another folder.") from error


def check_export_target(folder: str | os.PathLike[str]) -> None:
    """An export may replace an earlier export that nobody has added to, and nothing else.

    Raises:
      StorageError: naming a file that would be lost.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise StorageError(f"{target}: is a file, and the export needs a folder. Choose another name.")
    files = _files_in(target)
    record = target / _EXPORT_RECORD
    own = msgspec.json.decode(record.read_bytes(), type=dict[str, Any])["files"] if record.is_file() else []
    foreign = sorted(set(files) - {*own, _EXPORT_RECORD})
    if foreign:
        raise StorageError(
            f"{target}: holds {foreign[0]}, which no export of ours wrote ({len(foreign)} such files). Choose another "
            "folder, or remove it."
        )


def _files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def _empty_sibling(target: Path, suffix: str) -> Path:
    """A fresh folder beside the target, on the same file system; what an interrupted export left there is removed."""
    sibling = target.absolute().parent / f".{target.name}.{suffix}"
    if sibling.exists():
        shutil.rmtree(sibling)
    sibling.mkdir(parents=True)
    return sibling


def _pull_tensors(params: Params, config: TransformerConfig, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """(name, values) of each tensor of the folder, one at a time on the host."""
    for name, rules, place in hf_tensors(config):
        parts = [rule.to_hf(_pull(params[rule.path], place)) for rule in rules]
        yield name, _cast(join_parts(rules, parts), dtype, name)


def _cast(values: np.ndarray, dtype: str, name: str) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused below
        values = values.astype(jnp.dtype(dtype), copy=False)
    if not np.isfinite(values).all():
        raise StorageError(
            f"export: {name} has NaN or infinite values (as {dtype}). Export an earlier step, or in a wider dtype."
        )
    return values


def _pull(values: Array, place: tuple[int, ...]) -> np.ndarray:
    """One layer or expert of a parameter, or all of it, gathered on the host of every process."""
    # A new array in both cases: numpy's copy of an array stays in host memory as long as that array lives.
    part = _index_stack(values, place) if place else jnp.copy(values)
    if not part.is_fully_addressable:
        return multihost_utils.process_allgather(part, tiled=True)
    return np.asarray(part)


@jax.jit
def _index_stack(values: Array, place: tuple[Any, ...]) -> Array:
    for i in place:
        values = jax.lax.dynamic_index_in_dim(values, i, keepdims=False)
    return values


def _write_configs(
    folder: Path, config: TransformerConfig, tokenizer: Tokenizer, stop_ids: Sequence[int], dtype: str
) -> None:
    bos_id = tokenizer.token_id(tokenizer.bos_token) if tokenizer.bos_token else None
    eos_id = tokenizer.token_id(tokenizer.eos_token) if tokenizer.eos_token else None
    ends = list(dict.fromkeys([*stop_ids, *([] if eos_id is None else [eos_id])]))
    assert ends, "nothing would end a generated turn"
    ids = {"bos_token_id": bos_id, "eos_token_id": ends}  # null is said: transformers would assume 1 and 2
    write_json(folder / "config.json", to_hf_config(config, dtype) | ids)
    write_json(folder / "generation_config.json", ids)
