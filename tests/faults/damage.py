"""Damage to a run's files, and the trials that count how much of it passes unseen."""

import bisect
import itertools
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from runs import copy_run, files_of, restored_step

from sft_jax.checkpoint.manifest import FILE
from sft_jax.checkpoint.restorable import find_restorable
from sft_jax.checkpoint.step_folders import StepFolders


def flip_bit(path: Path, bit: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(bit // 8)
        byte = stream.read(1)[0]
        stream.seek(bit // 8)
        stream.write(bytes([byte ^ (1 << bit % 8)]))


def flip_bits(saved: Path, scratch: Path, seed: int, first: int, count: int) -> list[str]:
    """The flips, of trials `first` to `first + count`, after which a step is taken for whole that is not as it was
    saved. Each flips one bit of all those of the newest step, its manifest among them, and flips it back."""
    folders = StepFolders(copy_run(saved, scratch / "flipped"))
    newest = max(int(path.name) for path in folders.directory.iterdir())
    files = files_of(Path(folders.path(newest)))
    starts = [0, *itertools.accumulate(8 * path.stat().st_size for path in files)]
    silent = []
    for trial in range(first, first + count):
        bit = random.Random(f"{seed} {trial}").randrange(starts[-1])
        number = bisect.bisect(starts, bit) - 1
        path, bit = files[number], bit - starts[number]
        flip_bit(path, bit)
        if find_restorable(folders).step != newest - 1:
            silent.append(f"trial {trial}: bit {bit} of {path.relative_to(folders.run_dir)}")
        flip_bit(path, bit)
    if find_restorable(folders).step != newest:
        silent.append("the step is not whole again after the flips: they are not what was counted")
    return silent


def _link(path: Path) -> None:
    """To the very same bytes: what they are may change later."""
    target = path.with_name("elsewhere")
    path.rename(target)
    path.symlink_to(target.name)


def _link_out(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/null")


def _zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


KINDS: dict[str, Callable[[Path], object]] = {
    "truncated by one byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "gone": Path.unlink,
    "zeros": _zero,
    "a link": _link,
    "a link elsewhere": _link_out,
    "a folder": _folder,
}


def damage_every_file(saved: Path, scratch: Path, kind: str) -> list[str]:
    """The files of the newest step of which such damage passes unseen, one at a time."""
    silent = []
    run_dir = copy_run(saved, scratch / kind)
    for path in files_of(run_dir / "checkpoints" / "5"):
        data = path.read_bytes()
        KINDS[kind](path)
        if find_restorable(StepFolders(run_dir)).step != 4:
            silent.append(str(path))
        _mend(path, data)
    assert find_restorable(StepFolders(run_dir)).step == 5
    return silent


def _mend(path: Path, data: bytes) -> None:
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    path.with_name("elsewhere").unlink(missing_ok=True)
    path.write_bytes(data)


def swap_files(saved: Path, scratch: Path) -> list[str]:
    """The pairs of files of the newest step, and of a file with the same one of another step, whose exchange passes
    unseen. Files that are equal are left out."""
    silent = []
    step, other = saved / "checkpoints" / "5", saved / "checkpoints" / "4"
    names = [path.relative_to(step) for path in files_of(step)]
    pairs = [(step / a, step / b) for a, b in itertools.combinations(names, 2)]
    pairs += [(step / name, other / name) for name in names if (other / name).exists()]
    run_dir = copy_run(saved, scratch / "swapped")
    for one, two in pairs:
        if one.read_bytes() == two.read_bytes():
            continue
        at = [run_dir / path.relative_to(saved) for path in (one, two)]
        at[0].write_bytes(two.read_bytes())
        at[1].write_bytes(one.read_bytes())
        if find_restorable(StepFolders(run_dir)).step not in (3, 4):
            silent.append(f"{one} and {two}")
        at[0].write_bytes(one.read_bytes())
        at[1].write_bytes(two.read_bytes())
    assert find_restorable(StepFolders(run_dir)).step == 5
    return silent


def damage_some_file(step: Path, rng: random.Random) -> None:
    """Some damage to some file, after which a manifest, if it is there, still says whose the step is."""
    path = rng.choice([path for path in files_of(step) if path.stat().st_size and path.name != FILE])
    rng.choice([*KINDS.values(), lambda path: flip_bit(path, rng.randrange(8 * path.stat().st_size))])(path)


def _copy(source: Path, run_dir: Path, name: str) -> str:
    shutil.copytree(source, run_dir / "checkpoints" / name)
    return name


def _empty(run_dir: Path, _: Path) -> str:
    (run_dir / "checkpoints" / "100000").mkdir()
    return "100000"


def _without_manifest(run_dir: Path, _: Path) -> str:
    name = _copy(run_dir / "checkpoints" / "5", run_dir, "7")
    (run_dir / "checkpoints" / name / FILE).unlink()
    return name


def _renamed(run_dir: Path, _: Path) -> str:
    (run_dir / "checkpoints" / "5").rename(run_dir / "checkpoints" / "50")
    return "50"


def _of_another_model(run_dir: Path, other: Path) -> str:
    """With this run's data beside another's manifest."""
    name = _copy(run_dir / "checkpoints" / "5", run_dir, "9")
    shutil.copy(other / "checkpoints" / "9" / FILE, run_dir / "checkpoints" / name)
    return name


def _file(run_dir: Path, _: Path) -> str:
    (run_dir / "checkpoints" / "8").write_text("not a folder")
    return "8"


STRAYS: dict[str, Callable[[Path, Path], str]] = {
    "an empty folder": _empty,
    "a folder without manifest": _without_manifest,
    "a renamed step": _renamed,
    "a copy of a step": lambda run_dir, _: _copy(run_dir / "checkpoints" / "5", run_dir, "6"),
    "a copy with zeros in front": lambda run_dir, _: _copy(run_dir / "checkpoints" / "5", run_dir, "00009"),
    "a copy by a person": lambda run_dir, _: _copy(run_dir / "checkpoints" / "5", run_dir, "9.old"),
    "another run's step": lambda run_dir, other: _copy(other / "checkpoints" / "9", run_dir, "9"),
    "another model's files": _of_another_model,
    "a file": _file,
}


def restore_after_strays(saved: Path, other: Path, scratch: Path, stray: str) -> bool:
    """Whether a start with a stray folder restores a step of the run, with its values."""
    run_dir = copy_run(saved, scratch / "stray")
    STRAYS[stray](run_dir, other)
    right = restored_step(run_dir) in (4, 5)
    shutil.rmtree(run_dir)
    return right
