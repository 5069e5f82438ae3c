"""A folder that an export writes: the old one or the new one, never a part, and nothing of anybody else's is lost.

It is filled beside its target and renamed when it is whole. `sft_jax_export.json` in it says which files are its own.
"""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import msgspec

from sft_jax.checkpoint.agreement import decide, gather
from sft_jax.checkpoint.safetensors_writer import write_json
from sft_jax.datatypes import StorageError

_RECORD = "sft_jax_export.json"


def write_folder(folder: str | os.PathLike[str], fill: Callable[[Path], None], tensors: Iterable[Any]) -> None:
    """Have process 0 fill a folder and put it in the target's place. All processes call it.

    Args:
      fill: writes an empty folder, and takes `tensors`.
      tensors: whose making takes all processes.

    Raises:
      StorageError: on all processes, where the target holds files that no export wrote, or the disk refuses.
    """
    failure: StorageError | None = None
    try:
        if jax.process_index() == 0:
            _replace_folder(Path(folder), fill)
    except StorageError as error:
        failure = error
    if jax.process_count() > 1:
        try:
            for _ in tensors:  # gathering takes all processes, whatever has become of the writing
                pass
        except StorageError as error:
            failure = failure or error
        failures = gather("how its export went", failure is not None)
        if decide("how the exports went", lambda: any(failures)) and failure is None:
            failure = StorageError(f"{folder}: process 0 could not write the export; its log says why.")
    if failure is not None:
        raise failure


def _replace_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Have a folder filled beside its target and, when it is whole, put in its place."""
    check_export_target(target)
    try:
        partial = _empty_sibling(target, "partial")
        try:
            fill(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        write_json(partial / _RECORD, {"written_by": "sft_jax", "files": _files_in(partial)})
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
    record = target / _RECORD
    try:
        own = msgspec.json.decode(record.read_bytes(), type=_Record).files if record.is_file() else []
    except msgspec.DecodeError:  # of somebody else, by chance under our name
        own = []
    foreign = sorted(set(files) - {*own, _RECORD})
    if foreign:
        raise StorageError(
            f"{target}: holds {foreign[0]}, which no export of ours wrote ({len(foreign)} such files). Choose another "
            "folder, or remove it."
        )


class _Record(msgspec.Struct):
    files: list[str]


def _files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def _empty_sibling(target: Path, suffix: str) -> Path:
    """A fresh folder beside the target, on the same file system; what an interrupted export left there is removed."""
    sibling = target.absolute().parent / f".{target.name}.{suffix}"
    if sibling.exists():
        shutil.rmtree(sibling)
    sibling.mkdir(parents=True)
    return sibling
