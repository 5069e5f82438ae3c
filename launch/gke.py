"""Train on TPU slices of a GKE cluster, by JobSet: `jobset.yaml`, filled in.

    python launch/gke.py --name=sft-70b --image=REGION-docker.pkg.dev/PROJECT/REPO/sft_jax:TAG \\
        --storage=gs://BUCKET/sft --accelerator=tpu-v5p-slice --topology=4x4x4 --slices=2 \\
        --config=configs/70b.py --config.mesh.replica=2

Hardware, cost and how to stop it: the head of `jobset.yaml`. `launch/Dockerfile` makes the image. kubectl's current
context says which cluster. This process ends when the job is in the cluster, which restarts it by itself:
`kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=NAME`.
"""

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from commands import Commands, Experiment, check_remote, dump_yaml, launch_parser, parse_launch

from sft_jax.command_line import run_command
from sft_jax.datatypes import ConfigError

TEMPLATE = Path(__file__).with_name("jobset.yaml")


def count_hosts(topology: str, chips_per_host: int) -> int:
    """
    Raises:
      ConfigError: no whole number.
    """
    chips = math.prod(map(int, topology.split("x"))) if re.fullmatch(r"\d+(x\d+)+", topology) else 0
    if not chips or chips % chips_per_host:
        raise ConfigError(
            f"--topology={topology} --chips-per-host={chips_per_host}: expected a shape such as 4x4x4, whose chips "
            "make whole hosts. https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus has the tables."
        )
    return chips // chips_per_host


def make_manifests(options: argparse.Namespace, experiment: Experiment) -> list[dict[str, Any]]:
    """The config file as a ConfigMap, and the JobSet that reads it."""
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": experiment.name},
        "data": {experiment.config.name: experiment.config.read_text()},
    }
    jobset = yaml.safe_load(TEMPLATE.read_text())
    jobset["metadata"]["name"] = experiment.name
    (slices,) = jobset["spec"]["replicatedJobs"]
    slices["replicas"] = options.slices
    job = slices["template"]["spec"]
    job["parallelism"] = job["completions"] = count_hosts(options.topology, options.chips_per_host)
    pod = job["template"]["spec"]
    pod["nodeSelector"] = {
        "cloud.google.com/gke-tpu-accelerator": options.accelerator,
        "cloud.google.com/gke-tpu-topology": options.topology,
    }
    if options.spot:
        pod["nodeSelector"]["cloud.google.com/gke-spot"] = "true"
    if options.service_account:
        pod["serviceAccountName"] = options.service_account
    (volume,) = pod["volumes"]
    volume["configMap"]["name"] = experiment.name
    (train,) = pod["containers"]
    train["image"] = options.image
    # Kubernetes replaces $(NAME) in arguments, and $$ by $.
    train["args"] = [arg.replace("$", "$$") for arg in experiment.arguments(f"/experiment/{experiment.config.name}")]
    train["env"] = [{"name": name, "value": value.replace("$", "$$")} for name, value in experiment.env.items()]
    train["resources"]["limits"]["google.com/tpu"] = options.chips_per_host
    return [config_map, jobset]


def main(args: Sequence[str]) -> int:
    parser = launch_parser("python launch/gke.py", "Train on TPU slices of a GKE cluster.")
    parser.add_argument("--image", required=True, help="of launch/Dockerfile, where the cluster can pull it")
    parser.add_argument("--accelerator", required=True, help="tpu-v6e-slice, tpu-v5p-slice, tpu-v5-lite-podslice, ...")
    parser.add_argument("--topology", required=True, help="of one slice, such as 4x4 or 4x4x4")
    parser.add_argument("--chips-per-host", type=int, default=4)
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--spot", action="store_true")
    parser.add_argument("--service-account", help="Kubernetes service account that may use the storage")
    options, experiment = parse_launch(parser, args)
    check_remote(experiment)
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", experiment.name):
        raise ConfigError(
            f"--name={experiment.name}: pods are called after it. Give 40 lower-case letters, digits, hyphens at most."
        )
    manifests = dump_yaml(make_manifests(options, experiment))
    print(f"to stop it: kubectl delete jobset {experiment.name}", flush=True)
    return Commands(options.dry_run).run(["kubectl", "apply", "--filename=-"], stdin=manifests)


if __name__ == "__main__":
    sys.exit(run_command(main))
