"""What lies in a run's directory beside the values of a step: which folders are steps, whose, and what is half done.

<run>/run_id                      the run's name, and whether it has ever saved; in every manifest of it
<run>/checkpoints/<step>/         a step; saved if it has a manifest of this run and step
                  <step>.unfinished      it is being written or removed; of a process that died, a leftover
                  <step>.orbax-checkpoint-tmp*   what Orbax had written of it
                  <step>.quarantined     damaged; on an object store it stays where it is, since a move is a copy
<run>/quarantine/<step>[-<n>]/    damaged steps, and what stood in the way of one: moved here, never deleted
"""

import dataclasses
import re
import uuid

import msgspec
from etils import epath

from sft_jax.checkpoint.manifest import Manifest, read_manifest, seal, unseal
from sft_jax.checkpoint.storage import remove, retried, write_whole
from sft_jax.data.stored_files import is_url
from sft_jax.datatypes import StorageError

_UNFINISHED, _QUARANTINED = "unfinished", "quarantined"
_STEP = re.compile(r"0|[1-9]\d{0,17}")
_TMP = re.compile(r"(?P<step>0|[1-9]\d{0,17})\.orbax-checkpoint-tmp.*")
_MARKER = re.compile(rf"(?P<step>0|[1-9]\d{{0,17}})\.(?P<what>{_UNFINISHED}|{_QUARANTINED})")


def is_step_name(name: str) -> bool:
    """Whether a folder of this name would be a step: `100`, and not `0100` or `100.old`."""
    return _STEP.fullmatch(name) is not None


class RunRecord(msgspec.Struct, frozen=True):
    """`has_saved`: since then, a directory without steps is one that has lost them."""

    run_id: str
    has_saved: bool = False


@dataclasses.dataclass(frozen=True)
class Listing:
    """All that is in `<run>/checkpoints`, by what its names and manifests say; no step is proved yet."""

    saved: dict[int, Manifest] = dataclasses.field(default_factory=dict)
    """Steps of this run."""
    damaged: dict[int, str] = dataclasses.field(default_factory=dict)
    """Steps whose manifest cannot be trusted, or that are marked as damaged: why."""
    ignored: dict[str, str] = dataclasses.field(default_factory=dict)
    """What is not a step of this run: why."""
    leftovers: list[str] = dataclasses.field(default_factory=list)
    """What a save or a removal that was cut off has left."""

    @property
    def had_steps(self) -> bool:
        """Whether there is anything that a step may have been."""
        return bool(self.saved or self.damaged or any(map(is_step_name, self.ignored)))


