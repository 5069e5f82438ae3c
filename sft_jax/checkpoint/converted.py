"""A model folder that `sft-jax convert` has made: what a Hugging Face folder says, and its weights as an Orbax item.

config.json, tokenizer files    as in the source
params/                         parameters by our paths; see orbax_item.py
sft_jax_convert.json            what it was made from. Written last: a folder without it is not whole
"""

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec

from sft_jax.checkpoint.model_files import Folder, ModelFile, file_in, list_folder
from sft_jax.checkpoint.orbax_item import OrbaxSource, open_item, write_durably, write_item
from sft_jax.checkpoint.param_source import ParamSource
from sft_jax.checkpoint.safetensors_io import INDEX_FILE
from sft_jax.datatypes import StorageError
from sft_jax.model.router import dtype_among

RECORD = "sft_jax_convert.json"
_ITEM = "params"
_COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_MAX_COPIED_BYTES = 2**28


class Record(msgspec.Struct, kw_only=True):
    """`digest` is of the source's weights, and of the dtype that they were cast to; `dtypes` of the arrays by path."""

    source: str
    digest: str
    dtypes: dict[str, str]
    files: dict[str, str]
    """Name and sha256 of everything beside the arrays."""
    written_by: str = "sft_jax"


def is_converted(folder: Folder) -> bool:
    return RECORD in list_folder(folder)


def read_record(folder: Folder) -> Record:
    """
    Raises:
      StorageError: it cannot be read.
    """
    file = file_in(folder, RECORD)
    try:
        return msgspec.json.decode(file.read(), type=Record)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StorageError(f"{file}: is malformed: {error}. Convert the model again.") from error


def open_converted(folder: Folder, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, OrbaxSource]:
    """The parameters of a converted folder, whose paths and shapes are those that its config.json asks for.

    Raises:
      StorageError: they are not.
    """
    record = read_record(folder)
    if record.dtypes.keys() != shapes.keys():
        path = min(record.dtypes.keys() ^ shapes.keys())
        side = "does not have" if path in shapes else "has"
        raise StorageError(
            f"{folder}: {side} the parameter {path}, and config.json asks for another set. Was config.json changed, or "
            "the folder made by another version? Convert the model again."
        )
    sources = open_item(file_in(folder, _ITEM).path, {path: path for path in shapes})
    for path, source in sources.items():
        if source.shape != shapes[path]:
            raise StorageError(
                f"{source} is {list(source.shape)}, and config.json asks for {list(shapes[path])}. Convert it again."
            )
        if source.dtype.name != record.dtypes[path]:
            raise StorageError(f"{source} is {source.dtype}, and was converted to {record.dtypes[path]}. Restore it.")
    return sources


def convert_folder(
    source: Folder, target: Folder, sources: Mapping[str, ParamSource], digest: str, dtype: str | None
) -> bool:
    """Write a converted folder. It is made beside its target and renamed when whole.

    Args:
      sources: the parameters of the source folder, by path.
      digest: of its weights.
      dtype: of all arrays; None: each as it is stored.

    Returns:
      Whether it was written; False: the target is already this.

    Raises:
      StorageError: the target holds something else, the source is damaged, or the disk refuses.
    """
    dtypes = {path: dtype_among(path, dtype) if dtype else param.dtype for path, param in sources.items()}
    if any(kind != sources[path].dtype for path, kind in dtypes.items()):  # other numbers: another base
        digest = hashlib.sha256(f"{digest} as {dtype}".encode()).hexdigest()
    copied = {name: _read(file_in(source, name)) for name in _names_to_copy(source)}
    record = Record(
        source=os.fspath(source),
        digest=digest,
        dtypes={path: kind.name for path, kind in dtypes.items()},
        files={name: hashlib.sha256(content).hexdigest() for name, content in copied.items()},
    )
    if _is_made(target, record):
        return False
    target = Path(target).absolute()
    partial = target.parent / f".{target.name}.partial"
    try:
        if partial.exists():
            shutil.rmtree(partial)
        (partial / _ITEM).mkdir(parents=True)
        for name, content in copied.items():
            (partial / name).write_bytes(content)
        write_item(partial / _ITEM, sources, dtypes)
        write_durably(file_in(partial, RECORD), msgspec.json.format(msgspec.json.encode(record)))
        partial.replace(target)
    except OSError as error:
        raise StorageError(f"{target}: could not be written: {error}. Free some space, or choose another.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # by now it has its name, or was refused
    return True


def _is_made(target: Folder, record: Record) -> bool:
    path = Path(target)
    if path.exists() and not path.is_dir():
        raise StorageError(f"{path}: is a file, and convert needs a folder. Choose another name.")
    names = sorted(os.listdir(path)) if path.exists() else []
    if not names:
        return False
    if RECORD not in names:
        raise StorageError(f"{path}: holds {names[0]}, which no convert wrote. Choose another folder, or remove it.")
    made = read_record(path)
    others = sorted(name for name, _ in {*made.files.items()} ^ {*record.files.items()})
    if (made.digest, made.dtypes) != (record.digest, record.dtypes):
        what = "of other weights or dtypes"
    elif others:
        what = f"with another {others[0]}"
    else:
        return True
    raise StorageError(f"{path}: was made from {made.source}, {what}. Choose another folder, or remove it.")


def _names_to_copy(source: Folder) -> list[str]:
    """What describes the model and its tokenizer; no weights, no code, and no record of our own."""
    return [
        name
        for name in list_folder(source)
        if name.endswith(_COPIED_SUFFIXES) and name != INDEX_FILE and not name.startswith("sft_jax_")
    ]


def _read(file: ModelFile) -> bytes:
    size = file.size()
    if size > _MAX_COPIED_BYTES:
        raise StorageError(f"{file}: has {size} bytes, too many for a tokenizer or a config. Remove it.")
    return file.read()
