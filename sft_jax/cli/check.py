"""`sft-jax check`: the config and all of its data, with no training."""

import contextlib
import json
import sys
from collections.abc import Mapping
from typing import Any

from etils import epath
from rich.console import Console

from sft_jax.checkpoint.reader import CheckpointReader
from sft_jax.command_line import config_parser, read_config, run_command
from sft_jax.config import warnings_for
from sft_jax.config_schema import Config
from sft_jax.data.report_table import report_table
from sft_jax.datatypes import StorageError
from sft_jax.experiment import (
    open_eval_data,
    open_model_config,
    open_renderer,
    open_train_data,
    refuse_changes,
    warnings_for_model,
)
from sft_jax.main import make_run_dir, private_files
from sft_jax.training.step import check_router_losses


def main(args: list[str]) -> int:
    parser = config_parser(
        "sft-jax check",
        "Check config, model folder, tokenizer, template and every row; print what became of each row.",
        "sft-jax check --config=configs/demo.py",
    )
    parser.add_argument("--out", metavar="FILE", help="where the report goes (default data_report.json in run.dir)")
    options, rest = parser.parse_known_args(args)
    config = read_config(rest)
    console = Console()
    renderer = open_renderer(config)
    model = open_model_config(config, renderer)
    for warning in [*warnings_for(config), *warnings_for_model(config, model)]:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    check_router_losses(config.loss, model)
    data = open_train_data(config, renderer)
    train = data.report
    held_out = {name: data.report for name, data in open_eval_data(config, renderer).items()}
    for name, report in {"train": train, **{f"eval {name}": report for name, report in held_out.items()}}.items():
        console.print(f"\n{name}", style="bold")
        console.print(report_table(report))
    check_resumes(config, data.fingerprint_fields)
    console.print("\n" + write_report(config, options.out, train | {"eval": held_out}), soft_wrap=True, highlight=False)
    return 0


def check_resumes(config: Config, fingerprint_fields: Mapping[str, Any]) -> None:
    """
    Raises:
      ConfigError: the run directory has a checkpoint on other data.
      StorageError: it has checkpoints, and none is whole.
    """
    reader = CheckpointReader(epath.Path(config.run.dir).expanduser())
    if (step := reader.find_restorable().step) is not None:
        refuse_changes(config, step, reader.read_meta(step)["data"], fingerprint_fields)


def write_report(config: Config, out: str | None, report: dict) -> str:
    """Write data_report.json, and say where. A run's own, of the data that it was started on, is left as it is."""
    run_dir = epath.Path(config.run.dir).expanduser()
    path = epath.Path(out).expanduser() if out else run_dir / "data_report.json"
    if not out and (run_dir / "config.json").exists():
        return f"{path} is kept as the run that was started there wrote it; --out=FILE writes this report"
    try:
        with contextlib.nullcontext() if out else private_files():
            if not out:
                make_run_dir(run_dir)
            path.write_text(json.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}. Name another file with --out.") from error
    return f"report: {path}"


if __name__ == "__main__":
    sys.exit(run_command(main))
