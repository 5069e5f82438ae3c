"""Held-out loss and token accuracy of one named set."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from sft_jax.model.transformer import Params
from sft_jax.sharding import Batch
from sft_jax.training.metrics import Record, source_record

Evaluator = Callable[[Params, Params, Callable[[], None]], Record]
"""The last argument is called before each batch, and may raise."""


def make_held_out_loss(
    name: str, eval_step: Callable[[Params, Params, Batch], Any], batches: Callable[[], Iterable[Batch]]
) -> Evaluator:
    """`(params, frozen, check) -> {"eval/<name>/loss", "eval/<name>/accuracy"}`, over every token of the set once.

    Args:
      batches: called at each evaluation; yields the whole set, its last batch filled with padding rows.
    """

    def evaluate(params: Params, frozen: Params, check: Callable[[], None]) -> Record:
        sums = []
        for batch in batches():
            check()
            sums.append(eval_step(params, frozen, batch))
        total = jax.tree.map(lambda *parts: np.sum(parts, axis=0, dtype=np.float64), *jax.device_get(sums))
        record = source_record(total, "", [name])
        return {f"eval/{name}/loss": record["nll"], f"eval/{name}/accuracy": record["accuracy"]}

    return evaluate


def evaluate_all(evaluators: Sequence[Evaluator], params: Params, frozen: Params, check: Callable[[], None]) -> Record:
    record: Record = {}
    for evaluate in evaluators:
        record |= evaluate(params, frozen, check)
    return record
