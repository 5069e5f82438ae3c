"""What a config names as a source in, the files to read out: sorted, each once, each of a kind that can be read; and
with them whatever else lies there and is not read, with the reason."""

import difflib
import glob
import json
import os
import posixpath
from collections.abc import Iterable
from typing import Any, NamedTuple

from sft_jax.data.stored_files import is_url, open_filesystem
from sft_jax.datatypes import DataError

_COMPRESSIONS = ("", ".gz", ".zst")
_ENDINGS: dict[str, str] = {
    **{f".{name}{compression}": "lines" for name in ("jsonl", "ndjson") for compression in _COMPRESSIONS},
    **{f".json{compression}": "json" for compression in _COMPRESSIONS},
    ".parquet": "columns",
    ".arrow": "columns",
}
_EXPECTED = ".jsonl, .ndjson or .json (also with .gz or .zst), .parquet or .arrow"
# What `datasets` writes beside its tables.
_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
_NOT_ROWS = frozenset({_STATE, _INFO, _SPLITS, "dataset_infos.json"})
_HIDDEN = "hidden: the name begins with a dot"
_LINKED = "a link to a folder, which is not followed"
_OTHER_KIND = "of a kind that is not read"
_NO_FILE = "a pipe, socket or device"
_NOTE = "a note of `datasets` beside its tables"
_LEFT_OVER = f"not among the tables that {_STATE} names"


def file_kind(path: str) -> str:
    """How a file is read, by its ending: `lines`, `json` or `columns`; empty where it cannot be."""
    lowered = path.lower()
    return next((kind for ending, kind in _ENDINGS.items() if lowered.endswith(ending)), "")


class NotRead(NamedTuple):
    """A file or folder of a source that is passed over."""

    path: str
    reason: str


class Found(NamedTuple):
    """What a source's path stands for."""

    files: list[str]
    not_read: list[NotRead]


def resolve_files(path: str, field: str) -> list[str]:
    """The files of `find_files`, alone."""
    return find_files(path, field).files


def find_files(path: str, field: str) -> Found:
    """The files of a source, sorted, and what else lies in its folders.

    Args:
      path: a file; a folder, of which every readable file is taken, at any depth; a folder written by `save_to_disk` of
        `datasets`; a pattern with *, ?, [] or **; or a URL of one of those.
      field: the config field that names it, for errors.

    Raises:
      DataError: there is no such thing, or nothing in it can be read.
    """
    place: _Disk | _Remote = _Remote(path, field) if is_url(path) else _Disk()
    try:
        return _resolve(place, os.path.expanduser(path) if isinstance(place, _Disk) else path, field)
    except DataError:
        raise
    except OSError as error:
        why = error.strerror or str(error) or type(error).__name__
        raise DataError(f"{field}: {path!r} cannot be read: {why}. Check the path and its permissions.") from error
    except Exception as error:
        if isinstance(place, _Disk):
            raise
        # Each store's client has its own errors, for credentials and timeouts above all.
        raise DataError(f"{field}: {path!r} cannot be read: {error}. Check the URL and your access to it.") from error


def _resolve(place: "_Disk | _Remote", path: str, field: str) -> Found:
    if place.is_file(path):
        if not file_kind(path):
            raise DataError(f"{field}: {path!r} has an unknown ending; expected {_EXPECTED}. Convert or rename it.")
        return Found([path], [])
    passed: list[NotRead] = []
    if place.is_folder(path):
        found, kind = place.walk(path, passed), "folder"
    elif glob.has_magic(path):
        found, kind = [], "pattern"
        for match in place.match(path):
            if place.is_folder(match):
                found.extend(place.walk(match, passed))
            elif place.is_special(match):
                passed.append(NotRead(match, _NO_FILE))
            else:
                found.append(match)
        if not found and not passed:
            raise DataError(f"{field}: {path!r} matches nothing. {_near_matches(place, path)}")
    else:
        what = f"is a link to {os.readlink(path)!r}, which is not there" if os.path.islink(path) else "is not there"
        raise DataError(f"{field}: {path!r} {what}. {_near_matches(place, path)}")
    files = _choose(place, sorted(set(found)), passed, field)
    if not files:
        endings = sorted({os.path.splitext(name)[1] or os.path.basename(name) for name in found})
        what = f"holds only {', '.join(endings[:5])}" if endings else "is empty"
        if passed and not endings:
            what = f"holds nothing to read: {passed[0].path!r} is {passed[0].reason}"
        raise DataError(f"{field}: the {kind} {path!r} {what}; expected files that end in {_EXPECTED}. Name another.")
    return Found(files, sorted(set(passed)))


def _choose(place: "_Disk | _Remote", found: list[str], passed: list[NotRead], field: str) -> list[str]:
    """The files to read of those found. What is not goes to `passed`: what `datasets` notes beside its tables, and what
    cannot be read."""
    by_folder: dict[str, list[str]] = {}
    for path in found:
        by_folder.setdefault(posixpath.dirname(path), []).append(path)
    files: list[str] = []
    for folder, paths in by_folder.items():
        names = {posixpath.basename(path): path for path in paths}
        if _SPLITS in names:
            splits = ", ".join(place.read_json(names[_SPLITS]).get("splits", []))
            raise DataError(f"{field}: {folder!r} holds the splits {splits}. Name the folder of one of them.")
        if _STATE in names and _INFO in names:
            tables = _read_state(place, folder, names, field)
            files += tables
            for name, path in names.items():
                if path not in tables:
                    passed.append(NotRead(path, _NOTE if name in _NOT_ROWS else _LEFT_OVER))
            continue
        has_tables = any(name.lower().endswith((".arrow", ".parquet")) for name in names)
        for name, path in names.items():
            if has_tables and name in _NOT_ROWS:
                passed.append(NotRead(path, _NOTE))
            elif file_kind(name):
                files.append(path)
            else:
                passed.append(NotRead(path, _OTHER_KIND))
    _refuse_twice(place, files, field)
    return sorted(files)


