"""`sft-jax show`: packed rows exactly as the step receives them, in the terminal, as JSON or as a page."""

import json
import sys
from pathlib import Path

from rich.console import Console

from sft_jax.command_line import config_parser, read_config, run_command
from sft_jax.data.preview import preview_row
from sft_jax.data.preview_html import preview_page
from sft_jax.datatypes import ConfigError, PackedRow, StorageError
from sft_jax.experiment import open_renderer, open_train_data


def main(args: list[str]) -> int:
    parser = config_parser(
        "sft-jax show",
        "Print rows that a run trains on, decoded: green is trained on, dim is only read.",
        "sft-jax show --config=configs/demo.py --rows 2",
    )
    parser.add_argument("--rows", type=int, default=1, metavar="N", help="how many (default 1)")
    parser.add_argument("--row", type=int, default=0, metavar="I", help="the first of them, from 0 (default 0)")
    parser.add_argument("--json", action="store_true", help="one object a row: the arrays and the origins")
    parser.add_argument("--html", metavar="FILE", help="write a page instead, with the account of all rows")
    options, rest = parser.parse_known_args(args)
    config = read_config(rest)
    if options.json and options.html:
        raise ConfigError("sft-jax show: --json prints and --html writes a page. Give one of them.")
    renderer = open_renderer(config)
    data = open_train_data(config, renderer)
    if options.rows < 1 or not 0 <= options.row < data.num_rows:
        raise ConfigError(
            f"sft-jax show: --row {options.row} --rows {options.rows}: shows nothing; the run has rows 0 to "
            f"{data.num_rows - 1}. Ask for at least one of them."
        )
    numbers = range(options.row, min(options.row + options.rows, data.num_rows))
    console = Console()
    if options.html:
        rows = [(index, data.row(index)) for index in numbers]
        write_page(Path(options.html), preview_page(config.run.dir, data.report, rows, renderer.tokenizer))
        console.print(f"wrote {options.html}: open it in a browser", soft_wrap=True, highlight=False)
        return 0
    for index in numbers:
        row = data.row(index)
        if options.json:
            print(json.dumps(row_to_json(row)))
        else:
            console.rule(f"row {index}")
            console.print(preview_row(row, renderer.tokenizer), soft_wrap=True)
    return 0


def row_to_json(row: PackedRow) -> dict[str, list]:
    names = ("inputs", "targets", "loss_weights", "segment_ids", "positions")
    arrays = {name: getattr(row, name).tolist() for name in names}
    return arrays | {"origins": [str(origin) for origin in row.origins]}


def write_page(path: Path, page: str) -> None:
    try:
        path.write_text(page, encoding="utf-8", errors="backslashreplace")  # of file names that are no text
    except OSError as error:
        raise StorageError(f"--html: {path} cannot be written: {error.strerror}. Name another file.") from error


if __name__ == "__main__":
    sys.exit(run_command(main))
