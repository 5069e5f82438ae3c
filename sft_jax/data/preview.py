"""A packed row as a person reads it: decoded text, coloured by loss weight, segment by segment, with origins."""

import numpy as np
from rich.text import Text

from sft_jax.data.tokenizer import Tokenizer
from sft_jax.datatypes import PackedRow

SUPERVISED, PARTLY, CONTEXT = "bold green", "yellow", "dim"


def preview_row(row: PackedRow, tokenizer: Tokenizer) -> Text:
    """Green: trained on; yellow: trained on with a weight other than 1; dim: only read; then the padding, counted."""
    text = Text()
    for segment, origin in enumerate(row.origins, start=1):
        at = np.flatnonzero(row.segment_ids == segment)
        ids = np.concatenate([row.inputs[at[:1]], row.targets[at]])
        weights = np.concatenate([[0.0], row.loss_weights[at]])  # the first token is never a target
        text.append(f"[{segment}] {origin}  {len(at)} tokens, {np.count_nonzero(weights)} supervised\n", "cyan")
        starts = np.concatenate([[0], np.flatnonzero(np.diff(weights)) + 1])
        for start, span in zip(starts, np.split(ids, starts[1:]), strict=True):
            weight = weights[start]
            style = CONTEXT if weight == 0 else SUPERVISED if weight == 1 else PARTLY
            text.append(tokenizer.decode(span.tolist(), continuation=bool(start)), style)
        text.append("\n")
    padding = int(np.count_nonzero(row.segment_ids == 0))
    return text.append(f"{padding} tokens of padding", "cyan") if padding else text
