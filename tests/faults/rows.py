"""The rows of docs/reliability.md: each a trial by its number, which says what went wrong, or nothing.

A row is run in small by the tests, and in full by `make test-faults ROW=... N=...`.
"""

import errno
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import damage
from etils import epath
from runs import content, copy_run, files_of, restored_step, save_run

from sft_jax.checkpoint.restorable import find_restorable
from sft_jax.checkpoint.run_lock import RunLock
from sft_jax.checkpoint.step_folders import StepFolders
from sft_jax.datatypes import StorageError

HERE = Path(__file__).parent


class Lab:
    """Runs to damage, and a disk that fails; made when a trial first wants them."""

    def __init__(self, scratch: Path, seed: int = 0) -> None:
        self.scratch, self.seed, self._numbers = scratch, seed, itertools.count()

    def rng(self, trial: int) -> random.Random:
        return random.Random(f"{self.seed} {trial}")

    @cached_property
    def saved(self) -> Path:
        """A run with the steps 1 to 5, which is left as it is."""
        return save_run(self.scratch / "saved", range(1, 6))

    @cached_property
    def other(self) -> Path:
        return save_run(self.scratch / "other", [9])

    @cached_property
    def mended(self) -> Path:
        """A copy of `saved` for damage that is taken back."""
        return self.copy()

    @cached_property
    def newest_files(self) -> list[Path]:
        return files_of(self.mended / "checkpoints" / "5")

    def copy(self) -> Path:
        return copy_run(self.saved, self.scratch / f"run-{next(self._numbers)}")

    @cached_property
    def disk(self) -> subprocess.Popen:
        library = self.scratch / "disk.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, HERE / "disk.c", "-ldl"], check=True)
        return subprocess.Popen(
            [sys.executable, HERE / "disk_worker.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
        )  # fmt: skip

    def save_on_disk(self, run_dir: Path, first: int, number: int, what: int) -> dict:
        """What came of saving step 6 where, from the change `first` on, `number` are refused with errno `what`."""
        return self.ask_disk({"run_dir": str(run_dir), "step": 6, "first": first, "number": number, "what": what})

    def ask_disk(self, trial: dict) -> dict:
        self.disk.stdin.write(json.dumps(trial) + "\n")
        self.disk.stdin.flush()
        return json.loads(self.disk.stdout.readline())

    @cached_property
    def num_changes(self) -> int:
        """How often a save changes the disk, about."""
        return self.save_on_disk(self.copy(), 10**9, 1, 0)["changes"]

    def close(self) -> None:
        if "disk" in vars(self):
            self.disk.stdin.close()
            self.disk.wait()
            self.disk.stdout.close()


def find_step(run_dir: Path) -> int | None:
    return find_restorable(StepFolders(run_dir)).step


def flip(lab: Lab, trial: int) -> str:
    """One bit, of all those of the newest step and its manifest."""
    sizes = [8 * path.stat().st_size for path in lab.newest_files]
    bit = lab.rng(trial).randrange(sum(sizes))
    number = next(n for n, end in enumerate(itertools.accumulate(sizes)) if bit < end)
    path, bit = lab.newest_files[number], bit - sum(sizes[:number])
    damage.flip_bit(path, bit)
    found = find_step(lab.mended)
    damage.flip_bit(path, bit)
    return "" if found == 4 else f"bit {bit} of {path}: step {found}"


def damage_file(lab: Lab, trial: int) -> str:
    """Each kind of damage to each file of the newest step."""
    kind = list(damage.KINDS)[trial % len(damage.KINDS)]
    path = lab.newest_files[trial // len(damage.KINDS) % len(lab.newest_files)]
    data = path.read_bytes()
    damage.KINDS[kind](path)
    found = find_step(lab.mended)
    damage.mend(path, data)
    return "" if found == 4 else f"{path} is {kind}: step {found}"


def swap(lab: Lab, trial: int) -> str:
    """The contents of two files that differ: of the newest step, or one of it and the same one of the step before."""
    rng = lab.rng(trial)
    while True:
        one, two = rng.sample(lab.newest_files, 2)
        if trial % 2:
            two = lab.mended / "checkpoints" / "4" / one.relative_to(lab.mended / "checkpoints" / "5")
        if two.exists() and one.read_bytes() != two.read_bytes():
            break
    data = one.read_bytes(), two.read_bytes()
    one.write_bytes(data[1])
    two.write_bytes(data[0])
    found = find_step(lab.mended)
    one.write_bytes(data[0])
    two.write_bytes(data[1])
    return "" if found == (3 if trial % 2 else 4) else f"{one} and {two}: step {found}"


def damage_newest(lab: Lab, trial: int) -> str:
    """The newest k steps, k = 1 to 5: the one before them is restored, and all are kept; with 5 the run stops."""
    run_dir, count = lab.copy(), trial % 5 + 1
    damaged = [str(step) for step in range(6 - count, 6)]
    for step in damaged:
        damage.damage_some_file(run_dir / "checkpoints" / step, lab.rng(trial))
    before = content(run_dir)
    kept = {step: content(run_dir / "checkpoints" / step) for step in damaged}
    try:
        found = restored_step(run_dir)
    except StorageError as error:
        stopped = count == 5 and "--allow-fresh" in str(error) and content(run_dir) == before
        return "" if stopped else f"{count} damaged: {error}"
    if found != 5 - count or found == 0:
        return f"{count} damaged: step {found}"
    moved = {step: content(run_dir / "quarantine" / step) for step in damaged}
    return "" if moved == kept else f"{count} damaged: not all of them are in quarantine"


def stray(lab: Lab, trial: int) -> str:
    """What is no step of this run, whatever its name: it is passed over and left alone."""
    kind = list(damage.STRAYS)[trial % len(damage.STRAYS)]
    run_dir = lab.copy()
    name = damage.STRAYS[kind](run_dir, lab.other)
    path = run_dir / "checkpoints" / name
    before = content(path)
    found = restored_step(run_dir)
    if found != (4 if kind == "a renamed step" else 5):
        return f"{kind}: step {found}"
    return "" if path.exists() and content(path) == before else f"{kind}: was not left alone"


def kill_in_save(lab: Lab, trial: int) -> str:
    """SIGKILL at some change of the disk in a save."""
    run_dir, first = lab.copy(), lab.rng(trial).randint(1, lab.num_changes)
    result = lab.save_on_disk(run_dir, first, 1, 0)
    if result["status"] != -9 and result.get("saved") != 6:
        return f"change {first}: {result}"
    return _check_after(run_dir, f"change {first}", None)


_ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT)


def refuse_in_save(lab: Lab, trial: int) -> str:
    """ENOSPC, EIO, EROFS or EDQUOT at some change of the disk in a save; from there on always, or once."""
    run_dir, what = lab.copy(), _ERRORS[trial % 4]
    first = lab.rng(trial).randint(1, lab.num_changes)
    number = 1 if trial // 4 % 2 else 10**6
    where = f"{errno.errorcode[what]} at change {first}{' only' if number == 1 else ''}"
    result = lab.save_on_disk(run_dir, first, number, what)
    if result["status"] or not ("saved" in result or "could not be" in result.get("error", "")):
        return f"{where}: {result}"
    return _check_after(run_dir, where, result.get("saved"))


def _check_after(run_dir: Path, where: str, expected: int | None) -> str:
    """Of a run whose save of step 6 did not go well: the next start restores the newest step that has a manifest,
    leaves no leftover, and goes on saving. `expected` is the step that the save said was saved."""
    folders = StepFolders(run_dir)
    newest = max(folders.scan(folders.find_record().run_id).saved)
    found = restored_step(run_dir)
    if found != newest or found < 5 or (expected is not None and found != expected):
        return f"{where}: step {found} of {newest}, and {expected} was said to be saved"
    left = [path.name for path in (run_dir / "checkpoints").iterdir() if not path.name.isdecimal()]
    left += [str(path) for path in run_dir.rglob("*.partial")] + [str(path) for path in run_dir.glob("quarantine/*")]
    if left:
        return f"{where}: leftovers {left}"
    save_run(run_dir, [found + 1])
    found = restored_step(run_dir)
    return "" if found == newest + 1 else f"{where}: goes on from step {found} after saving {newest + 1}"


def second_trainer(lab: Lab, trial: int) -> str:
    """A manager in another process, while one has the run."""
    program = "import sys; from runs import restored_step; restored_step(sys.argv[1])"
    run_dir = lab.copy()
    lock = RunLock(epath.Path(run_dir))
    try:
        second = subprocess.run(
            [sys.executable, "-c", program, run_dir], capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
        )  # fmt: skip
    finally:
        lock.release()
    if second.returncode == 0 or f"being trained in by process {os.getpid()}" not in second.stderr:
        return f"status {second.returncode}: {second.stderr[-500:]}"
    found = restored_step(run_dir)
    return "" if found == 5 else f"after it: step {found}"


ROWS: dict[str, Callable[[Lab, int], str]] = {
    "flip": flip,
    "file": damage_file,
    "swap": swap,
    "newest": damage_newest,
    "stray": stray,
    "kill-save": kill_in_save,
    "errno": refuse_in_save,
    "second": second_trainer,
}
