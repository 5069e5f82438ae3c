"""Chunks of a source in, the examples of their rows and an account of them out: what each process does.

Rows do not depend on each other, so parts may be made anywhere and in any order.
"""

import gc
import hashlib
import json
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sft_jax.config_schema import DataConfig, SourceConfig
from sft_jax.data.conversations import check_detected, ignored_fields, parse_row
from sft_jax.data.errors import RowError
from sft_jax.data.part_files import Part, Span, write_part
from sft_jax.data.rendering import Renderer
from sft_jax.data.report import Account, LostRows
from sft_jax.data.sources import BadRow
from sft_jax.data.too_long import FitResult, OverLongError, fit_examples
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
                "config.data.tokenizer or chat_template: changed while the data were prepared. Leave their files as "
                "they are, and start again."
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
    collects = gc.isenabled()
    gc.disable()  # a part leaves few cycles behind, and looking for them takes a twentieth of the time
    try:
        _make_part(task, source, data, renderer)
    finally:
        if collects:
            gc.enable()


def _make_part(task: Task, source: SourceConfig, data: DataConfig, renderer: Renderer) -> None:
    account, examples = Account(), _Examples()
    kept: Counter[str] = Counter()
    dropped = {reason for reason, policy in data.policies.items() if policy == "drop"}
    dropped |= {"too_long"} if data.too_long != "error" else set()
    dropped |= {"unknown_token"} if data.unknown_tokens == "drop" else set()
    for chunk in task.chunks:
        for number, row in enumerate(pickle.loads(chunk.pickled).rows()):
            account.rows_read += 1
            if (chunk.num_taken is not None and number >= chunk.num_taken) or not is_on_side(row, source):
                account.rows_not_taken += 1
                continue
            kept.clear()
            try:
                fit = _tokenize_row(row, chunk.format, source, data, renderer, kept)
            except RowError as error:
                if isinstance(error, OverLongError):
                    account.add_lost(error.lost)
                reasons = account.dropped if error.reason in dropped else account.bad
                reasons.setdefault(error.reason, LostRows()).add(error)
                continue
            ignored = ignored_fields(row, chunk.format, source.fields)
            account.add_trained(fit, kept, ignored)
            examples.append(fit.examples, chunk.file)
    renderer.refuse_clock()
    write_part(task.path, Part(task.span, task.files, account, examples.arrays()))


def _tokenize_row(
    row: RawRow | BadRow, format: str, source: SourceConfig, data: DataConfig, renderer: Renderer, kept: Counter[str]
) -> FitResult:
    """Raises RowError: why the row cannot be trained on. `kept` counts the turns that a policy let pass."""
    if isinstance(row, BadRow):
        raise RowError(row.reason, row.origin, row.message)
    if source.format == "auto" and format != "auto":
        check_detected(row, format, source.fields)
    parsed = parse_row(row, format, data.role_map, source.fields, data.kept_reasons, kept)
    return fit_examples(
        parsed, renderer, data.max_seq_len, data.too_long, supervise=data.supervise, averaging=data.averaging
    )


def is_on_side(row: RawRow | BadRow, source: SourceConfig) -> bool:
    """Whether a row is on the source's side of its split: by a hash of the row's own JSON with sorted keys, so that the
    same row is always on the same side. A row that cannot be read is on both."""
    if source.split == "all" or isinstance(row, BadRow):
        return True
    text = json.dumps(row.fields, sort_keys=True, separators=(",", ":"), default=str)
    drawn = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
    return (drawn < source.held_out_fraction) == (source.split == "held_out")


def hash_examples(ids: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """64 bits of each example, uint64 [num_examples], the same for the same ids on every machine: the sum of
    (id + 1) * w[position], over words w that are drawn once."""
    words = np.random.Philox(key=0).random_raw(int(sizes.max(initial=0)))
    ends = np.cumsum(sizes).tolist()
    plus_one = (ids + 1).astype(np.uint64)
    sums = (plus_one[end - size : end] @ words[:size] for end, size in zip(ends, sizes.tolist(), strict=True))
    return np.fromiter(sums, np.uint64, len(sizes))


_NO_WEIGHT = np.zeros(1, np.float32)


@dataclass
class _Examples:
    """The arrays of a part, as they grow."""

    examples: list[TokenizedExample] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def append(self, examples: Sequence[TokenizedExample], file: int) -> None:
        self.examples += examples
        self.files += [file] * len(examples)

    def arrays(self) -> dict[str, Any]:
        ids, weights = [np.empty(0, np.int32)], [_NO_WEIGHT[:0]]
        for example in self.examples:
            ids += (example.inputs, example.targets[-1:])
            weights += (_NO_WEIGHT, example.loss_weights)
        all_ids = np.concatenate(ids)
        sizes = np.array([len(example.inputs) + 1 for example in self.examples], np.int64)
        return {
            "ids": all_ids,
            "loss_weights": np.concatenate(weights),
            "sizes": sizes,
            "files": np.array(self.files, np.int32),
            "lines": np.array([example.origin.line for example in self.examples], np.int64),
            "elements": np.array([example.origin.element for example in self.examples], np.int32),
            "hashes": hash_examples(all_ids, sizes),
        }
