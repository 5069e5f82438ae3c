"""`sft-jax verify`: every byte of a checkpoint, or of all of a run's, held against its manifest."""

import argparse
import sys

from etils import epath

from sft_jax.checkpoint.manifest import FILE, Manifest, find_damage, find_strangers, read_manifest
from sft_jax.checkpoint.step_folders import StepFolders, is_step_name
from sft_jax.command_line import run_command
from sft_jax.datatypes import ConfigError, StorageError


def main(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="sft-jax verify",
        description="Read every file of a checkpoint, and compare size and sha256 with what was written. Nothing is "
        "changed. Exit status: 0 all is whole, 5 something is not.",
        epilog="example: sft-jax verify runs/demo/checkpoints/500",
        allow_abbrev=False,
    )
    parser.add_argument("path", metavar="CHECKPOINT|RUN", help="the folder of a step, or a run directory")
    path = epath.Path(parser.parse_args(args).path)
    folders = StepFolders(path)
    if folders.directory.is_dir():
        steps = sorted(int(step.name) for step in folders.directory.iterdir() if is_step_name(step.name))
        paths = [folders.path(step) for step in steps]
    else:
        paths = [path]
    if not path.is_dir():
        raise ConfigError(f"sft-jax verify: {path} is no folder. Name a step's folder, or a run directory.")
    if not paths:
        raise StorageError(f"{path}: has no checkpoint. sft-jax doctor says what the next start will do.")
    damaged = [path for path in paths if not _is_whole(path)]
    if damaged:
        raise StorageError(f"{len(damaged)} of {len(paths)} checkpoints cannot be trusted. sft-jax doctor says more.")
    return 0


def _is_whole(path: epath.Path) -> bool:
    try:
        manifest = read_manifest(path)
    except FileNotFoundError:
        print(f"{path}: has no {FILE}: it was never saved, or is no checkpoint")
        return False
    except (OSError, ValueError) as error:
        print(f"{path}: its manifest is damaged: {error}")
        return False
    problems = find_damage(path, manifest, manifest.files) + find_strangers(path, manifest)
    if path.name != str(manifest.step):
        problems.append(f"it is step {manifest.step} under another name")
    for problem in problems:
        print(f"{path}: {problem}")
    if not problems:
        print(f"{path}: whole: {describe_manifest(manifest)}")
    return not problems


def describe_manifest(manifest: Manifest) -> str:
    size = sum(file.size for file in manifest.files.values())
    axes = ", ".join(f"{axis} {size}" for axis, size in manifest.mesh.items() if size > 1) or "one device"
    processes = f"{manifest.num_processes} processes" if manifest.num_processes > 1 else "1 process"
    return (
        f"step {manifest.step}, {size:,} bytes in {len(manifest.files)} files, by {processes} on {axes}; run "
        f"{manifest.run_id[:8]}, config {manifest.config_digest[:8]}, data {manifest.data_fingerprint[:8]}"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