def _read_state(place: "_Disk | _Remote", folder: str, names: dict[str, str], field: str) -> list[str]:
    """The tables of a folder by `save_to_disk`, in their order."""
    state = place.read_json(names[_STATE])
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise DataError(
            f"{field}: {folder!r} is a selection of its tables' rows, which is not read. Save it with "
            "flatten_indices().save_to_disk()."
        )
    tables = [entry["filename"] for entry in state.get("_data_files", [])]
    missing = [name for name in tables if name not in names]
    if missing:
        raise DataError(f"{field}: {folder!r} has no {missing[0]}, which its {_STATE} names. Copy the folder anew.")
    return [names[name] for name in tables]


def _refuse_twice(place: "_Disk | _Remote", files: Iterable[str], field: str) -> None:
    """The same rows under two names, by a link or by an ending, would be trained on twice."""
    seen: dict[str, str] = {}
    for path in files:
        for name in {path.lower().removesuffix(".gz").removesuffix(".zst"), place.real_path(path)}:
            if seen.setdefault(name, path) != path:
                raise DataError(
                    f"{field}: both {seen[name]!r} and {path!r} are there, which look like the same rows. Remove one, "
                    "or name the files with a pattern."
                )


def _near_matches(place: "_Disk | _Remote", path: str) -> str:
    """What is there instead of a path: names like it in the deepest folder of it that exists."""
    folder, name = posixpath.split(path.rstrip("/"))
    while "/" in folder.rpartition("://")[2].strip("/") and (glob.has_magic(folder) or not place.is_folder(folder)):
        folder, name = posixpath.split(folder)
    if not place.is_folder(folder or "."):
        return "Check the path."
    names = sorted(place.names(folder or "."))
    near = difflib.get_close_matches(name, names, n=3) or [other for other in names if file_kind(other)][:3]
    missing = f"{posixpath.join(folder, name)!r} is the first part of it that is missing. "
    found = f"Near it: {', '.join(near)}. " if near else ""
    return f"{'' if posixpath.join(folder, name) == path.rstrip('/') else missing}{found}Check the path."


class _Disk:
    """The local file system."""

    is_file = staticmethod(os.path.isfile)
    is_folder = staticmethod(os.path.isdir)

    @staticmethod
    def walk(folder: str, passed: list[NotRead]) -> list[str]:
        """Every file at any depth; those that are hidden, and folders that are hidden or linked, go to `passed`."""
        found = []
        for parent, folders, names in os.walk(folder, onerror=_raise):
            for name in [*folders, *names]:
                path = os.path.join(parent, name)
                if name.startswith("."):
                    passed.append(NotRead(path, _HIDDEN))
                elif os.path.isdir(path):
                    if os.path.islink(path):
                        passed.append(NotRead(path, _LINKED))
                elif _Disk.is_special(path):
                    passed.append(NotRead(path, _NO_FILE))
                else:
                    found.append(path)
            folders[:] = [name for name in folders if not name.startswith(".")]
        return found

    @staticmethod
    def is_special(path: str) -> bool:
        """Whether reading it may never end. A link to nothing is not: reading it says so."""
        return os.path.exists(path) and not os.path.isfile(path)

    @staticmethod
    def real_path(path: str) -> str:
        return os.path.realpath(path)

    @staticmethod
    def match(pattern: str) -> list[str]:
        return glob.glob(pattern, recursive=True)

    @staticmethod
    def names(folder: str) -> list[str]:
        return os.listdir(folder)

    @staticmethod
    def read_json(path: str) -> dict[str, Any]:
        with open(path, "rb") as file:
            return _parse_object(file.read(), path)


class _Remote:
    """A file system behind a URL, through fsspec."""

    def __init__(self, url: str, field: str):
        try:
            self._filesystem, _ = open_filesystem(url)
        except ImportError as error:
            what = f"{url!r} needs a package that is not installed: {error}"
            raise DataError(f"{field}: {what}. Install it, or copy the files to a folder here.") from error
        except ValueError as error:
            raise DataError(f"{field}: {url!r} cannot be opened: {error}. Check the URL.") from error

    def is_file(self, url: str) -> bool:
        return self._filesystem.isfile(url)

    def is_folder(self, url: str) -> bool:
        return self._filesystem.isdir(url)

    def walk(self, url: str, passed: list[NotRead]) -> list[str]:
        root = self._filesystem._strip_protocol(url).rstrip("/")
        found = []
        for path in self._filesystem.find(root):
            full = self._filesystem.unstrip_protocol(path)
            if "/." in path[len(root) :]:
                passed.append(NotRead(full, _HIDDEN))
            else:
                found.append(full)
        return found

    def is_special(self, url: str) -> bool:
        return False

    def real_path(self, url: str) -> str:
        return url

    def match(self, url: str) -> list[str]:
        found = [path for path in self._filesystem.glob(url) if not posixpath.basename(path).startswith(".")]
        return [self._filesystem.unstrip_protocol(path) for path in found]

    def names(self, url: str) -> list[str]:
        return [posixpath.basename(path.rstrip("/")) for path in self._filesystem.ls(url, detail=False)]

    def read_json(self, url: str) -> dict[str, Any]:
        return _parse_object(self._filesystem.cat_file(url), url)


def _parse_object(text: bytes, path: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: is not JSON: {error}. Write the data set anew.") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: is no JSON object. Write the data set anew.")
    return value


def _raise(error: OSError) -> None:
    raise error
