"""Train on GPU nodes of a Slurm cluster: `slurm.sh`, submitted.

    python launch/slurm.py --name=sft-8b --nodes=2 --gpus-per-node=8 --time=24:00:00 --storage=/shared/sft \\
        --python=/shared/venv/bin/python --sbatch-flag=--partition=gpu --config=configs/8b.py

Hardware, cost and how to stop it: the head of `slurm.sh`. Run it where sbatch is, in a folder that all nodes see. The
environment of `--python` needs `pip install 'sft_jax[cuda]'`, or give srun a container by its plugin's options.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from commands import Commands, launch_parser, parse_launch

from sft_jax.command_line import run_command


def main(args: Sequence[str]) -> int:
    parser = launch_parser("python launch/slurm.py", "Train on GPU nodes of a Slurm cluster.")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--time", help="limit of one stretch; the run goes on in the next")
    parser.add_argument("--python", default="python", help="of the environment that has sft_jax, on every node")
    parser.add_argument("--sbatch-flag", action="append", default=[], help="more for sbatch; may be repeated")
    options, experiment = parse_launch(parser, args)
    command = [
        "sbatch",
        f"--job-name={experiment.name}",
        f"--nodes={options.nodes}",
        f"--gpus-per-node={options.gpus_per_node}",
        f"--ntasks-per-node={options.gpus_per_node}",
        *([f"--time={options.time}"] if options.time else []),
        *options.sbatch_flag,
        str(Path(__file__).with_name("slurm.sh")),
        *experiment.command(options.python, str(experiment.config.resolve())),
    ]
    print(f"to stop it: scancel --name={shlex.quote(experiment.name)}", flush=True)
    return Commands(options.dry_run).run(command)


if __name__ == "__main__":
    sys.exit(run_command(main))
