"""An Orbax item on disk <-> sources of parameters, array by array, so that no more than a few chunks are in memory.

    <item>/_METADATA                        the tree, as Orbax writes it
    <item>/<parameter>/zarr.json            shape, dtype, chunks
    <item>/<parameter>/c/<place of chunk>   its values and their checksum

Orbax restores what is written here, on any mesh and any number of hosts. Its own save is not used, since it holds the
whole tree in memory, twice where the leaves are mapped files. What is read here may as well be by Orbax's save.
"""

import math
import os
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import msgspec
import numpy as np
import tensorstore as ts

from sft_jax.checkpoint.model_files import Folder, ModelFile, file_in
from sft_jax.checkpoint.param_source import ParamSource, boxes, check_finite, read_box
from sft_jax.checkpoint.stored_tensor import Index, copy_in_blocks
from sft_jax.data.stored_files import is_url
from sft_jax.datatypes import StorageError

_METADATA = "_METADATA"
_MAX_METADATA_BYTES = 2**26
_CHUNK_BYTES = 2**23
_SLAB_BYTES = 2**26  # chunks that are made at one time
_READ_BYTES = 2**25
_WORKERS = 3


class OrbaxSource(ParamSource):
    """One array of an item."""

    def __init__(self, name: str, array: ts.TensorStore) -> None:
        self._name, self._array = name, array
        self.shape = tuple(array.shape)
        self.dtype = np.dtype(array.dtype.numpy_dtype)

    def __str__(self) -> str:
        return self._name

    def read(self, index: Index, out: np.ndarray) -> None:
        row_bytes = self.dtype.itemsize * math.prod(out.shape[1:])
        step = (max(1, _READ_BYTES // max(row_bytes, 1)), *out.shape[1:]) if out.ndim else ()
        for box in boxes(out.shape, step):
            place = tuple(
                slice(whole.start + at.start, whole.start + at.stop) for whole, at in zip(index, box, strict=True)
            )
            try:
                values = np.asarray(self._array[place].read().result())
            except (ValueError, OSError) as error:
                raise StorageError(f"{self} cannot be read: {error}. Restore the folder from where it came.") from error
            with np.errstate(over="ignore"):  # refused below
                values = values.astype(out.dtype, copy=False)
            check_finite(values, self)
            copy_in_blocks(out[box], values)


class _Metadata(msgspec.Struct):
    tree_metadata: dict[str, Any]
    use_ocdbt: bool
    use_zarr3: bool = False


def open_item(item: Folder, names: Mapping[str, str]) -> dict[str, OrbaxSource]:
    """The arrays of an item.

    Args:
      names: a key for each array -> its name in the item, the tree's keys joined by dots.

    Raises:
      StorageError: it is no item, or an array is not there.
    """
    file = file_in(item, _METADATA)
    try:
        metadata = msgspec.json.decode(file.read(0, _MAX_METADATA_BYTES), type=_Metadata)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StorageError(f"{file}: is not what Orbax writes: {error}. Name a folder of a checkpoint.") from error
    driver = "zarr3" if metadata.use_zarr3 else "zarr"
    context = ts.Context()
    sources = {}
    for key, name in names.items():
        base = _store_url(item)
        store = {"driver": "ocdbt", "base": base, "path": f"{name}/"} if metadata.use_ocdbt else f"{base}{name}/"
        spec = {"driver": driver, "kvstore": store, "fill_missing_data_reads": False}
        where = f"{item}: {name}"
        try:
            sources[key] = OrbaxSource(where, ts.open(spec, open=True, read=True, context=context).result())
        except (ValueError, OSError) as error:
            raise StorageError(f"{where} cannot be opened: {error}. Is it of this model?") from error
    return sources


def _store_url(item: Folder) -> str:
    """As tensorstore names a folder."""
    path = os.fspath(item)
    return f"{path.rstrip('/')}/" if is_url(path) else f"file://{os.path.abspath(path)}/"


def write_item(item: Folder, sources: Mapping[str, ParamSource], dtypes: Mapping[str, np.dtype]) -> None:
    """Write an item of one flat dict.

    Args:
      item: a folder on disk that exists and is empty.
      dtypes: of each array, to which its values are cast.

    Raises:
      StorageError: a source cannot be read, or a value is NaN or infinite.
      OSError: the disk refuses.
    """
    context = ts.Context()

    def write(array: ts.TensorStore, source: ParamSource, box: Index, dtype: np.dtype) -> None:
        values = read_box(source, box, dtype)
        try:
            array[box].write(values).result()
        except ValueError as error:  # what tensorstore makes of a full disk
            raise OSError(str(error)) from error

    with ThreadPoolExecutor(_WORKERS) as pool:
        pending: set[Future[None]] = set()
        try:
            for name, source in sources.items():
                chunk = _chunk_shape(source.shape, dtypes[name].itemsize)
                array = _create_array(item, name, source.shape, chunk, dtypes[name], context)
                for box in boxes(source.shape, _slab_shape(source.shape, chunk, dtypes[name].itemsize)):
                    if len(pending) == _WORKERS:
                        done, pending = wait(pending, return_when=FIRST_COMPLETED)
                        for future in done:
                            future.result()
                    pending.add(pool.submit(write, array, source, box, dtypes[name]))
            for future in pending:
                future.result()
        finally:
            for future in pending:
                future.cancel()
    metadata = _tree_metadata({name: source.shape for name, source in sources.items()})
    write_durably(file_in(item, _METADATA), msgspec.json.encode(metadata))


def _create_array(
    item: Folder, name: str, shape: tuple[int, ...], chunk: tuple[int, ...], dtype: np.dtype, context: ts.Context
) -> ts.TensorStore:
    metadata = {
        "shape": shape,
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    }
    spec = {
        "driver": "zarr3",
        "kvstore": f"{_store_url(item)}{name}/",
        "metadata": metadata,
        "store_data_equal_to_fill_value": True,
    }
    return ts.open(spec, create=True, context=context).result()


def _chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """No chunk spans two layers unless layers are small; then the longest dim is halved, so that a mesh that shards any
    dim reads little that it does not need.

    [32, 4096, 14336] of 2 bytes -> [1, 2048, 1792], 7 MiB
    """
    chunk = list(shape)
    if len(chunk) > 2 and math.prod(chunk) * itemsize > _CHUNK_BYTES:
        chunk[0] = 1
    while math.prod(chunk) * itemsize > _CHUNK_BYTES:
        longest = chunk.index(max(chunk))
        chunk[longest] = -(-chunk[longest] // 2)
    return tuple(chunk)


def _slab_shape(shape: tuple[int, ...], chunk: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """As many whole chunks as are made at one time: a folder's bytes are then read nearly in their order."""
    slab = list(chunk)
    for dim in reversed(range(len(shape))):
        room = max(1, _SLAB_BYTES // (math.prod(slab) * itemsize))
        slab[dim] = min(shape[dim], chunk[dim] * room)
    return tuple(slab)


def _tree_metadata(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What Orbax's `InternalTreeMetadata` writes for a dict of arrays."""
    tree = {
        str((name,)): {
            "key_metadata": [{"key": name, "key_type": 2}],  # 2: a key of a dict
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": shape},
        }
        for name, shape in shapes.items()
    }
    return {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def write_durably(file: ModelFile, data: bytes) -> None:
    """Raises OSError where the disk refuses."""
    with open(file.path, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
