"""Two processes on one run: they save together, prove together, and restore the same step, or stop together."""

import shutil
from pathlib import Path

import pytest
from two_processes import run_two_processes

_WORKER = """
import sys
import time
from pathlib import Path
import jax
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
import runs
from sft_jax.checkpoint import agreement
from sft_jax.checkpoint.manager import CheckpointManager
from sft_jax.checkpoint.manifest import read_manifest
from sft_jax.checkpoint.reader import CheckpointReader
from sft_jax.checkpoint.step_folders import StepFolders
from sft_jax.datatypes import StorageError

folder, me = Path(sys.argv[3]), int(sys.argv[2])
runs.save_run(folder / "run", [1, 2, 3])
files = read_manifest(StepFolders(folder / "run").path(3)).files
print("hashed by each:", {name.split("/")[1] for name in files if "process_" in name and "/d/" in name})
if me == 0:
    for name in ("damaged", "hopeless"):
        runs.copy_run(folder / "run", folder / name)
    for name, step in (("damaged", 3), ("hopeless", 1), ("hopeless", 2), ("hopeless", 3)):
        of_process_1 = next((folder / name / "checkpoints" / str(step)).glob("state/ocdbt.process_1/d/*"))
        of_process_1.write_bytes(b"?")
agreement.decide("whether the copies are made", lambda: None)
print("restored:", runs.restored_step(folder / "run"), runs.restored_step(folder / "damaged"))
try:
    runs.restored_step(folder / "hopeless")
except StorageError as error:
    print("hopeless:", error)

# Process 1 looks at another folder, where the newest step is not all there.
mine = folder / ("run" if me == 0 else "seen-by-1")
if me:
    runs.copy_run(folder / "run", mine)
    for path in (mine / "checkpoints" / "3").rglob("d/*"):
        path.unlink()
agreement.decide("whether the copy is made", lambda: None)
try:
    CheckpointReader(mine).find_restorable()
except StorageError as error:
    print("other listings:", error)

# Process 1 is late, and process 0 does not wait for ever.
agreement.TIMEOUT_SECONDS = 1.0
if me:
    time.sleep(3.0)
try:
    agreement.gather("what it thinks", me)
except StorageError as error:
    print("late:", error)
try:
    if me:
        time.sleep(3.0)
    agreement.meet("the export of a kernel")
except StorageError as error:
    print("not met:", error)
agreement.TIMEOUT_SECONDS = 60.0
agreement.meet("the end")
agreement.decide("whether it is over", lambda: None)
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> list[str]:
    """What each process printed."""
    folder = tmp_path_factory.mktemp("two")
    out = run_two_processes(_WORKER, folder, Path(__file__).parents[1] / "faults")
    shutil.rmtree(folder)
    return out


def test_each_process_hashes_what_it_wrote(said: list[str]) -> None:
    for out in said:
        assert "ocdbt.process_0" in out
        assert "ocdbt.process_1" in out


def test_both_restore_the_same_step(said: list[str]) -> None:
    assert all("restored: 3 2\n" in out for out in said)


def test_both_stop_where_nothing_is_whole(said: list[str]) -> None:
    assert all("no step that can be trusted" in out and "--allow-fresh" in out for out in said)


def test_both_stop_where_they_see_different_files(said: list[str]) -> None:
    assert all("process 1 finds that " in out and "They do not see the same files" in out for out in said)


def test_a_process_that_does_not_answer_is_named(said: list[str]) -> None:
    assert "process 1 has not said what it thinks within 1 s" in said[0]


def test_one_that_is_late_for_a_meeting_is_named_by_all(said: list[str]) -> None:
    for me, out in enumerate(said):
        assert f"process {me}: process 1 did not come to the export of a kernel within 1 s" in out
