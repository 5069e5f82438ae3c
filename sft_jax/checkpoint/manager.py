"""A tree of arrays and a little JSON <-> `<run>/checkpoints/<step>/`. Everything that knows Orbax is here.

A step holds two items: `state`, to which each process writes its own shards in the background, and `meta`, small JSON.
Orbax renames a finished step into place, so a step that is listed is complete.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from sft_jax.checkpoint.orbax_item import OrbaxSource, open_item
from sft_jax.datatypes import StorageError


class CheckpointManager:
    """Saves, lists and restores the steps of one run; keeps the newest `keep_latest` and the best.

    Args:
      directory: `<run>/checkpoints`; made if missing.
      keep_latest: newest steps kept.
      keep_best: also keep the step that was saved with the lowest `best_loss`.
    """

    def __init__(self, directory: epath.PathLike, keep_latest: int = 2, keep_best: bool = False) -> None:
        self.directory = epath.Path(directory).absolute()
        kept: list[policy.PreservationPolicy] = [policy.LatestN(keep_latest)]
        if keep_best:
            best = policy.BestN(get_metric_fn=_negative_loss, n=1, keep_checkpoints_without_metrics=False)
            kept.append(best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy.AnyPreservationPolicy(kept), cleanup_tmp_directories=True
        )
        self._orbax = ocp.CheckpointManager(self.directory, options=options, item_names=("state", "meta"))

    def latest_step(self) -> int | None:
        return self._orbax.latest_step()

    def all_steps(self) -> list[int]:
        return sorted(self._orbax.all_steps())

    def save(
        self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any], best_loss: float | None = None
    ) -> None:
        """Start saving; returns when the arrays are copied to host memory. A step that is already there is left.

        Args:
          best_loss: held-out loss at this step, where it is the lowest so far.

        Raises:
          StorageError: this save, or the one before it, could not be written.
        """
        if step in self._orbax.all_steps():
            return
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(dict(state)), meta=ocp.args.JsonSave(dict(meta)))
        metrics = None if best_loss is None else {"loss": best_loss}
        try:
            self._orbax.save(step, args=args, metrics=metrics, force=True)
        except (OSError, ValueError) as error:
            raise StorageError(f"{self.directory / str(step)}: could not be written: {error}. Free space?") from error

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
        self._check(step)
        return open_item(self.directory / str(step) / "state", {path: f"params.{path}" for path in paths})

    def read_meta(self, step: int) -> dict[str, Any]:
        return self._restore(step, ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def wait(self) -> None:
        """Until the last save is on disk.

        Raises:
          StorageError: it could not be written.
        """
        try:
            self._orbax.wait_until_finished()
        except (OSError, ValueError) as error:
            raise StorageError(f"{self.directory}: the last save could not be written: {error}. Free space?") from error

    def close(self) -> None:
        self.wait()
        self._orbax.close()

    def _check(self, step: int) -> None:
        if step not in self._orbax.all_steps():
            found = ", ".join(map(str, self.all_steps())) or "none"
            raise StorageError(f"{self.directory}: has no step {step}. Saved steps: {found}.")

    def _restore(self, step: int, args: ocp.args.Composite) -> Any:
        self._check(step)
        try:
            return self._orbax.restore(step, args=args)
        except (OSError, ValueError, KeyError) as error:
            raise StorageError(
                f"{self.directory / str(step)}: cannot be restored: {error}. Was it written with another model, "
                "optimizer or freeze list? Start in a new config.run.dir, or remove this step to use the one before."
            ) from error


def _restore_args(item: dict[str, Any], partial_restore: bool = False) -> ocp.args.PyTreeRestore:
    arrays = ocp.checkpoint_utils.construct_restore_args(item)
    return ocp.args.PyTreeRestore(item, arrays, partial_restore=partial_restore)


def _negative_loss(metrics: Mapping[str, float]) -> float:
    return -metrics["loss"]
