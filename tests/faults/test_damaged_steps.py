"""Whatever happens to the files of a step, it is restored as it was saved, or passed over, and nothing is deleted.

The rows of docs/reliability.md, in small; `make test-faults` has the full counts.
"""

import os
import random
import shutil

import damage
import pytest
from runs import content, copy_run, files_of, make_state, restored_step, save_run

from sft_jax.checkpoint.reader import CheckpointReader
from sft_jax.datatypes import StorageError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with the steps 1 to 5."""
    return save_run(tmp_path_factory.mktemp("saved") / "run", range(1, 6))


@pytest.fixture
def run_dir(saved, tmp_path):
    """A copy to damage."""
    return copy_run(saved, tmp_path / "run")


def test_no_flipped_bit_is_silent(saved, tmp_path):
    assert damage.flip_bits(saved, tmp_path, seed=1, first=0, count=40) == []


@pytest.mark.parametrize("kind", damage.KINDS)
def test_no_damaged_file_is_silent(saved, tmp_path, kind):
    assert damage.damage_every_file(saved, tmp_path, kind) == []


def test_no_exchange_of_two_files_is_silent(saved, tmp_path):
    assert damage.swap_files(saved, tmp_path) == []


@pytest.mark.parametrize("count", range(1, 5))
def test_the_newest_whole_step_is_taken_and_the_others_are_kept(run_dir, count):
    rng = random.Random(count)
    damaged = [str(step) for step in range(6 - count, 6)]
    for step in damaged:
        damage.damage_some_file(run_dir / "checkpoints" / step, rng)
    before = {step: content(run_dir / "checkpoints" / step) for step in damaged}
    assert restored_step(run_dir) == 5 - count
    assert {step: content(run_dir / "quarantine" / step) for step in damaged} == before
    assert restored_step(run_dir) == 5 - count


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


@pytest.mark.parametrize("stray", damage.STRAYS)
def test_what_is_no_step_of_this_run_is_passed_over_and_left_alone(run_dir, tmp_path, stray):
    other = save_run(tmp_path / "other", [9])
    name = damage.STRAYS[stray](run_dir, other)
    before = content(run_dir / "checkpoints" / name)
    assert restored_step(run_dir) in (4, 5)
    reader = CheckpointReader(run_dir)
    if name.isdecimal() and name[0] != "0":
        assert any(f"checkpoints/{name}: " in line for line in reader.find_restorable().rejected)
        with pytest.raises(StorageError, match=f"checkpoints/{name}: cannot be trusted"):
            reader.restore(int(name), make_state(0))
    assert content(run_dir / "checkpoints" / name) == before


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
def test_a_run_that_has_lost_its_name_has_it_from_its_steps(run_dir, tmp_path, lost):
    record = run_dir / "run_id"
    data = record.read_bytes()
    record.unlink() if lost == "gone" else record.write_bytes(data.replace(data[20:21], b"x"))
    assert restored_step(run_dir) == 5
    assert record.read_bytes() == data
    record.unlink()
    shutil.copytree(save_run(tmp_path / "other", [9]) / "checkpoints" / "9", run_dir / "checkpoints" / "9")
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
