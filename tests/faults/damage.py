"""Damage to a run's files, and what may lie among its steps that is none of them."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from runs import files_of

from sft_jax.checkpoint.manifest import FILE


def flip_bit(path: Path, bit: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(bit // 8)
        byte = stream.read(1)[0]
        stream.seek(bit // 8)
        stream.write(bytes([byte ^ (1 << bit % 8)]))


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


def mend(path: Path, data: bytes) -> None:
    """Put a file back, whatever was done to it."""
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    path.with_name("elsewhere").unlink(missing_ok=True)
    path.write_bytes(data)


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
