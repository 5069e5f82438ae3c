"""`sft-jax show`: packed rows exactly as the step receives them."""

import json
import sys

from rich.console import Console

from sft_jax.command_line import config_parser, read_config, run_command
from sft_jax.data.preview import preview_row
from sft_jax.datatypes import PackedRow
from sft_jax.experiment import open_renderer, open_train_data


def main(args: list[str]) -> int:
    parser = config_parser(
        "sft-jax show",
        "Print the first rows that a run trains on, decoded: green is trained on, dim is only read.",
        "sft-jax show --config=configs/demo.py --rows 2",
    )
    parser.add_argument("--rows", type=int, default=1, metavar="N", help="how many (default 1)")
    parser.add_argument("--json", action="store_true", help="one object a row: the arrays and the origins")
    options, rest = parser.parse_known_args(args)
    config = read_config(rest)
    renderer = open_renderer(config)
    data = open_train_data(config, renderer)
    console = Console()
    for index in range(min(options.rows, data.num_rows)):
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


if __name__ == "__main__":
    sys.exit(run_command(main))
