"""A part of a store that is being made: one file, there whole or not at all.

    part-00012     the length of the header, uint64
                   the header, JSON: which bytes of the source the part is of, its account, the sizes of its arrays
                   the arrays of ARRAYS, one after another
                   crc32 of all that, uint32

A part follows from its span of the source and from what the folder's name says, so whoever finds it may use it, and two
processes that write the same one do no harm.
"""

import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from sft_jax.data.report import Account

ARRAYS: dict[str, np.dtype[Any]] = {
    "ids": np.dtype(np.int32),  # every example's, unshifted, one example after another
    "loss_weights": np.dtype(np.float32),  # of each id as a target; 0 for the first of an example
    "sizes": np.dtype(np.int64),  # the number of ids of each example
    "files": np.dtype(np.int32),  # the file that each example came from, by its place among the source's files
    "lines": np.dtype(np.int64),  # and the line,
    "elements": np.dtype(np.int32),  # and the element, where the file is one JSON array
    "hashes": np.dtype(np.uint64),  # of each example's ids
}
_LENGTH, _CHECKSUM = struct.Struct("<Q"), struct.Struct("<I")


@dataclass(frozen=True)
class Span:
    """Where in the source a part begins and ends: the file, the chunk of it, and a digest of what was read by then, by
    which a part of other content, or one that was cut otherwise, is known."""

    start: str
    end: str


@dataclass(frozen=True)
class _Header:
    span: Span
    files: tuple[str, ...]
    account: Account
    sizes: dict[str, int]


@dataclass(frozen=True)
class Part:
    """`files` are the source's, by the names that the account's origins have."""

    span: Span
    files: tuple[str, ...]
    account: Account
    arrays: dict[str, np.ndarray]


def write_part(path: Path, part: Part) -> None:
    """Written beside its place, then renamed; a part that a power failure tears is known by its checksum. Raises:
    OSError."""
    header = _Header(part.span, part.files, part.account, {name: len(part.arrays[name]) for name in ARRAYS})
    encoded = msgspec.json.encode(header)
    pieces: list[bytes | memoryview] = [_LENGTH.pack(len(encoded)), encoded]
    pieces += [np.ascontiguousarray(part.arrays[name], dtype).data.cast("B") for name, dtype in ARRAYS.items()]
    checksum = 0
    for piece in pieces:
        checksum = zlib.crc32(piece, checksum)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.urandom(6).hex()}.tmp")
    with open(temporary, "wb") as out:
        out.writelines([*pieces, _CHECKSUM.pack(checksum)])
    os.rename(temporary, path)


def read_part(path: Path) -> Part | None:
    """None where there is none, or where it is damaged."""
    try:
        content = memoryview(path.read_bytes())
    except FileNotFoundError:
        return None
    body = content[: -_CHECKSUM.size]
    if len(content) < _LENGTH.size + _CHECKSUM.size or zlib.crc32(body) != _CHECKSUM.unpack(content[len(body) :])[0]:
        return None
    at = _LENGTH.size + _LENGTH.unpack_from(body)[0]
    header = msgspec.json.decode(body[_LENGTH.size : at], type=_Header)
    arrays = {}
    for name, dtype in ARRAYS.items():
        arrays[name] = np.frombuffer(body, dtype, header.sizes[name], at)
        at += arrays[name].nbytes
    return Part(header.span, header.files, header.account, arrays)
