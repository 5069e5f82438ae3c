"""What the launchers share: a run's arguments, checked before anything is rented, and commands that are printed before
they are run, or only printed (`--dry-run`)."""

import argparse
import dataclasses
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from sft_jax.command_line import read_config
from sft_jax.datatypes import ConfigError, DataError, NumericError, SftError

NOT_RETRIED = (ConfigError.exit_code, DataError.exit_code, NumericError.exit_code)
"""Exit statuses of a run that the same command would end with again."""
TRAINER_FLAGS = ("--override-fingerprint", "--allow-fresh")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What `sft_jax.main` is to be told."""

    name: str
    config: Path
    overrides: tuple[str, ...]
    storage: str
    """A folder or URL that outlives the machines: the run directory and the compilation cache are in it."""
    env: dict[str, str]

    def arguments(self, config: str) -> list[str]:
        """For a machine that has the config file at `config`. What is given by hand goes before what follows from
        `storage`."""
        defaults = {
            "--config.run.distributed": "true",
            "--config.run.dir": f"{self.storage}/{self.name}",
            "--config.run.compilation_cache": f"{self.storage}/compilation_cache",
        }
        given = {override.split("=")[0] for override in self.overrides}
        kept = [f"{option}={value}" for option, value in defaults.items() if option not in given]
        return [f"--config={config}", *kept, *self.overrides]

    def command(self, python: str, config: str) -> list[str]:
        env = ["env", *(f"{name}={value}" for name, value in self.env.items())] if self.env else []
        return [*env, python, "-m", "sft_jax.main", *self.arguments(config)]


def launch_parser(prog: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog,
        description=f"{description} --config=FILE and --config.section.field=value go to sft_jax.main.",
        allow_abbrev=False,
    )
    parser.add_argument("--name", required=True, help="of the run: its folder in --storage, and what is rented for it")
    parser.add_argument("--storage", required=True, help="folder or URL for runs and the compilation cache")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for the run; may be repeated")
    parser.add_argument("--dry-run", action="store_true", help="print every command, and run none")
    return parser


def parse_launch(parser: argparse.ArgumentParser, args: Sequence[str]) -> tuple[argparse.Namespace, Experiment]:
    """The launcher's own options, and the experiment in the others.

    Raises:
      ConfigError: an argument is neither; or the run would end with this error, after waiting for its machines.
    """
    options, rest = parser.parse_known_args(args)
    strange = [arg for arg in rest if arg not in TRAINER_FLAGS and not (arg.startswith("--config") and "=" in arg)]
    if strange:
        raise ConfigError(
            f"{strange[0]}: is no option of {parser.prog} (--help lists them), nor one of the run's, which are "
            f"--config=FILE, --config.section.field=value and {', '.join(TRAINER_FLAGS)}."
        )
    if not re.fullmatch(r"[A-Za-z0-9][-._A-Za-z0-9]*", options.name):
        raise ConfigError(
            f"--name={options.name}: becomes a folder in --storage, and goes into commands. Give letters, digits, "
            "hyphens, dots and underscores, and begin with a letter or a digit."
        )
    read_config([arg for arg in rest if arg not in TRAINER_FLAGS])
    env = dict(pair.partition("=")[::2] for pair in options.env if "=" in pair)
    if len(env) < len(options.env):
        raise ConfigError(f"--env={' --env='.join(options.env)}: expected NAME=VALUE, each name once.")
    (config,) = (arg.removeprefix("--config=") for arg in rest if arg.startswith("--config="))
    overrides = tuple(arg for arg in rest if not arg.startswith("--config="))
    return options, Experiment(options.name, Path(config), overrides, options.storage.rstrip("/"), env)


def check_remote(experiment: Experiment) -> None:
    """Raises ConfigError where the storage is of this machine, or of no lasting."""
    if "://" not in experiment.storage and not experiment.storage.startswith("/"):
        raise ConfigError(
            f"--storage={experiment.storage}: a machine that is rented has no such folder. Give a URL such as "
            "gs://bucket/folder, or the absolute path of what is mounted there and outlives it."
        )


def dump_yaml(documents: Sequence[dict[str, Any]]) -> str:
    """As a person would write it: in order, and text of several lines as it is."""

    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    return yaml.dump_all(documents, Dumper=Dumper, sort_keys=False, width=1000)


@dataclasses.dataclass(frozen=True)
class Commands:
    """Runs commands, each printed as it could be typed."""

    dry_run: bool

    def run(self, command: Sequence[str], stdin: str | None = None) -> int:
        """The command's status; what it says is seen. 0 in a dry run."""
        print(f"$ {shlex.join(command)}", flush=True)
        if stdin is not None:
            print(stdin, end="", flush=True)
        return 0 if self.dry_run else subprocess.run(command, input=stdin, text=True).returncode

    def check(self, command: Sequence[str], stdin: str | None = None) -> None:
        """
        Raises:
          SftError: it failed.
        """
        if status := self.run(command, stdin):
            raise SftError(f"{shlex.join(command)}: exit status {status}. Its own message is above.")

    def read(self, command: Sequence[str]) -> tuple[int, str, str]:
        """Status, output and errors; of a dry run, nothing."""
        print(f"$ {shlex.join(command)}", flush=True)
        if self.dry_run:
            return 0, "", ""
        result = subprocess.run(command, capture_output=True, text=True)
        return result.returncode, result.stdout.strip(), result.stderr.strip()
