"""`sft-jax <command> ...`: finds the command's module and hands over."""

import importlib
import sys

from sft_jax.command_line import run_command
from sft_jax.datatypes import ConfigError

COMMANDS = {
    "train": "fine-tune (the same as python -m sft_jax.main)",
    "render": "what a tokenizer and a template make of each row of a file, with no config",
    "show": "the packed rows as the step receives them, coloured by loss weight, or as a page",
    "check": "config and data checked, every row accounted for; no training",
    "generate": "answer prompts with a folder's model and chat template",
    "score": "loss of a folder's model on given rows",
    "convert": "a Hugging Face folder as an Orbax checkpoint that many hosts read in parallel",
    "export": "a checkpoint of a run as a Hugging Face folder",
    "verify": "every byte of a checkpoint, or of all of a run's, held against what was written",
    "doctor": "what state a run is in, what a restart will do, and how to mend it",
    "plan": "the step compiled for TPUs that are not here: does it fit, how long would it take",
    "demo": "the main job on the embedded testbed, before and after",
}


def dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print("usage: sft-jax <command> [--help] [--debug] ...\n")
        print("\n".join(f"  {name:10}{what}" for name, what in COMMANDS.items()))
        return 0
    if args[0] not in COMMANDS:
        raise ConfigError(f"sft-jax {args[0]}: no such command. Known: {', '.join(COMMANDS)}.")
    module = "sft_jax.main" if args[0] == "train" else f"sft_jax.cli.{args[0]}"
    return importlib.import_module(module).main(args[1:])


def main() -> int:
    return run_command(dispatch)


if __name__ == "__main__":
    sys.exit(main())
