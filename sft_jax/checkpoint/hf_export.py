"""Params, or the sources of them on disk -> a folder that transformers and vLLM load. hf.py is the way back.

One tensor of the folder is on the host at a time.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sft_jax.checkpoint.agreement import gather_array
from sft_jax.checkpoint.export_folder import write_folder
from sft_jax.checkpoint.hf_names import EMBEDDING, hf_tensors, tensor_rules
from sft_jax.checkpoint.param_source import ParamSource, boxes, check_finite
from sft_jax.checkpoint.safetensors_writer import MAX_SHARD_BYTES, TensorSpec, write_json, write_tensors
from sft_jax.checkpoint.stored_tensor import copy_in_blocks
from sft_jax.data.tokenizer import Tokenizer
from sft_jax.datatypes import ConfigError
from sft_jax.model.families import TransformerConfig
from sft_jax.model.hf_config import to_hf_config
from sft_jax.model.router import dtype_among
from sft_jax.typing import Array

EXPORT_DTYPES = ("float32", "bfloat16", "float16", "float64")
_OF_THE_BASE = ("transformers_version", "_from_model_config")  # the second: to be made anew from config.json
_PIECE_BYTES, _BLOCK_BYTES = 2**27, 2**25
_WORKERS = 3


def export_pretrained(
    folder: str | os.PathLike[str],
    params: Mapping[str, Array | ParamSource],
    config: TransformerConfig,
    tokenizer: Tokenizer,
    chat_template: str,
    stop_ids: Sequence[int],
    dtype: str | Mapping[str, str] = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    model_card: str = "",
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that serves what was trained: weights, config, tokenizer, the trained template and its stop.

    All processes call it; process 0 writes, and where it cannot, all raise. The folder is made beside its target and
    renamed when complete, so the target is the old export or the new one, never a part.

    Args:
      params: on devices or on disk.
      config: with the vocabulary that `params` have.
      stop_ids: of the tokens that end an assistant turn; generation stops at them, and at the tokenizer's own EOS.
      dtype: of the stored weights: float32, bfloat16, float16 or float64 (`router.dtype_among` has an exception); or of
        each parameter, by path.
      model_card: text of README.md; empty: none is written. Asked of process 0 only.
      generation: the fields of the base's `generation_config.json`, by `hf.read_generation_config`: how to sample is
        kept, and the ids that begin and end a text are those that were trained.

    Raises:
      StorageError: where the target holds files that no export wrote, or the disk refuses.
    """
    for name in [dtype] if isinstance(dtype, str) else dtype.values():
        if name not in EXPORT_DTYPES:
            raise ConfigError(f"export: dtype is {name!r}; expected one of {', '.join(EXPORT_DTYPES)}.")
    paths = [rule.path for rule in tensor_rules(config)]
    kinds = {path: dtype_among(path, dtype) if isinstance(dtype, str) else np.dtype(dtype[path]) for path in paths}
    for rule in tensor_rules(config):
        assert params[rule.path].shape == rule.shape(config), f"{rule.path} is {params[rule.path].shape}"
    specs = [TensorSpec(name, kinds[parts[0].path], parts[0].hf_shape(config)) for name, parts, _ in hf_tensors(config)]
    tensors = _one_ahead(_make_tensors(params, config, kinds))

    def fill(partial: Path) -> None:
        write_tensors(partial, specs, tensors, max_shard_bytes)
        _write_configs(partial, config, tokenizer, stop_ids, kinds[EMBEDDING.path].name, generation or {})
        tokenizer.save(partial, chat_template)
        if model_card:
            (partial / "README.md").write_text(model_card, encoding="utf-8")

    write_folder(folder, fill, tensors)


