"""`sft-jax render`: what a tokenizer and a template make of each row, with no config, model or packing."""

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

from sft_jax.command_line import run_command
from sft_jax.config import from_config_dict
from sft_jax.config_schema import DataConfig
from sft_jax.data.conversations import check_detected, detect_format, parse_row
from sft_jax.data.errors import RowError
from sft_jax.data.preview import preview_tokens, weights_of
from sft_jax.data.rendering import Renderer, open_renderer
from sft_jax.data.sources import BadRow, read_rows, resolve_files
from sft_jax.data.tokenizer import Tokenizer
from sft_jax.datatypes import ConfigError, DataError, TokenizedExample


def main(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="sft-jax render",
        description="Render and tokenize each row: green is trained on, dim is only read. Exit status 3 if a row is "
        "refused, after all of them.",
        epilog="example: sft-jax render --tokenizer=models/base --template=chatml --input=chats.jsonl",
        allow_abbrev=False,
    )
    parser.add_argument("--tokenizer", required=True, metavar="PATH", help="as config.data.tokenizer: folder or file")
    parser.add_argument("--input", required=True, metavar="FILE", help="rows to train on")
    parser.add_argument("--format", default="auto", help="as a source's format (default auto: that of the first row)")
    parser.add_argument("--fields", default="{}", metavar="JSON", help="as a source's fields: our name -> the row's")
    parser.add_argument(
        "--role-map", default="{}", metavar="JSON", help="as config.data.role_map: the row's role -> ours"
    )
    parser.add_argument("--template", default="", metavar="NAME|FILE", help="as config.data.chat_template")
    parser.add_argument("--template-kwargs", default="{}", metavar="JSON", help="as config.data.chat_template_kwargs")
    parser.add_argument("--new-tokens", default="", metavar="A,B", help="as config.data.new_tokens")
    parser.add_argument("--stop-token", default="", metavar="T", help="as config.data.stop_token")
    parser.add_argument("--json", action="store_true", help="one object a row: origin, ids, loss_weights, text")
    options = parser.parse_args(args)
    data = data_config(options)
    renderer = open_renderer(data, options.tokenizer)
    tokenizer = renderer.tokenizer

    console, num_rows, num_refused = Console(), 0, 0
    for result in render_rows(data, renderer):
        num_rows += 1
        num_refused += isinstance(result, RowError)
        if options.json:
            print(json.dumps(result_to_json(result, tokenizer)))
        else:
            console.print(result_to_text(result, tokenizer), soft_wrap=True)
    if not num_rows:
        raise DataError(f"--input: {options.input} has no rows. Name a file with at least one.")
    return DataError.exit_code if num_refused else 0


def data_config(options: argparse.Namespace) -> DataConfig:
    """The options through the door that a config's fields come through, so that they are checked alike."""
    kwargs, fields, role_map = (read_json(options, name) for name in ("template_kwargs", "fields", "role_map"))
    data = {
        "train": [{"path": options.input, "format": options.format, "fields": fields}],
        "role_map": role_map,
        "tokenizer": options.tokenizer,
        "chat_template": options.template,
        "chat_template_kwargs": kwargs,
        "new_tokens": [token for token in options.new_tokens.split(",") if token],
        "stop_token": options.stop_token,
    }
    return from_config_dict({"data": data, "model": {"path": options.tokenizer}}).data


def read_json(options: argparse.Namespace, name: str) -> Any:
    text = getattr(options, name)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        option = "--" + name.replace("_", "-")
        raise ConfigError(f'{option}: {text} is not JSON: {error}. Write {{"name": value}}.') from error


def render_rows(data: DataConfig, renderer: Renderer) -> Iterator[list[TokenizedExample] | RowError]:
    """The examples of each row, or why it has none. The format that a file's first row shows is its every row's.

    Raises:
      ConfigError: the template writes today's date, as a run would refuse it.
    """
    source = data.train[0]
    renderer.refuse_clock()
    for file in resolve_files(source.path, "--input"):
        format = source.format
        for row in read_rows(file):
            try:
                if isinstance(row, BadRow):
                    raise RowError(row.reason, row.origin, row.message)
                if format == "auto":
                    format = detect_format(row, source.fields)
                elif source.format == "auto":
                    check_detected(row, format, source.fields)
                examples = renderer.render(parse_row(row, format, data.role_map, source.fields))
                renderer.refuse_clock()  # some templates ask for the date in some conversations only
                if not all(example.loss_weights.any() for example in examples):  # as a run would refuse it
                    raise RowError("nothing_supervised", row.origin, "has no token to train on. Remove the row.")
                yield examples
            except RowError as error:
                yield error


def result_to_json(result: list[TokenizedExample] | RowError, tokenizer: Tokenizer) -> dict[str, Any]:
    """The fields of a row's one example; where it became several, a list of them as `examples`."""
    if isinstance(result, RowError):
        origin = str(result.origin)
        return {"origin": origin, "refused": result.reason, "message": str(result).removeprefix(f"{origin}: ")}
    examples = [
        {
            "ids": example.ids.tolist(),
            "loss_weights": weights_of(example).tolist(),
            "text": tokenizer.decode(example.ids.tolist()),
        }
        for example in result
    ]
    return {"origin": str(result[0].origin), **(examples[0] if len(examples) == 1 else {"examples": examples})}


def result_to_text(result: list[TokenizedExample] | RowError, tokenizer: Tokenizer) -> Text:
    if isinstance(result, RowError):
        return Text(f"{result.origin}  refused: {result.reason}: {result_to_json(result, tokenizer)['message']}", "red")
    texts = [preview_tokens(example.ids, weights_of(example), example.origin, tokenizer) for example in result]
    return Text("\n").join(texts)


if __name__ == "__main__":
    sys.exit(run_command(main))
