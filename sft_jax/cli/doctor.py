"""`sft-jax doctor`: what state a run directory is in, what a restart will do, and how to mend what it cannot."""

import argparse
import sys
from collections.abc import Iterator

from etils import epath

from sft_jax.checkpoint.manifest import find_damage, find_strangers
from sft_jax.checkpoint.restorable import describe
from sft_jax.checkpoint.run_lock import Owner, find_owner
from sft_jax.checkpoint.step_folders import Listing, StepFolders
from sft_jax.command_line import run_command
from sft_jax.datatypes import ConfigError, StorageError


def main(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="sft-jax doctor",
        description="Say what is in a run directory, which of its steps are whole, what the next start will do, and "
        "how to mend it. Nothing is changed. Exit status: 0 a restart goes on by itself, 5 it does not.",
        epilog="example: sft-jax doctor runs/demo",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="the run directory")
    run_dir = epath.Path(parser.parse_args(args).run)
    if not run_dir.is_dir():
        raise ConfigError(f"sft-jax doctor: {run_dir} is no folder. Name the run directory, config.run.dir of the run.")
    folders = StepFolders(run_dir)
    if folders.read_record() is None and not folders.directory.is_dir():
        raise ConfigError(
            f"sft-jax doctor: {run_dir} holds no run: neither checkpoints/ nor run_id. Name the run directory, "
            "config.run.dir of the run; a start there begins at step 0."
        )
    record = folders.find_record()
    listing = folders.scan(record.run_id)
    damage = {step: problems for step in listing.saved if (problems := _problems(folders, listing, step))}
    removed = set(listing.saved) - set(folders.scan(record.run_id).saved)  # meanwhile, by whoever trains
    for step in removed:
        del listing.saved[step]
    owner = find_owner(folders.run_dir)
    for line in _describe(folders, listing, damage, owner):
        print(line)
    whole = set(listing.saved) - set(damage)
    then = "is refused as long as that process trains; after it " if owner else ""
    if whole:
        print(f"next start: {then}goes on from step {max(whole)}")
        return 0
    if not listing.had_steps and not record.has_saved:
        print(f"next start: {then}begins at step 0, since this run has saved nothing yet")
        return 0
    raise StorageError(
        f"{run_dir}: no step can be trusted, so the next start will stop. Restore one into checkpoints/ from a copy, "
        "or begin again at step 0 by --allow-fresh, which moves what is there to quarantine/."
    )


def _problems(folders: StepFolders, listing: Listing, step: int) -> list[str]:
    path, manifest = folders.path(step), listing.saved[step]
    return find_damage(path, manifest, manifest.files) + find_strangers(path, manifest)


def _describe(
    folders: StepFolders, listing: Listing, damage: dict[int, list[str]], owner: Owner | None
) -> Iterator[str]:
    yield f"lock: {owner} trains here now" if owner else "lock: nobody trains here"
    newest = max(set(listing.saved) - set(damage), default=-1)
    for step in sorted({*listing.saved, *listing.damaged}):
        if step not in damage and step in listing.saved:
            yield f"step {step}: whole"
            continue
        why = listing.damaged.get(step) or describe(damage[step])
        fate = "goes to quarantine/ at the next start" if step > newest >= 0 else "stays where it is"
        yield f"step {step}: damaged: {why}; {fate}"
    for name, why in sorted(listing.ignored.items()):
        yield f"{name}: {why}; it is ignored, and only moved away if this run saves a step of that name"
    for name in listing.leftovers:
        whose = "is being written" if owner else "is a leftover of a save that was cut off; the next start removes it"
        yield f"{name}: {whose}"
    if kept := folders.list_quarantine():
        yield f"quarantine/: {', '.join(kept)}; remove what you do not want to look into"


if __name__ == "__main__":
    sys.exit(run_command(main))
