"""A model folder, by Hugging Face or `sft-jax convert` -> Params on their shards. hf_export.py is the way back.

No host holds the model: for each shard of each parameter, that shard's bytes are read.

    file or URL --ranges--> view in our dims --slice, cast--> one shard on the host --> its device(s)
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Sharding, SingleDeviceSharding

from sft_jax.checkpoint.block_fp8 import join_block_fp8
from sft_jax.checkpoint.converted import is_converted, open_converted, read_record
from sft_jax.checkpoint.hf_names import EMBEDDING, HEAD, TensorRule, match_tensors, tensor_rules
from sft_jax.checkpoint.model_files import Folder, ModelFile, file_in, list_folder, read_json_object
from sft_jax.checkpoint.mxfp4 import join_mxfp4
from sft_jax.checkpoint.param_source import GrownSource, ParamSource, check_finite, place_shards, read_box
from sft_jax.checkpoint.quantized_source import HeldArray, QuantizedSource
from sft_jax.checkpoint.safetensors_io import TensorInfo, read_index
from sft_jax.checkpoint.stored_tensor import Index, StoredTensor
from sft_jax.datatypes import ConfigError, StorageError
from sft_jax.model import quantized
from sft_jax.model.families import TransformerConfig
from sft_jax.model.hf_config import read_hf_config
from sft_jax.model.router import dtype_among
from sft_jax.model.transformer import Params, linears

_SAMPLED_BYTES = 1024
_BLOCK_ROWS = 4096  # rows of an embedding held at once while two are compared


def read_config(folder: Folder) -> tuple[TransformerConfig, dict[str, Any]]:
    """The model that a folder's `config.json` describes, and the file's fields.

    Raises:
      StorageError: where the file cannot be read.
      ConfigError: where it is not JSON, or not a model that we build.
    """
    file = file_in(folder, "config.json")
    fields = read_json_object(file)
    return read_hf_config(fields, str(file)), fields


def read_generation_config(folder: Folder) -> dict[str, Any]:
    """The fields of a folder's `generation_config.json`; {}: it has none, or there is no folder ("").

    Raises:
      StorageError: where the file cannot be read.
      ConfigError: where it is not JSON.
    """
    name = "generation_config.json"
    return read_json_object(file_in(folder, name)) if folder and name in list_folder(folder) else {}


def load_pretrained(
    folder: Folder,
    config: TransformerConfig,
    shardings: Mapping[str, Sharding] | None,
    dtype: str | Mapping[str, str],
) -> Params:
    """Read a folder's weights, each device's part straight onto it.

    Names, shapes and dtypes of all tensors are checked before any is read.

    Args:
      folder: on disk or behind a URL.
      config: the folder's, from `read_config`, or with a larger vocabulary. New rows of embedding and head are the mean
        of the folder's, so that a new token starts as an average one (https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
      shardings: by parameter path; None: everything on the default device.
      dtype: of the parameters (`router.dtype_among` has an exception), or of each by path. A kernel's may be a format
        of model/quantized.py: it is quantized as it is read, and its codes and scales stand in its place,
        `....query.nf4` and `....query.scales`.

    Raises:
      StorageError: where the folder is not exactly what its config.json describes, or a weight is NaN or infinite.
      ConfigError: for float64 without `jax_enable_x64`.
    """
    dtypes = (
        {r.path: dtype_among(r.path, dtype).name for r in tensor_rules(config)} if isinstance(dtype, str) else dtype
    )
    if "float64" in dtypes.values() and jax.dtypes.canonicalize_dtype("float64") != jnp.float64:
        raise ConfigError("config.model.param_dtype: is float64, which jax would narrow. Set JAX_ENABLE_X64=1.")
    stored, _ = read_config(folder)
    assert dataclasses.replace(stored, vocab_size=config.vocab_size) == config, f"{folder} holds {stored}"
    params = {}
    for path, source in grow_sources(open_sources(folder, stored), config).items():
        for name, array in held_arrays(path, source, dtypes[path], config).items():
            sharding = shardings[name] if shardings is not None else SingleDeviceSharding(jax.devices()[0])
            params[name] = place_shards(array.shape, sharding, array.read)
    return params


def held_arrays(path: str, source: ParamSource, dtype: str, config: TransformerConfig) -> dict[str, HeldArray]:
    """The one array of most parameters, by path; or the codes and the scales of a quantized kernel."""
    if dtype not in quantized.FORMATS:
        return {path: HeldArray(source.shape, partial(read_box, source, dtype=dtype))}
    module = path.removesuffix(".kernel")
    kernel = linears(config)[module]
    axis = len(source.shape) - len(kernel.out_dims) - 1
    num_stack = axis + 1 - len(kernel.in_dims)
    blocks = QuantizedSource(source, axis, quantized.block_size(source.shape[axis], module), dtype, num_stack)
    return {f"{module}.{dtype}": blocks.codes(), f"{module}.{quantized.SCALES}": blocks.scales()}


def open_sources(folder: Folder, stored: TransformerConfig) -> dict[str, ParamSource]:
    """Every parameter of a folder, by path. Names, shapes and dtypes are checked; hardly any weight is read.

    Args:
      stored: the folder's own, from `read_config`.

    Raises:
      StorageError: where the folder is not exactly what its config.json describes.
    """
    rules = tensor_rules(stored)
    if is_converted(folder):
        return dict(open_converted(folder, {rule.path: rule.shape(stored) for rule in rules}))
    index = read_index(folder)
    _, fields = read_config(folder)
    described = fields.get("quantization_config") or {}
    matched = match_tensors(stored, join_block_fp8(join_mxfp4(index, described), described), str(folder))
    if stored.tie_embeddings:
        _check_tied(index)
    return {rule.path: HfSource(rule, matched[rule.path], stored) for rule in rules}


def grow_sources(sources: Mapping[str, ParamSource], config: TransformerConfig) -> dict[str, ParamSource]:
    """The same, with a row of embedding and head for each of the vocabulary's ids."""
    grown = dict(sources)
    for rule in tensor_rules(config):
        source, shape = sources[rule.path], rule.shape(config)
        if source.shape != shape:
            old, new = source.shape[0], shape[0]
            assert old < new, f"{source} has {old} rows, not {new}"
            logging.info("%s: rows [%d, %d) are new: the mean of the %d that the folder has", source, old, new, old)
            grown[rule.path] = GrownSource(source, new)
    return grown


