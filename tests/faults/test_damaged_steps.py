"""Whatever happens to the files of a step, it is restored as it was saved, or passed over, and nothing is deleted.

The rows of docs/reliability.md, in small; `make test-faults` has the full counts.
"""

import os
import random
import shutil
import sys

import damage
import pytest
from rows import ROWS, Lab, find_step
from runs import content, files_of, make_state, restored_step, save_run
from save_rows import SAVE_ROWS, memory

from sft_jax.checkpoint.reader import CheckpointReader
from sft_jax.datatypes import StorageError


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.close()


@pytest.fixture
def run_dir(lab):
    """A run with the steps 1 to 5, to damage."""
    return lab.copy()


@pytest.mark.parametrize(
    ("row", "count"),
    [("flip", 40), ("file", None), ("swap", 12), ("newest", 5), ("stray", len(damage.STRAYS)), ("second", 2)],
)
def test_a_row_in_small(lab, row, count):
    """`file`: every kind of damage to every file, of which Orbax writes a few more or less."""
    count = count or len(lab.newest_files) * len(damage.KINDS)
    assert [problem for trial in range(count) if (problem := ROWS[row](lab, trial))] == []
    assert find_step(lab.mended) == 5


@pytest.mark.skipif(not shutil.which("cc") or sys.platform != "linux", reason="a disk that fails is made by cc")
@pytest.mark.parametrize(("row", "count"), [("kill-save", 6), ("errno", 8)])
def test_a_disk_that_fails(lab, row, count):
    assert [problem for trial in range(count) if (problem := ROWS[row](lab, trial))] == []


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cc") or sys.platform != "linux", reason="a disk that fails is made by cc")
def test_fifty_saves_on_a_disk_that_fails_now_and_then(lab):
    assert SAVE_ROWS["flaky"](lab, 0) == ""


@pytest.mark.slow
def test_saving_holds_one_copy_of_the_state_and_never_more(lab):
    assert memory(lab, 0, megabytes=64, saves=40) == ""


def test_where_no_step_is_whole_the_run_stops_until_a_fresh_start_is_asked_for(run_dir):
    for step in range(1, 6):
        damage.damage_some_file(run_dir / "checkpoints" / str(step), random.Random(step))
    before = content(run_dir)
    for _ in range(2):  # also where a supervisor starts it again
        with pytest.raises(StorageError, match=r"(?s)no step that can be trusted.*checkpoints/5: .*--allow-fresh"):
            restored_step(run_dir)
        assert content(run_dir) == before
    assert restored_step(run_dir, allow_fresh=True) is None
    assert sorted(path.name for path in (run_dir / "quarantine").iterdir()) == ["1", "2", "3", "4", "5"]


def test_steps_that_are_gone_are_not_a_fresh_start(run_dir):
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(StorageError, match="this run has saved some"):
        restored_step(run_dir)


@pytest.mark.parametrize("stray", ["an empty folder", "a renamed step", "another run's step"])
def test_a_reader_refuses_by_name_what_is_no_step_of_the_run(lab, run_dir, stray):
    name = damage.STRAYS[stray](run_dir, lab.other)
    reader = CheckpointReader(run_dir)
    assert any(f"checkpoints/{name}: " in line for line in reader.find_restorable().rejected)
    with pytest.raises(StorageError, match=f"checkpoints/{name}: cannot be trusted"):
        reader.restore(int(name), make_state(0))


def test_what_stands_where_a_step_is_saved_is_moved_away(run_dir):
    folder = run_dir / "checkpoints" / "6"
    folder.mkdir()
    (folder / "mine.txt").write_text("keep")
    save_run(run_dir, [6])
    assert restored_step(run_dir) == 6
    assert content(run_dir / "quarantine") == {"6/mine.txt": b"keep"}


def test_a_reader_moves_nothing(run_dir):
    damage.damage_some_file(run_dir / "checkpoints" / "5", random.Random(0))
    before = content(run_dir)
    assert CheckpointReader(run_dir).find_restorable().step == 4
    with pytest.raises(StorageError, match=r"checkpoints/5: is damaged: .*sft-jax doctor"):
        CheckpointReader(run_dir).read_meta(5)
    assert content(run_dir) == before


@pytest.mark.parametrize("lost", ["gone", "damaged"])
def test_a_run_that_has_lost_its_name_has_it_from_its_steps(lab, run_dir, lost):
    record = run_dir / "run_id"
    data = record.read_bytes()
    record.unlink() if lost == "gone" else record.write_bytes(data.replace(data[20:21], b"x"))
    assert restored_step(run_dir) == 5
    assert record.read_bytes() == data
    record.unlink()
    shutil.copytree(lab.other / "checkpoints" / "9", run_dir / "checkpoints" / "9")
    with pytest.raises(StorageError, match="the steps are of 2 runs"):
        restored_step(run_dir)


def test_a_marker_does_for_a_move(run_dir):
    """As on an object store."""
    reader = CheckpointReader(run_dir)
    reader.folders.quarantine(5, by_move=False)
    assert restored_step(run_dir) == 4
    save_run(run_dir, [5, 6])
    assert restored_step(run_dir) == 6
    assert len(files_of(run_dir / "quarantine" / "5")) > 5
    assert not os.path.exists(run_dir / "checkpoints" / "5.quarantined")