def _make_tensors(
    params: Mapping[str, Array | ParamSource], config: TransformerConfig, kinds: Mapping[str, np.dtype]
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, values) of each tensor of the folder, one at a time on the host; those of the vocabulary in pieces."""
    for name, parts, place in hf_tensors(config):
        kind = kinds[parts[0].path]
        # Of embedding and head our rows are theirs, so that not all need be here.
        shape, is_whole = parts[0].hf_shape(config), parts[0].is_stacked or parts[0].dims != parts[0].hf_dims
        num_rows = shape[0] if is_whole else max(1, _PIECE_BYTES // (kind.itemsize * math.prod(shape[1:])))
        for (rows,) in boxes(shape[:1], (num_rows,)):
            values = np.empty((rows.stop - rows.start, *shape[1:]), kind)
            for rule in parts:
                out = rule.from_hf(values, config) if is_whole else values
                _fill(out, params[rule.path], place, rows.start)
            check_finite(values, f"export: {name}")
            yield name, values
            del values  # before the next one is made


def _fill(out: np.ndarray, param: Array | ParamSource, place: tuple[int, ...], first_row: int) -> None:
    """Copy one layer or expert of a parameter, or some of its rows, into a view of the tensor to be, in blocks."""
    num_rows = max(1, _BLOCK_BYTES // max(out[:1].nbytes, 1))
    blocks = [rows for (rows,) in boxes(out.shape[:1], (num_rows,))]
    if isinstance(param, ParamSource):
        with ThreadPoolExecutor(_WORKERS) as pool:
            list(pool.map(lambda rows: _read_rows(out[rows], param, place, first_row + rows.start), blocks))
    elif param.is_fully_addressable:
        for rows in blocks:
            _copy_rows(out[rows], param, place, first_row + rows.start)
    else:
        part = _take(param, place) if place else param
        for rows in blocks:
            copy_in_blocks(out[rows], _pull(part, first_row + rows.start, rows.stop - rows.start))


def _read_rows(out: np.ndarray, source: ParamSource, place: tuple[int, ...], first_row: int) -> None:
    box = (slice(first_row, first_row + len(out)), *(slice(0, size) for size in out.shape[1:]))
    source.read((*(slice(at, at + 1) for at in place), *box), out[(None,) * len(place)])


@jax.jit
def _take(values: Array, place: tuple[int | Array, ...]) -> Array:
    """values[place]; one compilation serves all places."""
    rest = values.shape[len(place) :]
    part = jax.lax.dynamic_slice(values, (*place, *(0 for _ in rest)), (*(1 for _ in place), *rest))
    return jnp.squeeze(part, tuple(range(len(place))))


def _copy_rows(out: np.ndarray, values: Array, place: tuple[int, ...], first_row: int) -> None:
    """From each shard what it has of them. Slicing the array itself would gather more than that on every device."""
    begin = (*place, first_row, *[0] * (out.ndim - 1))
    out = out[(None,) * len(place)]
    for shard in values.addressable_shards:
        spans = [at.indices(size)[:2] for at, size in zip(shard.index, values.shape, strict=True)]
        starts = [max(start, first) for (start, _), first in zip(spans, begin, strict=True)]
        stops = [min(stop, first + size) for (_, stop), first, size in zip(spans, begin, out.shape, strict=True)]
        sizes = [stop - start for start, stop in zip(starts, stops, strict=True)]
        if shard.replica_id or min(sizes) <= 0:
            continue
        inner = [start - first for start, (first, _) in zip(starts, spans, strict=True)]
        # A new array: numpy's copy of an array stays in host memory as long as that array lives.
        part = jax.lax.dynamic_slice(shard.data, inner, sizes)
        box = (slice(start - first, stop - first) for start, stop, first in zip(starts, stops, begin, strict=True))
        copy_in_blocks(out[tuple(box)], np.asarray(part))


def _pull(values: Array, first_row: int, num_rows: int) -> np.ndarray:
    """Some rows of an array, gathered on the host of every process."""
    return gather_array("the export of rows of an array", jax.lax.dynamic_slice_in_dim(values, first_row, num_rows))


def _one_ahead(tensors: Iterator[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """The same; while one is written, the next is made."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, tensors, None)
        while (made := coming.result()) is not None:
            coming = pool.submit(next, tensors, None)
            yield made
            del made


def _write_configs(
    folder: Path,
    config: TransformerConfig,
    tokenizer: Tokenizer,
    stop_ids: Sequence[int],
    dtype: str,
    generation: Mapping[str, Any],
) -> None:
    bos_id = tokenizer.token_id(tokenizer.bos_token) if tokenizer.bos_token else None
    eos_id = tokenizer.token_id(tokenizer.eos_token) if tokenizer.eos_token else None
    ends = list(dict.fromkeys([*stop_ids, *([] if eos_id is None else [eos_id])]))
    assert ends, "nothing would end a generated turn"
    ids = {"bos_token_id": bos_id, "eos_token_id": ends}  # null is said: transformers would assume 1 and 2
    write_json(folder / "config.json", to_hf_config(config, dtype) | ids)
    kept = {name: value for name, value in generation.items() if name not in _OF_THE_BASE}
    pad_id = kept.get("pad_token_id")
    if type(pad_id) is not int or not 0 <= pad_id < tokenizer.vocab_size:
        kept.pop("pad_token_id", None)
    write_json(folder / "generation_config.json", kept | ids)