class HfSource(ParamSource):
    """A parameter in the tensors of a Hugging Face folder, one for each place of its stack."""

    def __init__(self, rule: TensorRule, tensors: tuple[StoredTensor, ...], stored: TransformerConfig) -> None:
        self.rule, self.tensors, self.stored = rule, tensors, stored
        self.shape = rule.shape(stored)
        self.dtype = np.dtype(reduce(jnp.promote_types, (_unpacked(tensor.dtype) for tensor in tensors)))

    def __str__(self) -> str:
        return str(self.tensors[0])

    def read(self, index: Index, out: np.ndarray) -> None:
        depth = len(self.rule.stack)
        for place in np.ndindex(out.shape[:depth]):
            number = 0
            for offset, at, size in zip(place, index, self.rule.stack, strict=False):
                number = number * size + at.start + offset
            self._read_tensor(self.tensors[number], index[depth:], out[place])

    def _read_tensor(self, tensor: StoredTensor, index: Index, out: np.ndarray) -> None:
        tensor.read_view(lambda whole: self.rule.from_hf(whole, self.stored)[index], out)
        check_finite(out, tensor)


def _unpacked(dtype: np.dtype) -> np.dtype:
    """Numbers of 8 bits are for storing: bfloat16 has them all."""
    return np.dtype(jnp.bfloat16) if dtype.itemsize == 1 else dtype


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
    for start in range(0, tensor.shape[0], _BLOCK_ROWS):
        rows = slice(start, min(start + _BLOCK_ROWS, tensor.shape[0]))
        yield tensor.read_box((rows, slice(0, tensor.shape[1]))).astype(np.float32)


def digest_weights(folder: Folder) -> str:
    """sha256 of every tensor's name, dtype and shape, and of the bytes at its two ends; of a converted folder, that of
    its source, and of the dtypes where they are others.

    Hashing all bytes would take minutes. Training in full, or merging an adapter, changes whole tensors, of which the
    ends are a sample; a base that differs only in the middle of some, such as in rows of single tokens, is not seen.
    """
    if is_converted(folder):
        return read_record(folder).digest
    by_file: dict[ModelFile, list[TensorInfo]] = {}
    for tensor in read_index(folder).values():
        by_file.setdefault(tensor.file, []).append(tensor)
    samples: dict[str, list[bytes]] = {}
    for file, tensors in by_file.items():
        heads = [(tensor.begin, min(tensor.begin + _SAMPLED_BYTES, tensor.end)) for tensor in tensors]
        tails = [(max(tensor.end - _SAMPLED_BYTES, tensor.begin), tensor.end) for tensor in tensors]
        parts = file.read_ranges(heads + tails)
        for tensor, *ends in zip(tensors, parts[: len(tensors)], parts[len(tensors) :], strict=True):
            samples[f"{tensor.name} {tensor.dtype.name} {tensor.shape}\n"] = ends
    digest = hashlib.sha256()
    for description, ends in sorted(samples.items()):
        digest.update(b"".join([description.encode(), *ends]))
    return digest.hexdigest()
