"""Train on any cloud through SkyPilot: `sky.yaml`, filled in.

    python launch/sky.py --name=sft-8b --accelerators=H100:8 --nodes=2 --spot --storage=gs://BUCKET/sft \\
        --env=MODEL_DIR=gs://BUCKET/Llama-3.1-8B-Instruct --config=configs/8b.py

Hardware, cost and how to stop it: the head of `sky.yaml`. It needs SkyPilot (`pip install skypilot`, `sky check`). This
process ends when the job is in sky's hands, which starts it again after preemption: `sky jobs logs --name NAME`.
"""

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from commands import Commands, Experiment, check_remote, dump_yaml, launch_parser, parse_launch

from sft_jax.command_line import run_command

TEMPLATE = Path(__file__).with_name("sky.yaml")
VENV, CONFIG = "~/.sft_jax_venv", "/tmp/sft_jax_experiment.py"
FIND_OTHERS = """\
export JAX_COORDINATOR_ADDRESS="$(head -n1 <<< "$SKYPILOT_NODE_IPS"):8476"
export JAX_NUM_PROCESSES="$SKYPILOT_NUM_NODES" JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"
"""
"""One process for all the GPUs of a node. TPU VMs know each other."""


def make_task(options: argparse.Namespace, experiment: Experiment) -> dict[str, Any]:
    task = yaml.safe_load(TEMPLATE.read_text())
    is_tpu = options.accelerators.startswith("tpu-")
    package = options.package or f"sft_jax[{'tpu' if is_tpu else 'cuda'}]"
    files = {CONFIG: str(experiment.config.resolve())}
    if package.endswith(".whl"):
        wheel = Path(package).resolve()
        files[f"/tmp/{wheel.name}"] = str(wheel)
        package = f"/tmp/{wheel.name}[{'tpu' if is_tpu else 'cuda'}]"
    task["name"] = experiment.name
    task["num_nodes"] = options.nodes
    task["resources"] |= {"accelerators": options.accelerators, "use_spot": options.spot}
    if options.infra:
        task["resources"]["infra"] = options.infra
    task["envs"] = experiment.env
    task["file_mounts"] = files
    task["setup"] += f"python3 -m uv pip install --quiet --python {VENV}/bin/python {shlex.quote(package)} gcsfs s3fs\n"
    command = shlex.join(["-m", "sft_jax.main", *experiment.arguments(CONFIG)])
    task["run"] = f"{'' if is_tpu else FIND_OTHERS}exec {VENV}/bin/python {command}\n"
    return task


def main(args: Sequence[str]) -> int:
    parser = launch_parser("python launch/sky.py", "Train on any cloud through SkyPilot.")
    parser.add_argument("--accelerators", default="H100:8", help="of a node: H100:8, A100-80GB:8, tpu-v6e-8, ...")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--infra", help="cloud/region/zone; default: the cheapest")
    parser.add_argument("--spot", action="store_true")
    parser.add_argument("--package", help="requirement for pip, or a wheel on this machine; default: sft_jax")
    options, experiment = parse_launch(parser, args)
    check_remote(experiment)
    text = dump_yaml([make_task(options, experiment)])
    print(f"to stop it: sky jobs cancel --name {shlex.quote(experiment.name)}\n{text}", end="", flush=True)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        return Commands(options.dry_run).run(["sky", "jobs", "launch", "--detach-run", file.name])


if __name__ == "__main__":
    sys.exit(run_command(main))
