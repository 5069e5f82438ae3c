"""Tensors, one by one -> a folder of safetensors files that `read_index` reads: one file, or shards with an index."""

import json
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sft_jax.checkpoint.safetensors_io import DTYPES, INDEX_FILE, SINGLE_FILE

MAX_SHARD_BYTES = 5_000_000_000
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FLUSHED_BYTES = 2**28


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(specs: Iterable[TensorSpec], max_shard_bytes: int) -> list[tuple[TensorSpec, ...]]:
    """Cut a sequence of tensors into shards, in order, each of at most `max_shard_bytes` or of one tensor."""
    shards: list[list[TensorSpec]] = [[]]
    shard_bytes = 0
    for spec in specs:
        if shard_bytes and shard_bytes + spec.num_bytes > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(spec)
        shard_bytes += spec.num_bytes
    return [tuple(shard) for shard in shards]


def write_tensors(
    folder: Path,
    specs: Iterable[TensorSpec],
    tensors: Iterable[tuple[str, np.ndarray]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a folder that `read_index` reads: one file, or shards with an index.

    Each file appears under its name when its bytes are complete and on disk; the index comes last.

    Args:
      specs: every tensor, in the order of writing.
      tensors: their names and values in that order, taken one at a time and dropped once written. A tensor may
        come in pieces: some of its rows, in order, each time under its name.
    """
    shards = plan_shards(specs, max_shard_bytes)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    files = dict(zip(names if len(shards) > 1 else [SINGLE_FILE], shards, strict=True))
    tensors = iter(tensors)
    for file, shard in files.items():
        _write_shard(folder / file, shard, tensors)
    assert next(tensors, None) is None, "more tensors than specs"
    if len(files) > 1:
        total = sum(spec.num_bytes for shard in shards for spec in shard)
        weight_map = {spec.name: file for file, shard in files.items() for spec in shard}
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_shard(path: Path, shard: Iterable[TensorSpec], tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as stream, ThreadPoolExecutor(1) as flusher:
        stream.write(_encode_header(shard))
        pending, num_waiting = None, 0
        for spec in shard:
            for data in _pieces(spec, tensors):
                stream.write(data)
                num_waiting += data.nbytes
                del data  # before the next one is made
            if num_waiting > _FLUSHED_BYTES and (pending is None or pending.done()):
                stream.flush()
                pending, num_waiting = flusher.submit(os.fdatasync, stream.fileno()), 0  # or the last one would wait
        if pending is not None:
            pending.result()
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def _pieces(spec: TensorSpec, tensors: Iterator[tuple[str, np.ndarray]]) -> Iterator[memoryview]:
    """The bytes of one tensor, as many of its rows at a time as it comes in."""
    num_rows, is_done = 0, False
    while not is_done:
        made = next(tensors, None)
        assert made is not None, f"nothing is left for {spec}"
        (name, values), made = made, None
        assert (name, values.dtype, values.shape[1:]) == (spec.name, spec.dtype, spec.shape[1:]), (
            f"{name} is not {spec}"
        )
        num_rows += len(values) if spec.shape else 1
        is_done = num_rows >= (spec.shape[0] if spec.shape else 1)
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        del values
        yield data
        del data
    assert not spec.shape or num_rows == spec.shape[0], f"{num_rows} rows are not {spec}"


def _encode_header(specs: Iterable[TensorSpec]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without a format
    at = 0
    for spec in specs:
        end = at + spec.num_bytes
        header[spec.name] = {"dtype": _DTYPE_NAMES[spec.dtype], "shape": spec.shape, "data_offsets": (at, end)}
        at = end
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)  # the tensors begin at a multiple of 8
    return len(data).to_bytes(8, "little") + data


def write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
