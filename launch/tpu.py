"""Train on Cloud TPU VMs: one VM, a pod slice on all its workers, or several slices, with or without a queue.

    python launch/tpu.py --name=sft-8b --zone=us-east5-b --accelerator=v6e-16 --storage=gs://BUCKET/sft \\
        --env=MODEL_DIR=gs://BUCKET/Llama-3.1-8B-Instruct --env=DATA_DIR=gs://BUCKET/chats --config=configs/8b.py

Hardware: `--accelerator` v6e-8 is one VM, v6e-16 or v5p-128 a slice of many. `--queued` waits for it in a queue, and
takes `--slices` of them; `--spot` is cheaper and may be taken away: with `--queued` it is asked for again, and the run
goes on from what it saved. Cost to try: the chips from READY until they are deleted, some 10 minutes for a short run:
https://cloud.google.com/tpu/pricing. They are deleted when the run is done (`--keep`: not), and kept where it failed.
Stop: Ctrl-C, then the command that was printed first, which deletes them.

This process stays until the run ends, so start it where a connection does not matter: tmux, or a small VM. It needs
gcloud, with a project and an account; the same command takes up what is there. Exit status: the run's.
"""

import argparse
import dataclasses
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from commands import NOT_RETRIED, Commands, Experiment, check_remote, launch_parser, parse_launch

from sft_jax.command_line import run_command
from sft_jax.datatypes import PREEMPTED_EXIT_CODE, ConfigError, SftError

