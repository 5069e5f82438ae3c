"""`sft-jax train`: the same as `python -m sft_jax.main`."""

import sys

from sft_jax.command_line import run_command
from sft_jax.main import main

if __name__ == "__main__":
    sys.exit(run_command(main))
