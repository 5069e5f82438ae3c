"""A tree of arrays and a little JSON -> `<run>/checkpoints/<step>/`, proved. The one writer of a run's directory.

A step holds two items: `state`, to which each process writes its own shards, and `meta`, small JSON. In the background,
one save at a time:

    marker -> Orbax writes, and renames it into place -> digest manifest -> marker removed -> old steps removed

What dies on the way leaves a step without manifest, which was never saved, and a marker, by which the next start
removes it. An old step is removed only when a newer one has its manifest.
"""

import contextlib
import functools
import math
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from sft_jax.checkpoint.agreement import decide
from sft_jax.checkpoint.manifest import FILE, Manifest, read_manifest, seal, write_manifest
from sft_jax.checkpoint.reader import CheckpointReader, open_orbax
from sft_jax.checkpoint.restorable import Found, find_restorable
from sft_jax.checkpoint.retention import Retention
from sft_jax.checkpoint.run_lock import RunLock
from sft_jax.checkpoint.step_folders import RunRecord
from sft_jax.checkpoint.storage import (
    NUM_RETRIES,
    backoff_seconds,
    check_free_space,
    describe_error,
    is_transient,
    write_whole,
)
from sft_jax.datatypes import NumericError, StorageError
from sft_jax.sharding import group_for_device, replicated, to_device

_FAILURES = (OSError, ValueError, RuntimeError)
"""What a save fails with: RuntimeError is of a barrier that a process has not come to."""


