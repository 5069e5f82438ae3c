"""`sft-jax check`: the config and all of its data, with no training."""

import sys

from rich.console import Console

from sft_jax.command_line import config_parser, parse_config, run_command
from sft_jax.config import warnings_for
from sft_jax.data.report import report_table
from sft_jax.experiment import open_eval_data, open_model_config, open_renderer, open_train_data


def main(args: list[str]) -> int:
    parser = config_parser(
        "sft-jax check",
        "Check config, model folder, tokenizer, template and every row; print what became of each row.",
        "sft-jax check --config=configs/demo.py",
    )
    config = parse_config(parser, args)
    console = Console()
    for warning in warnings_for(config):
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    renderer = open_renderer(config)
    open_model_config(config, renderer)
    sets = {"train": open_train_data(config, renderer)}
    sets |= {f"eval {name}": data for name, data in open_eval_data(config, renderer).items()}
    for name, data in sets.items():
        report = data.report
        console.print(f"\n{name}", style="bold")
        console.print(report_table(report))
        console.print(
            f"{report['rows_per_epoch']:,} rows of {report['max_seq_len']} tokens, {report['fill_fraction']:.1%} full; "
            f"{report['num_steps']:,} steps, {report['steps_per_epoch']:,.1f} an epoch",
            soft_wrap=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
