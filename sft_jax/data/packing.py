"""Lengths in, the rows of an epoch out; then examples in, packed rows out. numpy only.

A plan is a pure function of (lengths, max_seq_len, seed, epoch), and every epoch has the same number of rows, so what
row number i of a run holds is known without planning the epochs before it. Five examples in rows of 8, unshuffled:

    example    0 1 2 3 4          row 0: examples 0, 3     0 0 0 3 3 3 3 3
    length     3 6 2 5 4          row 1: examples 1, 2     1 1 1 1 1 1 2 2
                                  row 2: example  4        4 4 4 4 . . . .
"""

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

PLAN_VERSION = 1
"""Raised whenever the same lengths and seed give other rows or another order: a resumed run must notice."""


@dataclass(frozen=True, slots=True)
class PackingPlan:
    """The rows of one epoch, in order: row r holds `example_ids[row_offsets[r] : row_offsets[r + 1]]`, laid out in that
    order. Every example stands in exactly one row."""

    row_offsets: np.ndarray  # int64 [num_rows + 1]
    example_ids: np.ndarray  # int32 [num_examples]; int64 from 2^31 examples on

    @property
    def num_rows(self) -> int:
        return len(self.row_offsets) - 1

    def examples_of(self, row: int) -> np.ndarray:
        return self.example_ids[self.row_offsets[row] : self.row_offsets[row + 1]]


def plan_epoch(
    lengths: np.ndarray,
    max_seq_len: int,
    seed: int | None,
    epoch: int,
    packing: str = "best_fit",
    *,
    max_segments_per_row: int = 0,
    row_order: str = "shuffled",
) -> PackingPlan:
    """Put examples of the given lengths, each from 1 to max_seq_len, into rows of max_seq_len.

    Which lengths share a row depends on the lengths alone. The seed and the epoch decide which example of a length
    takes which of its places, the order of examples within each row, and the order of rows.

    Args:
      seed: None for no shuffling: equal lengths take places in their own order, and rows come in order of their first
        example, so that with packing `none` the rows are the examples as they stand.
      packing: `best_fit`, or `none`: one example a row.
      max_segments_per_row: examples that a row may hold; 0: any number.
      row_order: `shuffled`, or `longest_first`: by falling attention cost, rows of equal cost as before.
    """
    assert lengths.min() >= 1
    assert lengths.max() <= max_seq_len
    draw = _Draw(seed, epoch)
    lengths = _narrow(lengths, max_seq_len)
    place_lengths, places_per_row = _lay_out(lengths, max_seq_len, packing, max_segments_per_row)
    row_starts = np.cumsum(places_per_row) - places_per_row

    # Examples and places meet in order of length; ties among the examples are drawn.
    by_length = draw.order(len(lengths))
    by_length = by_length[np.argsort(lengths[by_length], kind="stable")]
    example_at = np.empty_like(by_length)
    example_at[np.argsort(place_lengths, kind="stable")] = by_length
    del by_length  # at ten million examples, each array counts

    if seed is None:
        rows, within_row = np.argsort(np.minimum.reduceat(example_at, row_starts)), np.argsort(example_at)
    else:
        rows, within_row = draw.order(len(places_per_row)), draw.order(len(lengths))
    if row_order == "longest_first":
        costs = _sum_squares(place_lengths, row_starts)
        rows = rows[np.argsort(-costs[rows], kind="stable")]
    rank = np.empty(len(rows), example_at.dtype)
    rank[rows] = np.arange(len(rows), dtype=rank.dtype)
    rank = np.repeat(rank, places_per_row)[within_row]
    places = within_row[np.argsort(rank, kind="stable")]
    row_offsets = np.concatenate([[0], np.cumsum(places_per_row[rows])])
    return PackingPlan(row_offsets, example_at[places])


def attention_costs(plan: PackingPlan, lengths: np.ndarray) -> np.ndarray:
    """The sum of length^2 over each row's examples, int64 [num_rows]: what attention within segments costs."""
    return _sum_squares(lengths[plan.example_ids], plan.row_offsets[:-1])


