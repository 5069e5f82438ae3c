"""A path or URL in, its bytes out: as they are stored, or decompressed, a block at a time.

No block is larger than 32 MiB whatever a compressed file expands to, and a compressed file that is cut off or damaged
raises: what came before the damage must not pass for the whole.
"""

import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import zstandard

from sft_jax.datatypes import DataError, SftError

_BLOCK_BYTES = 256 * 1024
# A zstd block of 4 bytes stands for up to 128 KiB, and the library has no limit on what it gives back.
_ZSTD_SLICE_BYTES = 512
_ZSTD_MAX_WINDOW_BYTES = 2**27
"""What the zstd program allows without --long."""

# How files begin that are none of what their name says; the first bytes that fit win. UTF-32 starts as UTF-16 does.
_FOREIGN_STARTS: tuple[tuple[bytes, str, str], ...] = (
    (b"\xff\xfe\x00\x00", "UTF-32", "Convert it: iconv -f UTF-32 -t UTF-8"),
    (b"\x00\x00\xfe\xff", "UTF-32", "Convert it: iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xfe", "UTF-16", "Convert it: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16", "Convert it: iconv -f UTF-16 -t UTF-8"),
    (b"\x1f\x8b", "compressed with gzip", "Add .gz to its name"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "Add .zst to its name"),
    (b"BZh", "compressed with bzip2", "Decompress it, or compress it with gzip or zstd"),
    (b"\xfd7zXZ\x00", "compressed with xz", "Decompress it, or compress it with gzip or zstd"),
    (b"PK\x03\x04", "a zip archive", "Unpack it"),
    (b"PAR1", "Parquet", "Let its name end in .parquet"),
    (b"ARROW1", "Arrow", "Let its name end in .arrow"),
    *(
        start
        for bracket in (b"{", b"[")
        for start in (
            (bracket + b"\0\0\0", "UTF-32", "Convert it: iconv -f UTF-32LE -t UTF-8"),
            (b"\0\0\0" + bracket, "UTF-32", "Convert it: iconv -f UTF-32BE -t UTF-8"),
            (bracket + b"\0", "UTF-16", "Convert it: iconv -f UTF-16LE -t UTF-8"),
            (b"\0" + bracket, "UTF-16", "Convert it: iconv -f UTF-16BE -t UTF-8"),
        )
    ),
)


def is_url(path: str) -> bool:
    return "://" in path


def open_filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it.

    Raises:
      ImportError, ValueError: the protocol's package is not installed, or there is no such protocol.
    """
    import fsspec  # 60 ms, for URLs only

    return fsspec.core.url_to_fs(url)


def open_stored(path: str) -> Any:
    """The file as it is stored: binary, seekable, to be closed.

    Raises:
      DataError: it cannot be opened.
    """
    with readable(path):
        if is_url(path):
            filesystem, inner = open_filesystem(path)
            return filesystem.open(inner, "rb")
        return open(path, "rb")


def read_stored(file: Any, path: str, on_bytes: Callable[[bytes], object] | None = None) -> Iterator[bytes]:
    """The rest of a file in blocks, each of which `on_bytes` is given first.

    Raises:
      DataError: it cannot be read.
    """
    while True:
        with readable(path):
            block = file.read(_BLOCK_BYTES)
        if not block:
            return
        if on_bytes is not None:
            on_bytes(block)
        yield block


@contextmanager
def readable(path: str, kind: type[SftError] = DataError) -> Iterator[None]:
    """Errors of one operation on a file, as an error of `kind` that a user can mend."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error) or type(error).__name__
        raise kind(f"{path}: cannot be read: {why}. Check the path and its permissions.") from error
    except Exception as error:
        if not is_url(path):
            raise
        # Each store's client has its own errors, for credentials and timeouts above all.
        raise kind(f"{path}: cannot be read: {error!r}. Check the URL and your access to it.") from error


def hash_file(path: str) -> str:
    """sha256 of the content as stored, hex.

    Raises:
      DataError: the file cannot be opened or read.
    """
    digest = hashlib.sha256()
    with open_stored(path) as file:
        for block in read_stored(file, path):
            digest.update(block)
    return digest.hexdigest()


def read_text(path: str, on_bytes: Callable[[bytes], object] | None = None) -> Iterator[bytes]:
    """The content of a text file in blocks, decompressed where the name ends in .gz or .zst.

    Args:
      on_bytes: is given the bytes as they are stored.

    Raises:
      DataError: the file cannot be read, is cut off or damaged, or is no text of the kind that its name says.
    """
    with open_stored(path) as file:
        blocks = read_stored(file, path, on_bytes)
        ending = os.path.splitext(path.lower())[1]
        if ending == ".gz":
            blocks = _decompress_gzip(blocks, path)
        elif ending == ".zst":
            blocks = _decompress_zstd(blocks, path)
        yield from _check_start(blocks, path)


def _decompress_gzip(blocks: Iterable[bytes], path: str) -> Iterator[bytes]:
    """Of every member in the file; zeros after a member are padding, as gzip itself takes them."""
    stream = zlib.decompressobj(wbits=31)
    for block in blocks:
        while block:
            if stream.eof:
                block = block.lstrip(b"\0")
                if not block:
                    break
                stream = zlib.decompressobj(wbits=31)
            try:
                text = stream.decompress(block, _BLOCK_BYTES)
            except zlib.error as error:
                _refuse_damaged(path, "gzip", error)
            if text:
                yield text
            block = stream.unused_data if stream.eof else stream.unconsumed_tail
    if not stream.eof:
        _refuse_cut_off(path, "gzip")


def _decompress_zstd(blocks: Iterable[bytes], path: str) -> Iterator[bytes]:
    """Of every frame in the file."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW_BYTES)
    stream, is_whole = decompressor.decompressobj(), False
    texts, num_bytes = [], 0
    for block in blocks:
        for start in range(0, len(block), _ZSTD_SLICE_BYTES):
            piece = block[start : start + _ZSTD_SLICE_BYTES]
            while piece:
                if stream.eof:
                    stream = decompressor.decompressobj()
                try:
                    text = stream.decompress(piece)
                except zstandard.ZstdError as error:
                    _refuse_damaged(path, "zstd", error)
                is_whole = stream.eof
                texts.append(text)
                num_bytes += len(text)
                piece = stream.unused_data if is_whole else b""
            if num_bytes >= _BLOCK_BYTES:
                yield b"".join(texts)
                texts, num_bytes = [], 0
    yield b"".join(texts)
    if not is_whole:
        _refuse_cut_off(path, "zstd")


def _refuse_damaged(path: str, kind: str, error: Exception) -> NoReturn:
    raise DataError(f"{path}: is not whole {kind} data: {error}. Fetch or compress the file anew.") from error


def _refuse_cut_off(path: str, kind: str) -> NoReturn:
    raise DataError(f"{path}: is cut off: its {kind} data has no end. Fetch or compress the file anew.")


def _check_start(blocks: Iterable[bytes], path: str) -> Iterator[bytes]:
    is_first = True
    for block in blocks:
        if is_first and block:
            is_first = False
            for start, kind, mending in _FOREIGN_STARTS:
                if block.startswith(start):
                    raise DataError(f"{path}:1: the file is {kind}; expected text in UTF-8. {mending}.")
        yield block
