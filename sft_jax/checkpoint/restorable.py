"""A run's steps -> the newest that is proved, byte by byte; every process comes to the same one."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import msgspec

from sft_jax.checkpoint.agreement import decide, gather
from sft_jax.checkpoint.manifest import Manifest, find_damage, find_strangers, read_manifest, share_of
from sft_jax.checkpoint.step_folders import Listing, StepFolders, is_step_name
from sft_jax.datatypes import StorageError


@dataclasses.dataclass
class Found:
    """`step` is proved; None: the run has never saved. `rejected` says what was passed over on the way, and why."""

    step: int | None
    rejected: list[str]


def find_restorable(
    folders: StepFolders,
    on_damaged: Callable[[int], Any] = lambda step: None,
    allow_fresh: bool = False,
) -> Found:
    """Walk back from the newest step to the first that is proved. Every process must call this.

    Args:
      on_damaged: what process 0 does with each damaged step that is newer than the one that is found; nothing is done
        where none is found, unless `allow_fresh`.
      allow_fresh: where none is proved, the run begins anew, and all that bears a step's name is `on_damaged`.

    Raises:
      StorageError: there have been steps, and none is proved; or the processes do not see the same files.
    """
    damage: dict[int, str] = {}
    while True:
        step = decide("which step to restore", lambda: _newest(folders, damage))
        if step is None:
            return Found(**decide("whether to begin anew", lambda: _give_up(folders, damage, on_damaged, allow_fresh)))
        problems = prove(folders, step)
        if not problems:
            accept = functools.partial(_accept, folders, damage, on_damaged, step)
            return Found(**decide("what to pass over", accept))
        damage[step] = describe(problems)


def prove(folders: StepFolders, step: int) -> list[str]:
    """What is wrong with a step, in every process; each verifies a share of its files.

    Raises:
      StorageError: a process sees damage that process 0 does not see: they do not look at the same files.
    """
    digest = decide(f"what the manifest of step {step} is", lambda: _manifest_digest(folders, step))
    try:
        manifest = read_manifest(folders.path(step))
        mine = share_of(manifest.files, jax.process_index(), jax.process_count())
        problems = find_damage(folders.path(step), manifest, mine)
        if not digest.startswith("unread: ") and _digest(manifest) != digest:
            problems = ["its manifest is another one"]
        if jax.process_index() == 0:
            problems += find_strangers(folders.path(step), manifest)
    except (OSError, ValueError) as error:
        problems = [f"its manifest cannot be read: {error}"]
    found = gather(f"whether step {step} is whole", problems)
    return decide(f"whether step {step} is whole", lambda: _judge(folders, step, found))


def _judge(folders: StepFolders, step: int, found: list[list[str]]) -> list[str]:
    if found[0] or not any(found):
        return [problem for problems in found for problem in problems]
    manifest = read_manifest(folders.path(step))
    confirmed = find_damage(folders.path(step), manifest, manifest.files)
    if not confirmed:
        index = next(index for index, problems in enumerate(found) if problems)
        raise StorageError(
            f"{folders.path(step)}: process {index} finds that {found[index][0]}, and process 0 finds nothing wrong. "
            "They do not see the same files. Mount one directory for all of them."
        )
    return confirmed


def _manifest_digest(folders: StepFolders, step: int) -> str:
    try:
        return _digest(read_manifest(folders.path(step)))
    except (OSError, ValueError) as error:
        return f"unread: {error}"


def _digest(manifest: Manifest) -> str:
    return hashlib.sha256(msgspec.json.encode(manifest)).hexdigest()


def describe(problems: list[str]) -> str:
    more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
    return f"{problems[0]}{more}"


def _list(folders: StepFolders) -> Listing:
    return folders.scan(folders.find_record().run_id)


def _newest(folders: StepFolders, damage: dict[int, str]) -> int | None:
    return max((step for step in _list(folders).saved if step not in damage), default=None)


def _rejected(listing: Listing, damage: dict[int, str], above: int) -> dict[str, str]:
    """Names of all that passes for newer than the step `above`, and why it is not taken; the newest first."""
    damaged = {str(step): why for step, why in (listing.damaged | damage).items() if step > above}
    strangers = {name: why for name, why in listing.ignored.items() if is_step_name(name) and int(name) > above}
    return dict(sorted((damaged | strangers).items(), key=lambda item: -int(item[0])))


def _accept(
    folders: StepFolders, damage: dict[int, str], on_damaged: Callable[[int], Any], step: int
) -> dict[str, Any]:
    listing = _list(folders)
    rejected = _rejected(listing, damage, step)
    for damaged in {**listing.damaged, **damage}:
        if damaged > step:
            _take_away(folders, damaged, on_damaged)
    return {"step": step, "rejected": [f"{folders.directory / name}: {why}" for name, why in rejected.items()]}


def _give_up(
    folders: StepFolders, damage: dict[int, str], on_damaged: Callable[[int], Any], allow_fresh: bool
) -> dict[str, Any]:
    listing, record = _list(folders), folders.find_record()
    rejected = _rejected(listing, damage, -1)
    lines = [f"{folders.directory / name}: {why}" for name, why in rejected.items()]
    if not listing.had_steps and not record.has_saved:
        return {"step": None, "rejected": []}
    if not allow_fresh:
        what = "\n".join(f"  {line}" for line in lines) or "  checkpoints/ has no step, and this run has saved some"
        raise StorageError(
            f"config.run.dir: {folders.run_dir} has no step that can be trusted:\n{what}\nNothing was moved. Restore "
            "one from a copy, name a new config.run.dir, or begin again at step 0 by --allow-fresh."
        )
    for name in rejected:
        _take_away(folders, int(name), on_damaged)
    return {"step": None, "rejected": lines}


def _take_away(folders: StepFolders, step: int, on_damaged: Callable[[int], Any]) -> None:
    try:
        on_damaged(step)
    except OSError as error:
        raise StorageError(f"{folders.path(step)}: is damaged, and cannot be moved: {error}. Move it away.") from error