RUNTIME_VERSIONS = {
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
"""Source: https://cloud.google.com/tpu/docs/runtimes."""
CONFIG = "sft_jax_experiment.py"
"""The config's name in the home folder of every worker."""


@dataclasses.dataclass(frozen=True)
class Machines:
    """The VMs of one name, by gcloud. Sources: `gcloud compute tpus tpu-vm|queued-resources --help` (SDK 528), and of
    the states https://cloud.google.com/tpu/docs/reference/rest/v2/projects.locations.queuedResources and .../nodes."""

    options: argparse.Namespace
    commands: Commands

    @property
    def ready(self) -> str:
        return "ACTIVE" if self.options.queued else "READY"

    @property
    def lost(self) -> tuple[str, ...]:
        """States that nothing but a new request leads out of."""
        return ("SUSPENDED", "FAILED") if self.options.queued else ("PREEMPTED", "TERMINATED", "STOPPED")

    def gcloud(self, verb: str, *args: str) -> list[str]:
        group = "queued-resources" if self.options.queued else "tpu-vm"
        project = [f"--project={self.options.project}"] if self.options.project else []
        return ["gcloud", "compute", "tpus", group, verb, *args, f"--zone={self.options.zone}", *project]

    @property
    def everywhere(self) -> list[str]:
        """On all workers at once: in batches, which are gcloud's default here, the first would wait for the others."""
        return ["--worker=all", *(["--node=all", "--batch-size=all"] if self.options.queued else [])]

    @property
    def create_command(self) -> list[str]:
        options = self.options
        version = options.runtime_version or RUNTIME_VERSIONS[options.accelerator.split("-")[0]]
        spot = ["--spot"] if options.spot else []
        kind = [f"--accelerator-type={options.accelerator}", *spot, *options.create_flag]
        if not options.queued:
            return self.gcloud("create", options.name, f"--version={version}", *kind)
        nodes = [f"--node-id={options.name}"]
        if options.slices > 1:
            nodes = [f"--node-count={options.slices}", f"--node-prefix={options.name}"]
        return self.gcloud("create", options.name, f"--runtime-version={version}", *nodes, *kind)

    @property
    def delete_command(self) -> list[str]:
        force = ["--force"] if self.options.queued else []
        return self.gcloud("delete", self.options.name, *force, "--quiet")

    def state(self) -> str:
        """As the service has it; empty: there is none of this name."""
        value = "state.state" if self.options.queued else "state"
        status, state, errors = self.commands.read(
            self.gcloud("describe", self.options.name, f"--format=value({value})")
        )
        if status and "NOT_FOUND" not in errors:
            raise SftError(f"gcloud cannot describe {self.options.name}: {errors}")
        return state

    def make_ready(self) -> None:
        """Wait until they are there; what is lost, or never was, is asked for."""
        while (state := self.state()) != self.ready:
            if state in self.lost:
                self.commands.check(self.delete_command)
            if state in self.lost or not state:
                self.commands.check(self.create_command)
            else:
                print(f"{self.options.name} is {state}", flush=True)
                time.sleep(self.options.poll_seconds)
            if self.commands.dry_run:
                return

    def copy(self, source: Path, name: str) -> int:
        return self.commands.run(self.gcloud("scp", str(source), f"{self.options.name}:{name}", *self.everywhere))

    def ssh(self, command: str) -> int:
        """Gcloud's status: of the first worker, by number, whose command failed."""
        alive = ["--ssh-flag=-o ServerAliveInterval=30", "--ssh-flag=-o ServerAliveCountMax=6"]
        return self.commands.run(
            self.gcloud("ssh", self.options.name, *self.everywhere, *alive, f"--command={command}")
        )


def worker_command(experiment: Experiment, package: str) -> str:
    """What every worker's shell is given. The VMs' own Python is older than sft_jax's, so uv brings one. The lock is
    for a connection that broke: the run it had dies at its next line of output, and only then may another begin."""
    venv = ".sft_jax_venv"
    python = f"{venv}/bin/python"
    setup = [
        ["python3", "-m", "pip", "install", "--quiet", "--user", "uv"],
        ["python3", "-m", "uv", "venv", "--quiet", "--allow-existing", "--python=3.12", venv],
        ["python3", "-m", "uv", "pip", "install", "--quiet", f"--python={python}", package, "gcsfs"],
    ]
    train = ["flock", "--wait=600", ".sft_jax.lock", *experiment.command(python, CONFIG)]
    return " && ".join(shlex.join(command) for command in [*setup, train])


def start_run(machines: Machines, experiment: Experiment, package: str) -> int:
    """Bring what is needed and train; the status of the first that failed."""
    files, requirement = {CONFIG: experiment.config}, package
    if package.endswith(".whl"):
        wheel = Path(package)
        files[wheel.name], requirement = wheel, f"./{wheel.name}[tpu]"
    for name, source in files.items():
        if status := machines.copy(source, name):
            return status
    return machines.ssh(worker_command(experiment, requirement))


def supervise(machines: Machines, experiment: Experiment, package: str, max_failures: int) -> int:
    """Train until the run is done or fails for good. What was preempted goes on, there or on new machines."""
    failures = 0
    while True:
        machines.make_ready()
        status = start_run(machines, experiment, package)
        if status == 0 or status in NOT_RETRIED:
            return status
        lost = machines.state() != machines.ready
        if not lost and status != PREEMPTED_EXIT_CODE:
            failures += 1
            if failures > max_failures:
                return status
            time.sleep(machines.options.poll_seconds)  # machines on their way out look ready for a while
        why = "the machines are gone" if lost else f"exit status {status}"
        print(f"{experiment.name}: {why}; going on from the last checkpoint", flush=True)


def check_options(options: argparse.Namespace) -> None:
    """
    Raises:
      ConfigError: they cannot be had together.
    """
    version = options.accelerator.split("-")[0]
    if not options.runtime_version and version not in RUNTIME_VERSIONS:
        raise ConfigError(
            f"--accelerator={options.accelerator}: the runtime version of {version} is not known; known are "
            f"{', '.join(RUNTIME_VERSIONS)}. Add --runtime-version from https://cloud.google.com/tpu/docs/runtimes."
        )
    if options.slices > 1 and not options.queued:
        raise ConfigError(f"--slices={options.slices}: several slices come from a queue only. Add --queued.")


def main(args: Sequence[str]) -> int:
    parser = launch_parser("python launch/tpu.py", "Train on Cloud TPU VMs.")
    parser.add_argument("--zone", required=True)
    parser.add_argument("--project", help="default: gcloud's own")
    parser.add_argument("--accelerator", required=True, help="such as v6e-8, v5litepod-64, v5p-128")
    parser.add_argument("--runtime-version", help="default: the one that Google names for the accelerator")
    parser.add_argument("--queued", action="store_true", help="wait in the queue; ask again after preemption")
    parser.add_argument("--slices", type=int, default=1, help="with --queued")
    parser.add_argument("--spot", action="store_true")
    parser.add_argument("--create-flag", action="append", default=[], help="more for gcloud's create; may be repeated")
    parser.add_argument("--package", default="sft_jax[tpu]", help="requirement for pip, or a wheel on this machine")
    parser.add_argument("--keep", action="store_true", help="do not delete the machines when the run is done")
    parser.add_argument("--max-failures", type=int, default=3, help="restarts for other reasons than preemption")
    parser.add_argument("--poll-seconds", type=float, default=30)
    options, experiment = parse_launch(parser, args)
    check_remote(experiment)
    check_options(options)
    machines = Machines(options, Commands(options.dry_run))
    print(f"to stop paying: {shlex.join(machines.delete_command)}", flush=True)
    status = supervise(machines, experiment, options.package, options.max_failures)
    if status == 0 and not options.keep:
        machines.commands.check(machines.delete_command)
    elif not options.dry_run:
        print(f"still there, and paid for: {shlex.join(machines.delete_command)}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(run_command(main))
