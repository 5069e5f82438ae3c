"""A run directory in, the trees of its steps out. A step is proved, byte by byte, before anything of it is read.

Reading changes nothing in the directory. Everything that knows how Orbax restores is here.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from sft_jax.checkpoint.orbax_item import OrbaxSource, open_item
from sft_jax.checkpoint.restorable import Found, describe, find_restorable, prove
from sft_jax.checkpoint.step_folders import StepFolders
from sft_jax.datatypes import StorageError


class CheckpointReader:
    """The steps of one run.

    Args:
      run_dir: its steps are in `checkpoints`, a folder there for each.
    """

    def __init__(self, run_dir: epath.PathLike) -> None:
        self.folders = StepFolders(run_dir)
        self._proved: set[int] = set()
        self._orbax = open_orbax()

    def find_restorable(self) -> Found:
        """The newest step that is proved.

        Raises:
          StorageError: there have been steps, and none is.
        """
        return self._remember(find_restorable(self.folders))

    def restore(self, step: int, abstract: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(state, meta) of a step, each array placed by the sharding of its ShapeDtypeStruct in `abstract`."""
        args = ocp.args.Composite(state=_restore_args(dict(abstract)), meta=ocp.args.JsonRestore())
        restored = self._restore(step, args)
        return restored["state"], restored["meta"]

    def restore_params(self, step: int, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Only the parameters of a step: no optimizer state is read."""
        args = _restore_args({"params": dict(abstract)}, partial_restore=True)
        return self._restore(step, ocp.args.Composite(state=args))["state"]["params"]

    def open_params(self, step: int, paths: Iterable[str]) -> dict[str, OrbaxSource]:
        """Where parameters of a step lie: none is read."""
        self.prove(step)
        return open_item(self.folders.path(step) / "state", {path: f"params.{path}" for path in paths})

    def read_meta(self, step: int) -> dict[str, Any]:
        return self._restore(step, ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def prove(self, step: int) -> None:
        """Once for each step.

        Raises:
          StorageError: it is not there, or not what was saved.
        """
        if step in self._proved:
            return
        listing = self.folders.scan(self.folders.find_record().run_id)
        path = self.folders.path(step)
        if step not in listing.saved:
            why = listing.damaged.get(step) or listing.ignored.get(str(step))
            if why:
                raise StorageError(f"{path}: cannot be trusted: it {why}. sft-jax doctor says which steps can.")
            found = ", ".join(map(str, sorted(listing.saved))) or "none"
            raise StorageError(f"{self.folders.directory}: has no step {step}. Saved steps: {found}.")
        if problems := prove(self.folders, step):
            raise StorageError(f"{path}: is damaged: {describe(problems)}. sft-jax doctor says which steps are whole.")
        self._proved.add(step)

    def close(self) -> None:
        self._orbax.close()

    def _remember(self, found: Found) -> Found:
        if found.step is not None:
            self._proved.add(found.step)
        return found

    def _restore(self, step: int, args: ocp.args.Composite) -> Any:
        self.prove(step)
        try:
            return self._orbax.restore(self.folders.path(step), args=args)
        except (OSError, ValueError, KeyError) as error:
            raise StorageError(
                f"{self.folders.path(step)}: cannot be restored: {error}. Was it written with another model, "
                "optimizer or freeze list? Start in a new config.run.dir."
            ) from error


def open_orbax() -> ocp.AsyncCheckpointer:
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler("state", "meta"))


def _restore_args(item: dict[str, Any], partial_restore: bool = False) -> ocp.args.PyTreeRestore:
    arrays = ocp.checkpoint_utils.construct_restore_args(item)
    return ocp.args.PyTreeRestore(item, arrays, partial_restore=partial_restore)
