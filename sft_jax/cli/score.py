"""`sft-jax score`: log-probabilities of given rows under a model folder."""

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from sft_jax.command_line import run_command
from sft_jax.data.conversations import parse_row
from sft_jax.data.rendering import Renderer
from sft_jax.data.sources import read_rows
from sft_jax.datatypes import ConfigError, DataError, RawRow, TokenizedExample
from sft_jax.inference.pretrained import open_pretrained
from sft_jax.inference.sampler import score_tokens


def main(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="sft-jax score",
        description="For each row, the summed -log p (nats) and the summed weight of its supervised tokens.",
        epilog="example: sft-jax score --model=runs/demo/export --input=chats.jsonl --json",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face folder")
    parser.add_argument("--input", required=True, metavar="F.jsonl", help='rows to train on, or {"ids": [...]}')
    parser.add_argument("--json", action="store_true", help="one object a row: loss_sum, weight_sum")
    parser.add_argument("--per-token", action="store_true", help="add ids, and logprobs of each given those before it")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args(args)
    if options.per_token and not options.json:
        raise ConfigError("sft-jax score: --per-token is for --json. Give both.")

    model = open_pretrained(options.model, options.dtype)
    rows = list(read_examples(options.input, model.renderer, model.config.vocab_size))
    examples = [example for row in rows for example in row]
    scores = score_tokens(model.params, model.config, [e.ids.tolist() for e in examples], compute_dtype=options.dtype)
    scored = iter(zip(examples, scores, strict=True))
    for row in rows:
        result = score_row([next(scored) for _ in row], options.per_token)
        loss, weight = result["loss_sum"], result["weight_sum"]
        print(json.dumps(result) if options.json else f"{loss / weight:.6f} nats per token over {weight:g} tokens")
    return 0


def read_examples(path: str, renderer: Renderer, vocab_size: int) -> Iterator[list[TokenizedExample]]:
    """The examples of each row: one, unless the template rewrites history."""
    for row in read_rows(path):
        if not isinstance(row, RawRow):
            raise DataError(f"{row.origin}: {row.message}")
        if "ids" in row.fields:
            ids = row.fields["ids"]
            good = isinstance(ids, list) and len(ids) > 1 and all(type(i) is int and 0 <= i < vocab_size for i in ids)
            if not good:
                raise DataError(
                    f"{row.origin}: ids is {ids!r:.80}; expected at least two ids from 0 to {vocab_size - 1}."
                )
            yield [TokenizedExample.from_ids(ids, np.ones(len(ids)), row.origin)]
        else:
            yield renderer.render(parse_row(row, "auto", {}))


def score_row(scored: list[tuple[TokenizedExample, Any]], per_token: bool) -> dict[str, Any]:
    """Sums over a row's examples. `scored` holds, for each, log p of ids[1:]."""
    weights = np.concatenate([example.loss_weights for example, _ in scored]).astype(np.float64)
    logprobs = np.concatenate([values for _, values in scored]).astype(np.float64)
    result: dict[str, Any] = {"loss_sum": -float(weights @ logprobs), "weight_sum": float(weights.sum())}
    if per_token:
        result["ids"] = [int(i) for example, _ in scored for i in example.ids]
        result["logprobs"] = [p for _, values in scored for p in [None, *(float(v) for v in values)]]
    return result


if __name__ == "__main__":
    sys.exit(run_command(main))
