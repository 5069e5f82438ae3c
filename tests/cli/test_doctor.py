"""`sft-jax verify` and `sft-jax doctor`: what is said of a run in each state; saying it changes nothing."""

import re
import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "faults"))
from damage import flip_bit
from runs import content, copy_run, save_run

from sft_jax.checkpoint.manifest import find_damage
from sft_jax.checkpoint.run_lock import RunLock
from sft_jax.checkpoint.step_folders import StepFolders
from sft_jax.cli import doctor
from sft_jax.cli.main import dispatch
from sft_jax.command_line import run_command


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("saved") / "run", [1, 2, 3])


@pytest.fixture
def run_dir(saved, tmp_path):
    return copy_run(saved, tmp_path / "run")


@pytest.fixture
def say(run_dir, capsys):
    """A function: a command and its argument -> what it prints. It changes nothing, and its status is as expected."""

    def say(command, path, status):
        before = content(run_dir)
        assert run_command(dispatch, [command, str(path)]) == status
        assert content(run_dir) == before
        captured = capsys.readouterr()
        return captured.out + captured.err

    return say


def damage(run_dir, step):
    flip_bit(next((run_dir / "checkpoints" / str(step)).rglob("_METADATA")), 100)


def test_a_run_that_is_whole(run_dir, say):
    text = say("doctor", run_dir, 0)
    assert re.findall(r"step (\d): whole", text) == ["1", "2", "3"]
    assert text.endswith("next start: goes on from step 3\n")
    text = say("verify", run_dir, 0)
    assert text.count("whole: step") == 3
    assert "by 1 process on " in text
    assert "whole: step 2" in say("verify", run_dir / "checkpoints" / "2", 0)


def test_a_run_with_damage_and_strangers(run_dir, say):
    checkpoints = run_dir / "checkpoints"
    damage(run_dir, 3)
    damage(run_dir, 1)
    (checkpoints / "100000").mkdir()
    shutil.copytree(checkpoints / "2", checkpoints / "4")
    StepFolders(run_dir).begin(6, StepFolders(run_dir).find_record().run_id)
    (checkpoints / "6").mkdir()
    text = say("doctor", run_dir, 0)
    assert re.search("step 3: damaged: state/_METADATA is not what was written; goes to quarantine/ at the next", text)
    assert re.search("step 1: damaged: state/_METADATA is not what was written; stays", text)
    assert "100000: has no manifest, so it was never saved; it is ignored" in text
    assert "4: is step 2 under another name; it is ignored" in text
    assert "6: is a leftover of a save that was cut off; the next start removes it" in text
    assert text.endswith("next start: goes on from step 2\n")
    text = say("verify", run_dir, 5)
    assert "5 of 6 checkpoints cannot be trusted" in text
    assert f"{checkpoints / '3'}: state/_METADATA is not what was written" in text
    say("verify", checkpoints / "3", 5)
    say("verify", checkpoints / "4", 5)


def test_a_run_that_cannot_go_on_by_itself(run_dir, say):
    for step in (1, 2, 3):
        damage(run_dir, step)
    assert "the next start will stop. Restore one into checkpoints/" in say("doctor", run_dir, 5)
    shutil.rmtree(run_dir / "checkpoints")
    assert "the next start will stop" in say("doctor", run_dir, 5)
    (run_dir / "run_id").unlink()
    assert "holds no run: neither checkpoints/ nor run_id" in say("doctor", run_dir, 2)
    (run_dir / "checkpoints").mkdir()
    assert say("doctor", run_dir, 0).endswith("next start: begins at step 0, since this run has saved nothing yet\n")
    assert "checkpoints: has no checkpoint" in say("verify", run_dir, 5).replace(str(run_dir), "checkpoints")


def test_who_trains_is_said(run_dir, say):
    assert "lock: nobody trains here" in say("doctor", run_dir, 0)
    lock = RunLock(StepFolders(run_dir).run_dir)
    try:
        text = say("doctor", run_dir, 0)
        assert re.search(r"lock: process \d+ on .* trains here now", text)
        assert text.endswith("next start: is refused as long as that process trains; after it goes on from step 3\n")
    finally:
        lock.release()


def test_a_step_that_is_removed_meanwhile_is_not_called_damaged(run_dir, monkeypatch, capsys):
    def remove_and_look(path, manifest, names):
        if path.name == "1":
            StepFolders(run_dir).remove_step(1)
        return find_damage(path, manifest, names)

    monkeypatch.setattr(doctor, "find_damage", remove_and_look)
    assert run_command(dispatch, ["doctor", str(run_dir)]) == 0
    assert re.findall(r"step (\d): (\w+)", capsys.readouterr().out) == [("2", "whole"), ("3", "whole")]


def test_what_cannot_be_read_is_named(run_dir, say):
    (run_dir / "run_id").unlink()
    (run_dir / "run_id").mkdir()
    assert say("doctor", run_dir, 5).startswith(f"error: {run_dir}/run_id: Is a directory. ")


@pytest.mark.parametrize("command", ["doctor", "verify"])
def test_what_is_no_folder(tmp_path, command, say):
    assert "is no folder" in say(command, tmp_path / "nowhere", 2)
