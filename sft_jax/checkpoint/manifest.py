"""The files of a step <-> its digest manifest, by which every byte of it is proved before it is trusted.

    <run>/checkpoints/<step>/sft_jax_manifest.json   size and sha256 of every other file; then the manifest's own sha256
                             sft_jax_digests.<i>     what process i has hashed, until process 0 has put it together

Written last, by rename: a step that has no manifest was never saved. Each process hashes what it has written itself
(`ocdbt.process_<i>`), process 0 the rest.
"""

import functools
import hashlib
import os
import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import msgspec
from etils import epath

from sft_jax.checkpoint.storage import retried, write_whole
from sft_jax.datatypes import StorageError

FILE = "sft_jax_manifest.json"
PART_TIMEOUT_SECONDS = 1800.0
_PART = "sft_jax_digests.{}"
_PROCESS_FOLDER = re.compile(r"(^|/)ocdbt\.process_(?P<process>\d+)/")
_BLOCK_BYTES = 2**22
_NUM_THREADS = 4
_Content = TypeVar("_Content", bound=msgspec.Struct)


class FileDigest(msgspec.Struct, frozen=True):
    size: int
    sha256: str


class Manifest(msgspec.Struct, kw_only=True, frozen=True):
    """`files` are named relative to the step's folder. `best_loss` is held-out loss, where it was the lowest so far."""

    run_id: str
    step: int
    config_digest: str
    data_fingerprint: str
    mesh: dict[str, int]
    num_processes: int
    best_loss: float | None
    files: dict[str, FileDigest] = {}


class _Part(msgspec.Struct, frozen=True):
    files: dict[str, FileDigest]


def seal(content: msgspec.Struct) -> bytes:
    """JSON in one line, and its sha256 in the next: no bit of either changes unseen."""
    line = msgspec.json.encode(content)
    return line + b"\n" + hashlib.sha256(line).hexdigest().encode() + b"\n"


def unseal(data: bytes, kind: type[_Content]) -> _Content:
    """Raises ValueError where the bytes are not what `seal` gave."""
    line, _, rest = data.partition(b"\n")
    if rest != hashlib.sha256(line).hexdigest().encode() + b"\n":
        raise ValueError("its digest does not fit its content")
    return msgspec.json.decode(line, type=kind)


def read_manifest(folder: epath.Path) -> Manifest:
    """
    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged.
      OSError: it cannot be read.
    """
    path = folder / FILE
    if os.path.islink(path) or (path.exists() and not path.is_file()):
        raise ValueError("it is no file")
    return unseal(retried(path.read_bytes), Manifest)


def write_manifest(folder: epath.Path, manifest: Manifest, process_index: int) -> Manifest | None:
    """Hash what is this process's of a step; process 0 waits for the others and writes the manifest.

    Args:
      manifest: without `files`.

    Returns:
      The whole manifest, in process 0; None elsewhere, when process 0 has written it.

    Raises:
      StorageError: another process has not done its part in time.
      OSError: a file cannot be read or written.
    """
    names = list_files(folder)
    files = hash_files(folder, [name for name in names if _owner(name, manifest.num_processes) == process_index])
    if process_index:
        write_whole(folder / _PART.format(process_index), seal(_Part(files)))
        _wait_for(folder / FILE, "process 0 has not written its manifest")
        return None
    parts = {index: folder / _PART.format(index) for index in range(1, manifest.num_processes)}
    for index, path in parts.items():
        _wait_for(path, f"process {index} has not hashed what it wrote")
        files |= unseal(retried(path.read_bytes), _Part).files
        retried(path.unlink)
    whole = msgspec.structs.replace(manifest, files=dict(sorted(files.items())))
    write_whole(folder / FILE, seal(whole))
    return whole


def _owner(name: str, num_processes: int) -> int | None:
    """The process that hashes a file; None: it is not of the checkpoint."""
    if "/" not in name and name.startswith(_PART.format("")):
        return None
    found = _PROCESS_FOLDER.search(name)
    process = int(found["process"]) if found else 0
    return process if process < num_processes else 0


def _wait_for(path: epath.Path, what: str) -> None:
    end = time.monotonic() + PART_TIMEOUT_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            raise StorageError(
                f"{path.parent}: {what} within {PART_TIMEOUT_SECONDS:.0f} s. Is it alive, and does it see this folder?"
            )
        time.sleep(0.05)


def list_files(folder: epath.Path) -> list[str]:
    """Names of all files under a step's folder, but for its manifest, sorted.

    Raises:
      ValueError: something there is neither a file nor a folder; a link is neither.
      OSError: it cannot be listed.
    """
    names = []
    to_do = [folder]
    while to_do:
        for path in retried(functools.partial(_list_folder, to_do.pop())):
            name = str(path.relative_to(folder))
            if os.path.islink(path):
                raise ValueError(f"{name} is a link")
            if path.is_dir():
                to_do.append(path)
            elif path.is_file():
                names.append(name)
            elif path.exists():
                raise ValueError(f"{name} is no file")
    return sorted(name for name in names if name != FILE)


def _list_folder(folder: epath.Path) -> list[epath.Path]:
    return list(folder.iterdir())


def hash_files(folder: epath.Path, names: Iterable[str]) -> dict[str, FileDigest]:
    """Raises OSError where a file cannot be read."""
    names = list(names)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: retried(lambda: _hash_file(folder / name)), names), strict=True))


def _hash_file(path: epath.Path) -> FileDigest:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    return FileDigest(size, digest.hexdigest())


def share_of(files: Mapping[str, FileDigest], process_index: int, num_processes: int) -> list[str]:
    """The files that a process verifies: about an equal part of the bytes, whichever process wrote them."""
    shares = [(0, index) for index in range(num_processes)]
    mine = []
    for name in sorted(files, key=lambda name: (-files[name].size, name)):
        size, index = min(shares)
        shares[shares.index((size, index))] = (size + files[name].size, index)
        if index == process_index:
            mine.append(name)
    return mine


def find_damage(folder: epath.Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """What is wrong with these files of a step, a line for each."""
    names = list(names)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        found = pool.map(lambda name: _find_damage_of(folder / name, manifest.files[name]), names)
        return [f"{name} {problem}" for name, problem in zip(names, found, strict=True) if problem]


def _find_damage_of(path: epath.Path, expected: FileDigest) -> str:
    try:
        if os.path.islink(path):
            return "is a link"
        size = retried(path.stat).length
        if size != expected.size:
            return f"has {size:,} bytes of {expected.size:,}"
        return "" if retried(lambda: _hash_file(path)) == expected else "is not what was written"
    except (FileNotFoundError, NotADirectoryError):
        return "is gone"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def find_strangers(folder: epath.Path, manifest: Manifest) -> list[str]:
    """What is in a step's folder, and not of the step."""
    try:
        found = list_files(folder)
    except ValueError as error:
        return [str(error)]
    except OSError as error:
        return [f"it cannot be listed: {error}"]
    return [f"{name} was not written by the save" for name in found if name not in manifest.files]