def _sum_squares(lengths: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sums over the runs that begin at `starts`, none of them empty."""
    squares = lengths.astype(np.int64)
    squares *= squares
    return np.add.reduceat(squares, starts)


def _narrow(values: np.ndarray, largest: int) -> np.ndarray:
    """As uint16 where that holds them: a quarter of the memory, and numpy sorts it by radix."""
    return values.astype(np.uint16) if largest <= np.iinfo(np.uint16).max else values


def balanced_order(costs: np.ndarray) -> np.ndarray:
    """The order in which to lay the rows of a batch, so that its contiguous parts cost about the same, be they 2, 4, 8
    or more: no host count enters.

    From the costliest on, rows are dealt to the halves of the batch as A B B A A B B A ..., and so within each half.
    For 8 rows of cost 8, 7, ..., 1:

        position    0 1 2 3 4 5 6 7
        cost        8 1 5 4 7 2 6 3      halves 18 + 18, quarters 9 + 9 + 9 + 9
    """
    return np.argsort(-costs, kind="stable")[_deal_ranks(len(costs))]


@functools.cache
def _deal_ranks(num_rows: int) -> np.ndarray:
    """The rank by cost of the row at each position of a batch."""

    def deal(ranks: np.ndarray) -> np.ndarray:
        if len(ranks) <= 2:
            return ranks
        first = np.isin(np.arange(len(ranks)) % 4, (0, 3))
        return np.concatenate([deal(ranks[first]), deal(ranks[~first])])

    return deal(np.arange(num_rows))


class PackedArrays(NamedTuple):
    """Rows as `PackedRow` shows them, one below the other."""

    inputs: np.ndarray  # int32 [b, L]
    targets: np.ndarray  # int32 [b, L]
    loss_weights: np.ndarray  # float32 [b, L]
    segment_ids: np.ndarray  # int32 [b, L]
    positions: np.ndarray  # int32 [b, L]
    source_ids: np.ndarray  # int32 [b, L]


def assemble_rows(
    examples: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    source_ids: np.ndarray,
    examples_per_row: Sequence[int],
    max_seq_len: int,
) -> PackedArrays:
    """Lay examples one after another, the first so many into the first row, and so on. A row of none is padding.

    Args:
      examples: (inputs, targets, loss_weights) of each.
      source_ids: the index of each example's source, int [num_examples].
    """
    num_rows = len(examples_per_row)
    integers = np.zeros((5, num_rows, max_seq_len), np.int32)
    loss_weights = np.zeros((num_rows, max_seq_len), np.float32)
    if examples:
        # All examples are laid out at once: numpy takes longer to begin than to copy one of them.
        lengths = np.fromiter((len(inputs) for inputs, _, _ in examples), np.int64, len(examples))
        ends = np.concatenate([[0], lengths.cumsum()])
        first, last = np.cumsum(examples_per_row) - examples_per_row, np.cumsum(examples_per_row)
        inputs, targets, weights = (np.concatenate(arrays) for arrays in zip(*examples, strict=True))
        segments = np.arange(1, len(examples) + 1) - first.repeat(examples_per_row)
        flat = np.empty((5, ends[-1]), np.int32)
        flat[0], flat[1] = inputs, targets
        flat[2] = segments.repeat(lengths)
        flat[3] = np.arange(ends[-1])
        flat[3] -= ends[:-1].astype(np.int32).repeat(lengths)
        flat[4] = source_ids.repeat(lengths)
        for row, (start, end) in enumerate(zip(ends[first].tolist(), ends[last].tolist(), strict=True)):
            assert end - start <= max_seq_len
            integers[:, row, : end - start] = flat[:, start:end]
            loss_weights[row, : end - start] = weights[start:end]
    inputs, targets, segment_ids, positions, sources = integers
    return PackedArrays(inputs, targets, loss_weights, segment_ids, positions, sources)


class _Draw:
    """Permutations from (seed, epoch), by sorting raw Philox words: numpy promises that those never change, and
    promises no such thing of `Generator.permutation`."""

    def __init__(self, seed: int | None, epoch: int):
        self._words = None if seed is None else np.random.Philox(key=np.array([seed, epoch], np.uint64))

    def order(self, count: int) -> np.ndarray:
        """The next permutation of range(count), int32 where that holds it; the identity where there is no seed."""
        dtype = np.int32 if count <= np.iinfo(np.int32).max else np.int64
        if self._words is None:
            return np.arange(count, dtype=dtype)
        return np.argsort(self._words.random_raw(count), kind="stable").astype(dtype)


# --- Best fit decreasing, by counting --------------------------------------------------------------------------------


class _Content(NamedTuple):
    """What rows of one kind hold: `copies` examples of `length`, and what was laid before them."""

    before: "_Content | None"
    length: int
    copies: int
    num_segments: int  # in all


_NOTHING = _Content(None, 0, 0, 0)


def _lay_out(
    lengths: np.ndarray, max_seq_len: int, packing: str, max_segments_per_row: int
) -> tuple[np.ndarray, np.ndarray]:
    """The places of all rows, one row after another: (length of each place [N], places of each row [num_rows])."""
    if packing == "none":
        return lengths, np.ones(len(lengths), np.int64)
    max_segments = max_segments_per_row or max_seq_len  # of one token at least
    place_lengths, places_per_row = [], []
    for content, num_rows in _fit_lengths(np.bincount(lengths), max_seq_len, max_segments):
        row: list[int] = []
        part: _Content | None = content
        while part is not None:
            row += [part.length] * part.copies
            part = part.before
        place_lengths.append(np.tile(np.array(row, lengths.dtype), num_rows))
        places_per_row.append(np.full(num_rows, len(row)))
    return np.concatenate(place_lengths), np.concatenate(places_per_row)


def _fit_lengths(histogram: np.ndarray, max_seq_len: int, max_segments: int) -> list[tuple[_Content, int]]:
    """Best fit decreasing: from the longest example to the shortest, each into the row with the least space that still
    holds it, or else into a new one. Of rows with equal space, one with the fewest segments is taken; a row that has
    `max_segments` takes no more.

    Equal lengths are placed together. The row that took one has less space than before, so it is the best fit for the
    next while it holds one: each row of a kind takes as many as it can before the next row takes any. A step therefore
    fills all rows of a kind, or uses up the length; the number of steps follows from the lengths that occur, not from
    the number of examples.

    Args:
      histogram: the number of examples of each length, from 0.

    Returns:
      (content, number of rows that hold it) for each kind of row.
    """
    kinds: dict[tuple[int, int], list[tuple[_Content, int]]] = {}  # (space left, segments) -> the kinds that have both
    keys: list[tuple[int, int]] = []  # of `kinds`, ascending
    full: list[tuple[_Content, int]] = []
    limited = max_segments < max_seq_len  # if not, the segments of a row do not matter

    def add(space: int, content: _Content, num_rows: int) -> None:
        if num_rows and limited and content.num_segments == max_segments:
            full.append((content, num_rows))
        elif num_rows:
            key = (space, content.num_segments if limited else 0)
            if key not in kinds:
                bisect.insort(keys, key)
                kinds[key] = []
            kinds[key].append((content, num_rows))

    for length in np.flatnonzero(histogram)[::-1].tolist():
        left = int(histogram[length])
        while left:
            at = bisect.bisect_left(keys, (length, 0))
            if at < len(keys):
                space, _ = key = keys[at]
                content, num_rows = kinds[key].pop()
                if not kinds[key]:
                    del kinds[key], keys[at]
            else:  # new rows, enough for all that is left
                space, content = max_seq_len, _NOTHING
                num_rows = -(-left // min(max_seq_len // length, max_segments))
            per_row = min(space // length, max_segments - content.num_segments)
            whole = min(num_rows, left // per_row)
            part = 0 if whole == num_rows else left - whole * per_row  # what the next row takes: less than it could
            for copies, count in ((per_row, whole), (part, int(part > 0))):
                grown = _Content(content, length, copies, content.num_segments + copies)
                add(space - copies * length, grown, count)
            add(space, content, num_rows - whole - bool(part))
            left -= whole * per_row + part
    return [kind for same in kinds.values() for kind in same] + full
