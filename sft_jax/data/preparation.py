"""Chunks of a source in, the examples of their rows and an account of them out: what each process does.

Rows do not depend on each other, so parts may be made anywhere and in any order.
"""

import hashlib
import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sft_jax.config_schema import DataConfig, SourceConfig
from sft_jax.data.conversations import ignored_fields, parse_row
from sft_jax.data.errors import RowError
from sft_jax.data.part_files import Part, Span, write_part
from sft_jax.data.rendering import Renderer
from sft_jax.data.report import Account, LostRows
from sft_jax.data.sources import BadRow
from sft_jax.datatypes import DataError, RawRow, TokenizedExample


@dataclass(frozen=True)
class Recipe:
    """What turns the rows of a source into examples, as it travels to another process."""

    source: SourceConfig
    data: DataConfig
    open_renderer: Callable[[], Renderer]
    renderer_fingerprint: str

    def open(self) -> Renderer:
        """
        Raises:
          DataError: the renderer is not the one that the store is named after.
        """
        renderer = self.open_renderer()
        if renderer.fingerprint() != self.renderer_fingerprint:
            raise DataError(
                "config.data: tokenizer or chat template changed while the data were prepared. Start again."
            )
        return renderer


@dataclass(frozen=True)
class Chunk:
    """Some rows of a file: those from `num_taken` on are beyond `max_rows`."""

    pickled: bytes  # a RowChunk
    file: int  # among the source's files
    format: str  # the file's; `auto` where no row of it has one
    num_taken: int | None  # None: all


@dataclass(frozen=True)
class Task:
    """A part to make: of which chunks, and where it goes."""

    path: Path
    span: Span
    files: tuple[str, ...]
    chunks: tuple[Chunk, ...]


def make_part(task: Task, source: SourceConfig, data: DataConfig, renderer: Renderer) -> None:
    """Tokenize every row of the chunks, and write the part. Raises: OSError."""
    account, examples = Account(), _Examples()
    by_choice = {"too_long": data.too_long == "drop", "unknown_token": data.unknown_tokens == "drop"}
    for chunk in task.chunks:
        for number, row in enumerate(pickle.loads(chunk.pickled).rows()):
            account.rows_read += 1
            if (chunk.num_taken is not None and number >= chunk.num_taken) or not is_on_side(row, source):
                account.rows_not_taken += 1
                continue
            counted = renderer.counts.copy()
            try:
                if isinstance(row, BadRow):
                    raise RowError(row.reason, row.origin, row.message)
                of_row = _tokenize_row(row, chunk.format, data, renderer)
            except RowError as error:
                reasons = account.dropped if by_choice.get(error.reason) else account.bad
                reasons.setdefault(error.reason, LostRows()).add(error)
                continue
            account.add_trained(of_row, renderer.counts - counted, ignored_fields(row, chunk.format))
            examples.append(of_row, chunk.file)
    write_part(task.path, Part(task.span, task.files, account, examples.arrays()))


def _tokenize_row(row: RawRow, format: str, data: DataConfig, renderer: Renderer) -> list[TokenizedExample]:
    """A row's examples, all of them: a row of which one example is over-long is lost as a whole, and counted once.

    Raises:
      RowError: why the row cannot be trained on.
    """
    examples = renderer.render(parse_row(row, format, data.role_map))
    longest = max((len(example) for example in examples), default=0)
    if longest > data.max_seq_len:
        raise RowError(
            "too_long",
            row.origin,
            f"is {longest:,} tokens long; config.data.max_seq_len is {data.max_seq_len:,}. Raise it, shorten the row, "
            "or set config.data.too_long = 'drop'.",
        )
    if not examples or not all(example.loss_weights.any() for example in examples):
        # So every example has a supervised token, hence every row that is not padding, hence every batch.
        raise RowError("nothing_supervised", row.origin, "has no token to train on. Remove the row.")
    return examples


def is_on_side(row: RawRow | BadRow, source: SourceConfig) -> bool:
    """Whether a row is on the source's side of its split: by a hash of the row's own JSON with sorted keys, so that the
    same row is always on the same side. A row that cannot be read is on both."""
    if source.split == "all" or isinstance(row, BadRow):
        return True
    text = json.dumps(row.fields, sort_keys=True, separators=(",", ":"), default=str)
    drawn = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
    return (drawn < source.held_out_fraction) == (source.split == "held_out")


def hash_ids(ids: np.ndarray) -> int:
    """64 bits, the same for the same ids on every machine."""
    return int.from_bytes(hashlib.blake2b(ids.astype("<i4").tobytes(), digest_size=8).digest(), "little")


_NO_WEIGHT = np.zeros(1, np.float32)


@dataclass
class _Examples:
    """The arrays of a part, as they grow."""

    ids: list[np.ndarray] = field(default_factory=list)
    loss_weights: list[np.ndarray] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)

    def append(self, examples: Sequence[TokenizedExample], file: int) -> None:
        for example in examples:
            ids = example.ids
            self.ids.append(ids)
            self.loss_weights += (_NO_WEIGHT, example.loss_weights)
            self.sizes.append(len(ids))
            self.files.append(file)
            self.lines.append(example.origin.line)
            self.hashes.append(hash_ids(ids))

    def arrays(self) -> dict[str, Any]:
        return {
            "ids": np.concatenate([np.empty(0, np.int32), *self.ids]),
            "loss_weights": np.concatenate([_NO_WEIGHT[:0], *self.loss_weights]),
            "sizes": np.array(self.sizes, np.int64),
            "files": np.array(self.files, np.int32),
            "lines": np.array(self.lines, np.int64),
            "hashes": np.array(self.hashes, np.uint64),
        }
