"""A source's files in, all of its parts on disk out: cut, claimed, made here or by another run, and waited for.

    <store_dir>/<fingerprint>.parts/part-00012          made, by whomever
                                    part-00013.claim    somebody is at it: its host, process and life

Runs and hosts that share the folder each make the parts that nobody has claimed. A claim is no lock: it only keeps two
from doing the same work. A claim of a process that is gone counts for nothing, and one that comes to nothing is
overridden in the end; a part that is made twice is the same part. A preparation that was interrupted goes on with the
parts that are there.
"""

import hashlib
import itertools
import os
import pickle
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from sft_jax.config_schema import SourceConfig
from sft_jax.data.conversations import detect_format
from sft_jax.data.errors import RowError
from sft_jax.data.part_files import Span, read_part
from sft_jax.data.preparation import Chunk, Recipe, Task, make_part
from sft_jax.data.rendering import Renderer
from sft_jax.data.sources import RowChunk, read_chunks
from sft_jax.data.workers import make_parts_together
from sft_jax.datatypes import DataError, RawRow

PART_BYTES = 1 << 20
"""A part is of about so many bytes of rows: the work that an interruption can lose, and the least worth sharing."""
CHUNK_BYTES = 1 << 19
"""What is read of a file at once."""
PATIENCE_SECONDS = 60.0
"""So long nothing that was claimed appears before it is made here as well."""
_WRITING_SECONDS = 0.1
"""So long a claim may be without its owner's name."""
_ME = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}"


def make_parts(
    folder: Path, done: Path, files: Sequence[str], contents: Sequence[str], recipe: Recipe, renderer: Renderer
) -> list[Path]:
    """Until all parts are there, or `done` is: the whole store, put together by another run.

    Args:
      contents: the files' sha256, which they must still have.
      renderer: this process's, for the work that it does itself.

    Returns:
      The parts in order.

    Raises:
      DataError: a file changed while it was read; a worker process was killed.
      OSError: a part cannot be written.
    """
    made: set[Path] = set()
    everything: list[Path] = []
    claimed: list[tuple[Path, Span]] = []

    def to_do(override: bool) -> Iterator[Task]:
        everything.clear()
        claimed.clear()
        for task in _cut(folder, files, contents, recipe):
            if done.exists():
                return
            everything.append(task.path)
            if task.path not in made and not _is_made(task.path, task.span):
                if not _claim(task.path, override):
                    claimed.append((task.path, task.span))
                    continue
                yield task
            made.add(task.path)

    _make_all(to_do(override=False), recipe, renderer)
    while claimed and not done.exists():
        _make_all(to_do(override=not _appear(claimed, done)), recipe, renderer)
    return everything


def _make_all(tasks: Iterable[Task], recipe: Recipe, renderer: Renderer) -> None:
    """In this process, or in as many as the config says."""
    tasks, asked = iter(tasks), recipe.data.prepare_processes
    ahead = list(itertools.islice(tasks, 2))
    count = asked or (_num_cores() if len(ahead) == 2 else 1)
    everything = itertools.chain(ahead, tasks)
    if count == 1 or not ahead:
        for task in everything:
            make_part(task, recipe.source, recipe.data, renderer)
        return
    make_parts_together(everything, count, recipe, renderer)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- Cutting ----------------------------------------------------------------------------------------------------------


def _cut(folder: Path, files: Sequence[str], contents: Sequence[str], recipe: Recipe) -> Iterator[Task]:
    """The tasks of all parts, in order; the same for everybody."""
    chunks: list[Chunk] = []
    start, num_parts = "start", 0

    def task(end: str) -> Task:
        return Task(folder / f"part-{num_parts:05}", Span(start, end), tuple(files), tuple(chunks))

    max_rows = left = recipe.source.max_rows
    for number, (file, content) in enumerate(zip(files, contents, strict=True)):
        format, digest = _format_of(file, recipe.source), hashlib.sha256()
        for place, row_chunk in enumerate(read_chunks(file, digest.update, CHUNK_BYTES)):
            num_taken = None
            if max_rows:
                num_taken = min(left, _count_rows(row_chunk)) if left else 0
                left -= num_taken
            chunks.append(Chunk(pickle.dumps(row_chunk, 5), number, format, num_taken))
            if sum(len(chunk.pickled) for chunk in chunks) >= PART_BYTES:
                yield task(end := f"file {number}, chunk {place} of {CHUNK_BYTES} bytes, {digest.hexdigest()}")
                chunks, start, num_parts = [], end, num_parts + 1
        if digest.hexdigest() != content:
            raise DataError(f"{file}: changed while it was read. Wait until it is written, and start again.")
    if chunks:
        yield task("end")


def _format_of(file: str, source: SourceConfig) -> str:
    """That of the first row that has one."""
    if source.format == "auto":
        rows = itertools.chain.from_iterable(chunk.rows() for chunk in read_chunks(file))
        for row in (row for row in rows if isinstance(row, RawRow)):
            try:
                return detect_format(row, source.fields)
            except RowError:
                continue
    return source.format


def _count_rows(chunk: RowChunk) -> int:
    return sum(1 for _ in chunk.rows())


# --- Sharing ----------------------------------------------------------------------------------------------------------


def _is_made(path: Path, span: Span) -> bool:
    part = read_part(path)
    return part is not None and part.span == span


def _claim(path: Path, override: bool) -> bool:
    """Whether the part is ours to make."""
    claim = path.with_name(f"{path.name}.claim")
    claim.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(claim, "x") as out:
            out.write(_ME)
        return True
    except FileExistsError:
        pass
    try:
        if not override and not _is_gone(_owner_of(claim)):
            return False
        claim.write_text(_ME)
    except FileNotFoundError:  # another run has put the store together, and taken the folder away
        return False
    return True


def _owner_of(claim: Path) -> str:
    owner = claim.read_text()
    if not owner:  # its name is being written, or it was killed before that
        time.sleep(_WRITING_SECONDS)
        owner = claim.read_text()
    return owner


def _is_gone(owner: str) -> bool:
    """Whether the owner of a claim is known to be no more. One on another host is not known."""
    if owner.count(" ") != 2:
        return True
    (host, pid, life), (my_host, my_pid, my_life) = owner.split(" "), _ME.split(" ")
    if host != my_host:
        return False
    if pid == my_pid:
        return life != my_life  # of an earlier process with our number
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _appear(parts: Sequence[tuple[Path, Span]], done: Path) -> bool:
    """Wait for what others make; False when none of it has come for a while."""
    missing, since = list(parts), time.monotonic()
    while missing and not done.exists():
        left = [part for part in missing if not _is_made(*part)]
        if len(left) < len(missing):
            missing, since = left, time.monotonic()
        elif time.monotonic() - since > PATIENCE_SECONDS:
            return False
        time.sleep(0.1)
    return True
