"""A file of a model folder, on disk or behind a URL -> its size and any ranges of its bytes.

A folder is foreign: no name and no link in it may lead elsewhere, and only regular files are opened.
"""

import errno
import os
import posixpath
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from sft_jax.data.stored_files import is_url, open_filesystem, readable
from sft_jax.datatypes import ConfigError, StorageError

Folder = str | os.PathLike[str]
_MAX_OBJECT_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class ModelFile:
    path: str

    def __str__(self) -> str:
        return self.path

    @property
    def name(self) -> str:
        return posixpath.basename(self.path)

    @property
    def is_remote(self) -> bool:
        return is_url(self.path)

    def size(self) -> int:
        """In bytes.

        Raises:
          StorageError: it is not there, or cannot be reached.
        """
        with readable(self.path, StorageError):
            if not self.is_remote:
                status = os.stat(self.path)
                if not stat.S_ISREG(status.st_mode):
                    raise OSError(errno.EINVAL, "is no regular file")
                return status.st_size
            filesystem, path = open_filesystem(self.path)
            return filesystem.size(path)

    def read(self, begin: int = 0, end: int | None = None) -> bytes:
        """Bytes [begin, end), or to the end of the file.

        Raises:
          StorageError: it is not there, or cannot be reached.
        """
        with readable(self.path, StorageError):
            if self.is_remote:
                filesystem, path = open_filesystem(self.path)
                return filesystem.cat_file(path, start=begin, end=end)
            with open(self.path, "rb") as file:
                file.seek(begin)
                return file.read(-1 if end is None else end - begin)

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Several ranges, at the same time where a store can do so.

        Raises:
          StorageError: the file cannot be reached, or ends before a range does.
        """
        with readable(self.path, StorageError):
            if self.is_remote:
                filesystem, path = open_filesystem(self.path)
                begins, ends = zip(*ranges, strict=True)
                parts = filesystem.cat_ranges([path] * len(ranges), list(begins), list(ends), on_error="raise")
            else:
                with open(self.path, "rb") as file:
                    parts = [_read_range(file, begin, end) for begin, end in ranges]
        for part, (begin, end) in zip(parts, ranges, strict=True):
            if len(part) != end - begin:
                raise StorageError(f"{self}: bytes [{begin}, {end}) are not there. Did the file change? Start again.")
        return parts


def _read_range(file: BinaryIO, begin: int, end: int) -> bytes:
    file.seek(begin)
    return file.read(end - begin)


def file_in(folder: Folder, name: str) -> ModelFile:
    """The file of that name, which need not be there.

    Raises:
      StorageError: it is a link that leads out of the folder, and not into the same model's place in the Hub's cache.
    """
    file = ModelFile(posixpath.join(os.fspath(folder), name))
    if not file.is_remote and os.path.islink(file.path):
        home, target = os.path.realpath(folder), os.path.realpath(file.path)
        blobs = os.path.join(os.path.dirname(os.path.dirname(home)), "blobs")  # of <model>/snapshots/<revision>
        if os.path.dirname(target) not in (home, blobs):
            raise StorageError(
                f"{file}: is a link to {target}, outside the model's folder. Put the file itself there, or name the "
                "folder that has it."
            )
    return file


def read_json_object(file: ModelFile) -> dict[str, Any]:
    """The fields of a small file, such as `config.json`.

    Raises:
      StorageError: it cannot be read.
      ConfigError: it is no JSON object, or too large for what it should be.
    """
    if (size := file.size()) > _MAX_OBJECT_BYTES:
        raise ConfigError(f"{file}: has {size} bytes, more than {_MAX_OBJECT_BYTES}. Name another folder.")
    try:
        return msgspec.json.decode(file.read(), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{file}: is not a JSON object: {error}. Download it again.") from error


def list_folder(folder: Folder) -> list[str]:
    """Names of the files in a folder, not of those deeper; nothing where there is no such folder.

    Raises:
      StorageError: the folder cannot be reached.
    """
    folder = os.fspath(folder)
    if not is_url(folder):
        with readable(folder, StorageError):
            place = Path(folder)
            return sorted(file.name for file in place.iterdir() if file.is_file()) if place.is_dir() else []
    with readable(folder, StorageError):
        filesystem, path = open_filesystem(folder)
        if not filesystem.isdir(path):
            return []
        entries = filesystem.ls(path, detail=True)
        return sorted(posixpath.basename(entry["name"]) for entry in entries if entry["type"] == "file")
