"""`sft-jax generate`: answers from a model folder, in its own chat template."""

import argparse
import json
import sys
from collections.abc import Iterator

from sft_jax.command_line import run_command
from sft_jax.data.conversations import parse_prompt
from sft_jax.data.sources import read_rows
from sft_jax.datatypes import ConfigError, Conversation, DataError, Message, Origin, RawRow
from sft_jax.inference.pretrained import open_pretrained
from sft_jax.inference.sampler import generate


def main(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="sft-jax generate",
        description="Answer prompts by decoding with a KV cache; an answer ends at the template's stop token.",
        epilog="example: sft-jax generate --model=runs/demo/export --prompt='Who are you?'",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face folder with a chat template")
    parser.add_argument("--prompt", metavar="TEXT", help="one user message")
    parser.add_argument("--input", metavar="F.jsonl", help='rows of {"messages": [...]} or {"prompt": TEXT}')
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample from this share of probability")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--json", action="store_true", help="one object an answer: text, stopped, ids")
    options = parser.parse_args(args)
    if (options.prompt is None) == (options.input is None):
        raise ConfigError("sft-jax generate: give either --prompt or --input.")
    if options.input:
        conversations = list(read_prompts(options.input))
    else:
        conversations = [ask(options.prompt, Origin("--prompt", 1))]

    model = open_pretrained(options.model, options.dtype)
    answers = generate(
        model.params,
        model.config,
        [model.renderer.prompt_ids(asked.messages, asked.tools) for asked in conversations],
        stop_ids=model.renderer.stop_ids,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        compute_dtype=options.dtype,
    )
    for answer in answers:
        text = model.renderer.tokenizer.decode(answer.ids, continuation=True)
        print(json.dumps({"text": text, "stopped": answer.stopped, "ids": list(answer.ids)}) if options.json else text)
    return 0


def ask(prompt: str, origin: Origin) -> Conversation:
    return Conversation((Message("user", prompt),), origin)


def read_prompts(path: str) -> Iterator[Conversation]:
    """The messages before the answer, of each row, and its tools."""
    for row in read_rows(path):
        if not isinstance(row, RawRow):
            raise DataError(f"{row.origin}: {row.message}")
        if isinstance(row.fields.get("prompt"), str):
            yield ask(row.fields["prompt"], row.origin)
        else:
            yield parse_prompt(row)


if __name__ == "__main__":
    sys.exit(run_command(main))