class CheckpointManager(CheckpointReader):
    """Holds the run's lock and saves its steps. `close` it, or use it in a `with` statement.

    Args:
      run_dir: made if missing.
      retention: the steps that are kept.
      origin: `config_digest`, `data_fingerprint` and `mesh` of every manifest.

    Raises:
      StorageError: another process trains here, or the directory cannot be used.
    """

    def __init__(
        self,
        run_dir: epath.PathLike,
        retention: Retention = Retention(),  # noqa: B008
        *,
        config_digest: str = "",
        data_fingerprint: str = "",
        mesh: Mapping[str, int] = {},
        allow_fresh: bool = False,
    ) -> None:
        super().__init__(run_dir)
        self.retention, self._allow_fresh = retention, allow_fresh
        self._origin: dict[str, Any] = {
            "config_digest": config_digest, "data_fingerprint": data_fingerprint, "mesh": dict(mesh)
        }  # fmt: skip
        self._last_saved: int | None = None
        self._pending: tuple[int, Future[None]] | None = None
        self._num_failures, self._retry_at, self._failure = 0, 0.0, ""
        self._lock: RunLock | None = None
        self._worker = ThreadPoolExecutor(1, "checkpoint")
        try:
            self._record = RunRecord(decide("whether this run is free", self._open))
        except BaseException:
            self._let_go()
            raise

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            self.wait()
        except StorageError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # what stopped the run is the error of the run
        finally:
            self._let_go()

    def close(self) -> None:
        """Raises StorageError as `wait`; the lock is released all the same."""
        self.__exit__(None, None, None)

    @property
    def last_saved(self) -> int | None:
        """The newest step that is on disk and proved, of those that this process has restored or saved."""
        return self._last_saved

    def find_restorable(self) -> Found:
        """As a reader's; damaged steps that are newer go to the quarantine."""
        found = self._remember(find_restorable(self.folders, self.folders.quarantine, self._allow_fresh))
        self._last_saved = found.step
        return found

    def check_space(self, abstract: Any, num_steps: int) -> None:
        """
        Args:
          abstract: shapes and dtypes of the state.
          num_steps: of the whole run.

        Raises:
          StorageError: not all the steps that are kept fit on the disk, with one that is being written.
        """
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))

        def check() -> None:
            num_more = max(1, self.retention.most(num_steps) + 1 - len(self.all_steps()))
            check_free_space(self.folders.run_dir, size, num_more)

        decide("whether the disk is large enough", check)

    def save(
        self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any], best_loss: float | None = None
    ) -> None:
        """Start saving; returns when the arrays are copied to host memory. A step that is already there is left.

        Args:
          best_loss: held-out loss at this step, where it is the lowest so far.

        Raises:
          StorageError: this save, or the one before it, could not be written.
          NumericError: a value is NaN or infinite; nothing is written.
        """
        self._collect(wait=True)
        if step == self._last_saved:
            if best_loss is not None and jax.process_index() == 0:
                self._mark_best(step, best_loss)
            return
        check_finite(step, state)
        self._retry_at = 0.0
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(dict(state)), meta=ocp.args.JsonSave(dict(meta)))
        manifest = Manifest(
            run_id=self._record.run_id,
            step=step,
            num_processes=jax.process_count(),
            best_loss=best_loss,
            **self._origin,
        )
        try:
            decide(f"whether step {step} can be written", lambda: self.folders.begin(step, self._record.run_id))
            self._orbax.save(self.folders.path(step), args=args)
        except _FAILURES as error:
            self._note_failure(step, error)
            return
        self._pending = step, self._worker.submit(self._finish, manifest)

    def save_now(self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Return when the step is on disk and proved; tries again as long as that may help.

        Raises:
          StorageError: it cannot be written.
          NumericError: as `save`.
        """
        while True:
            self.save(step, state, meta)
            self._collect(wait=True)
            if not self._retry_at:
                return
            time.sleep(max(0.0, self._retry_at - time.monotonic()))

    def poll(self) -> bool:
        """To be called after every step. True: the last save has failed in a way that may pass; save again now.

        Raises:
          StorageError: it has failed for good, or the run's lock is lost.
        """
        if self._lock is not None:
            self._lock.check()
        self._collect(wait=False)
        return 0.0 < self._retry_at <= time.monotonic()

    def wait(self) -> None:
        """Until the last save is on disk and proved.

        Raises:
          StorageError: it could not be written.
        """
        self._collect(wait=True)
        if self._retry_at:
            raise StorageError(f"{self._failure} It was not tried again.")

    def all_steps(self) -> list[int]:
        """Of the steps that have a manifest, whether whole or not."""
        return sorted(self.folders.scan(self._record.run_id).saved)

    def _open(self) -> str:
        """Process 0: take the run, clear up after a process that died, and say the run's id."""
        folders = self.folders
        try:
            folders.directory.mkdir(parents=True, exist_ok=True)
            self._lock = RunLock(folders.run_dir)
            record = folders.find_record()
            if folders.read_record() is None:
                folders.write_record(record)
            folders.remove_leftovers(record.run_id)
        except OSError as error:
            raise StorageError(f"config.run.dir: {folders.run_dir}: cannot be used: {error}. Name another.") from error
        return record.run_id

    def _finish(self, manifest: Manifest) -> None:
        """In the background."""
        folders, step = self.folders, manifest.step
        self._orbax.wait_until_finished()
        whole = write_manifest(folders.path(step), manifest, jax.process_index())
        if whole is None:
            return
        if not (record := folders.find_record()).has_saved:
            folders.write_record(RunRecord(record.run_id, has_saved=True))
        folders.finish(step)
        for old in self.retention.superfluous(folders.scan(manifest.run_id).saved):
            folders.remove_step(old)

    def _mark_best(self, step: int, best_loss: float) -> None:
        """Of a step that was saved before it was evaluated, because the run was told to stop. Its files stay."""
        folder = self.folders.path(step)
        try:
            manifest = msgspec.structs.replace(read_manifest(folder), best_loss=best_loss)
            write_whole(folder / FILE, seal(manifest))
        except OSError as error:
            raise StorageError(
                f"{folder / FILE}: cannot be written: {error}. Run the same command to go on."
            ) from error

    def _collect(self, wait: bool) -> None:
        """Take note of how the last save went, if it is over."""
        if self._pending is None or not (wait or self._pending[1].done()):
            return
        step, saving = self._pending
        try:
            saving.result()
        except _FAILURES as error:
            self._pending = None
            self._note_failure(step, error)
            return
        self._pending, self._last_saved, self._num_failures = None, step, 0
        self._proved.add(step)

    def _note_failure(self, step: int, error: Exception) -> None:
        """Raises StorageError where trying again is of no use. With several processes it is not: those that have not
        failed would have to save again too."""
        self._num_failures += 1
        self._failure = (
            f"{self.folders.path(step)}: could not be written: {describe_error(error)}. Older steps are as they were. "
            "Is there free space, and is the disk writable? Run the same command to go on."
        )
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):  # the next save or start will, and this may make room now
                self.folders.remove_leftovers(self._record.run_id)
        if self._num_failures > NUM_RETRIES or not is_transient(error) or jax.process_count() > 1:
            raise StorageError(self._failure) from error
        self._orbax = open_orbax()  # one that has failed says so again
        self._retry_at = time.monotonic() + backoff_seconds(self._num_failures)

    def _let_go(self) -> None:
        self._worker.shutdown()
        try:
            with contextlib.suppress(*_FAILURES):  # Orbax says once more what was said
                super().close()
        finally:
            if self._lock is not None:
                self._lock.release()
                self._lock = None


def check_finite(step: int, state: Mapping[str, Any]) -> None:
    """Raises NumericError where a value is NaN or infinite, and names its leaf."""
    leaves = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    names = list(leaves)
    are_finite = _are_finite(leaves[names[0]].sharding.mesh)
    wrong = []
    for numbers in group_for_device(list(leaves.values())):
        group = [names[number] for number in numbers]
        wrong += [name for name, ok in zip(group, are_finite([leaves[name] for name in group]), strict=True) if not ok]
    if wrong:
        raise NumericError(
            f"step {step}: {wrong[0]} of the state is NaN or infinite, and {len(wrong) - 1} more. It was not "
            "saved; the last checkpoint is kept. A step that makes such numbers is skipped, so "
            "memory may be at fault: run the same command again."
        )


@functools.cache
def _are_finite(mesh: Mesh) -> jax.stages.Wrapped:
    """Leaves -> a flag for each, on every device."""
    return jax.jit(
        lambda leaves: jnp.stack([jnp.isfinite(leaf).all() for leaf in to_device(leaves)]),
        out_shardings=replicated(mesh),
    )
