"""Ids and loss weights as a person reads them: decoded text, coloured by weight, with origins."""

import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from rich.text import Text

from sft_jax.data.tokenizer import Tokenizer
from sft_jax.datatypes import Origin, PackedRow, TokenizedExample

SUPERVISED, PARTLY, CONTEXT = "bold green", "yellow", "dim"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for a part of a character
_MOST_PARTS = 8  # tokens of one character


class Segment(NamedTuple):
    """One example of a packed row, unshifted: `ids` and `weights` have equal length, and `weights[0]` is 0."""

    origin: Origin
    source_id: int
    ids: np.ndarray  # int32 [n + 1]
    weights: np.ndarray  # float32 [n + 1]


class Glyphs(NamedTuple):
    """The fewest tokens that make whole characters: ids [start, stop) of a segment, and their text."""

    start: int
    stop: int
    text: str


def segments_of(row: PackedRow) -> Iterator[Segment]:
    """The examples of a row, in order."""
    for number, origin in enumerate(row.origins, start=1):
        at = np.flatnonzero(row.segment_ids == number)
        example = TokenizedExample(row.inputs[at], row.targets[at], row.loss_weights[at], origin)
        yield Segment(origin, int(row.source_ids[at[0]]), example.ids, weights_of(example))


def weights_of(example: TokenizedExample) -> np.ndarray:
    """The weight of each of `example.ids`; that of the first, which nothing predicts, is 0. float32 [n + 1]."""
    return np.concatenate([np.zeros(1, np.float32), example.loss_weights])


def runs_of(weights: np.ndarray) -> Iterator[tuple[int, int]]:
    """The stretches [start, stop) of equal weight: of 0 0 1 1 1 0 they are (0, 2), (2, 5), (5, 6)."""
    borders = [0, *(np.flatnonzero(np.diff(weights)) + 1).tolist(), len(weights)]
    return itertools.pairwise(borders)


def preview_row(row: PackedRow, tokenizer: Tokenizer) -> Text:
    """Its segments one after another, each as `preview_tokens` has it; then the padding, counted."""
    text = Text()
    for number, segment in enumerate(segments_of(row), start=1):
        text.append(f"[{number}] ", "cyan")
        text.append(preview_tokens(segment.ids, segment.weights, segment.origin, tokenizer)).append("\n")
    padding = int(np.count_nonzero(row.segment_ids == 0))
    return text.append(f"{padding} tokens of padding", "cyan") if padding else text


def preview_tokens(ids: np.ndarray, weights: np.ndarray, origin: Origin, tokenizer: Tokenizer) -> Text:
    """Green: trained on; yellow: trained on with a weight other than 1; dim: only read."""
    head = f"{origin}  {len(ids) - 1} tokens, {np.count_nonzero(weights)} supervised\n"
    text = Text().append(head, "cyan")
    for start, stop in runs_of(weights):
        style = CONTEXT if weights[start] == 0 else SUPERVISED if weights[start] == 1 else PARTLY
        text.append(show_controls(_decode(ids, start, stop, tokenizer)), style)
    return text


# A terminal obeys the first, and shows what stands behind the second in another order.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def show_controls(text: str) -> str:
    """Text for a terminal: control characters but newline and tab are spelt, as in `\\x1b`."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def glyphs_of(ids: np.ndarray, start: int, stop: int, tokenizer: Tokenizer) -> Iterator[Glyphs]:
    """Tokens [start, stop) of an example, each with its text; those that share a character come together."""
    while start < stop:
        for end in range(start + 1, min(start + _MOST_PARTS, stop) + 1):
            text = _decode(ids, start, end, tokenizer)
            if not text.endswith(_REPLACEMENT):
                break
        else:  # bytes that are no character, or the replacement character itself
            end = start + 1
            text = _decode(ids, start, end, tokenizer)
        yield Glyphs(start, end, text)
        start = end


def _decode(ids: np.ndarray, start: int, stop: int, tokenizer: Tokenizer) -> str:
    """The text of ids[start:stop], which go on from those before them."""
    continues = start > 0 and int(ids[start - 1]) not in tokenizer.restarting
    return tokenizer.decode(ids[start:stop].tolist(), continuation=continues)