class StepFolders:
    """Only process 0 of a run that trains calls what changes something."""

    def __init__(self, run_dir: epath.PathLike) -> None:
        self.run_dir = epath.Path(run_dir).absolute()
        self.directory = self.run_dir / "checkpoints"
        self.quarantine_dir = self.run_dir / "quarantine"

    def path(self, step: int) -> epath.Path:
        return self.directory / str(step)

    def read_record(self) -> RunRecord | None:
        """None: there is none, or it is damaged; the steps know the run's id as well."""
        try:
            return unseal(retried((self.run_dir / "run_id").read_bytes), RunRecord)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None

    def write_record(self, record: RunRecord) -> None:
        write_whole(self.run_dir / "run_id", seal(record))

    def find_record(self) -> RunRecord:
        """The run's record; where it is lost, the id that all steps agree on; of a new run, a new one.

        Raises:
          StorageError: it is lost, and the steps do not agree.
        """
        if record := self.read_record():
            return record
        ids = {manifest.run_id for manifest in self._manifests()}
        if len(ids) > 1:
            raise StorageError(
                f"{self.run_dir / 'run_id'}: is lost, and the steps are of {len(ids)} runs: {', '.join(sorted(ids))}. "
                "Move those that are not of this run out of checkpoints/."
            )
        return RunRecord(ids.pop(), has_saved=True) if ids else RunRecord(uuid.uuid4().hex)

    def _manifests(self) -> list[Manifest]:
        found = []
        for name in self._names():
            if is_step_name(name):
                try:
                    found.append(read_manifest(self.directory / name))
                except (FileNotFoundError, NotADirectoryError, ValueError):
                    continue
        return found

    def _names(self) -> list[str]:
        if not self.directory.exists():
            return []
        return sorted(path.name for path in retried(lambda: [*self.directory.iterdir()]))

    def scan(self, run_id: str) -> Listing:
        """Raises StorageError where the directory cannot be read."""
        try:
            names = self._names()
            listing = Listing()
            marked = {what: {m["step"] for m in _markers(names) if m["what"] == what} for what in _MARKS}
            for name in names:
                if is_step_name(name):
                    self._sort(name, run_id, marked, listing)
                elif _TMP.fullmatch(name) or name.endswith((f".{_UNFINISHED}", f".{_UNFINISHED}.partial")):
                    listing.leftovers.append(name)
                elif not _MARKER.fullmatch(name):
                    listing.ignored[name] = "is not named as a step"
            return listing
        except OSError as error:
            raise StorageError(f"{self.directory}: cannot be read: {error}. Is the disk there?") from error

    def _sort(self, name: str, run_id: str, marked: dict[str, set[str]], listing: Listing) -> None:
        step, path = int(name), self.directory / name
        try:
            manifest = read_manifest(path)
        except (FileNotFoundError, NotADirectoryError):
            if name in marked[_UNFINISHED]:
                listing.leftovers.append(name)
            else:
                listing.ignored[name] = "has no manifest, so it was never saved"
            return
        except ValueError as error:
            listing.damaged[step] = f"its manifest is damaged: {error}"
            return
        if manifest.run_id != run_id:
            listing.ignored[name] = f"is step {manifest.step} of another run ({manifest.run_id}; this is {run_id})"
        elif manifest.step != step:
            listing.ignored[name] = f"is step {manifest.step} under another name"
        elif name in marked[_QUARANTINED]:
            listing.damaged[step] = "was found damaged before"
        else:
            listing.saved[step] = manifest

    def begin(self, step: int, run_id: str) -> None:
        """Make room for a step that is about to be written, and say so on disk.

        Raises OSError."""
        retried(lambda: self.directory.mkdir(parents=True, exist_ok=True))
        self.remove_leftovers(run_id)
        if self.path(step).exists():
            self.quarantine(step, by_move=True)
        write_whole(self.directory / f"{step}.{_UNFINISHED}", b"")

    def finish(self, step: int) -> None:
        """It has its manifest. Raises OSError."""
        remove(self.directory / f"{step}.{_UNFINISHED}")

    def remove_step(self, step: int) -> None:
        """Raises OSError."""
        write_whole(self.directory / f"{step}.{_UNFINISHED}", b"")
        remove(self.path(step) / "sft_jax_manifest.json")  # first: from here on it is no step
        remove(self.path(step))
        self.finish(step)

    def remove_leftovers(self, run_id: str) -> None:
        """Of saves and removals that are over: there must be none under way. Raises OSError."""
        names = self.scan(run_id).leftovers
        for name in sorted(names, key=lambda name: f".{_UNFINISHED}" in name):  # markers last: they say what to remove
            remove(self.directory / name)

    def quarantine(self, step: int, by_move: bool | None = None) -> epath.Path:
        """Take a step out of the run's way.

        Args:
          by_move: into `quarantine_dir`, and not by a marker; None: unless it is on an object store.

        Returns:
          Where it is now.

        Raises:
          OSError: the disk refuses.
        """
        marker = self.directory / f"{step}.{_QUARANTINED}"
        if by_move is None:
            by_move = not is_url(str(self.directory))
        if not by_move:
            write_whole(marker, b"")
            return self.path(step)
        retried(lambda: self.quarantine_dir.mkdir(parents=True, exist_ok=True))
        target, number = self.quarantine_dir / str(step), 1
        while target.exists():
            number += 1
            target = self.quarantine_dir / f"{step}-{number}"
        retried(lambda: self.path(step).rename(target))
        remove(marker)
        return target

    def list_quarantine(self) -> list[str]:
        return sorted(path.name for path in self.quarantine_dir.iterdir()) if self.quarantine_dir.is_dir() else []


_MARKS = (_UNFINISHED, _QUARANTINED)


def _markers(names: list[str]) -> list[re.Match[str]]:
    return [found for name in names if (found := _MARKER.fullmatch(name))]
