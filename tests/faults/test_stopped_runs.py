"""A run that is told to stop loses no finished step, whatever it is doing. Rows of docs/reliability.md, in small."""

import errno
import re
import signal
import threading
import time

import pytest
from kill_rows import KILL_ROWS
from stop_rows import STOP_ROWS
from training import TrainingLab, newest_step

from sft_jax.training.stop_signal import Interrupted, Preempted, StopSignal


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = TrainingLab(tmp_path_factory.mktemp("training"), num_devices=2)
    yield lab
    lab.close()


@pytest.mark.parametrize("trial", [1, 4], ids=["compile", "evaluation"])
def test_sigterm(lab, trial):
    assert STOP_ROWS["sigterm"](lab, trial) == ""


def test_sigterm_to_all_processes_of_a_run(lab):
    assert STOP_ROWS["group"](lab, 0) == ""


def test_a_jump_is_passed_over_and_so_it_is_after_a_kill(lab):
    assert KILL_ROWS["rewind"](lab, 0) == ""


@pytest.mark.parametrize(
    ("at", "every", "saved"), [(5, 12, 4), pytest.param(6, 3, 5, marks=pytest.mark.slow)], ids=["a save", "in between"]
)
def test_a_copy_that_differs_ends_the_run_before_it_is_saved(lab, at, every, saved):
    run_dir, args = lab.new(), ["--config.mesh.fsdp=1", f"--config.watch.replicas_every={every}"]
    result = lab.train(run_dir, args, {"flip": {"at": at, "number": 1}})
    assert result["status"] == 6, result["log"]
    found = rf"error: step {at}: state\.params\.embed\S* differs between \S+ of process 0, \S+ of process 0: "
    assert re.search(found, result["log"]), result["log"]
    assert newest_step(run_dir) == saved
    assert lab.train(run_dir, args)["status"] == 0


@pytest.mark.parametrize(("number", "status"), [(errno.EIO, 5), (0, 1)], ids=["of the disk", "unforeseen"])
def test_an_error_ends_the_run_and_the_next_start_goes_on(lab, number, status):
    run_dir = lab.new()
    result = lab.train(run_dir, faults={"fail": {"point": "evaluation", "at": 3, "errno": number}})
    assert result["status"] == status, result["log"]
    assert newest_step(run_dir) == 5
    assert lab.train(run_dir)["status"] == 0
    assert lab.differences(run_dir) == ""


def test_a_run_that_computes_steps_twice_is_the_same_run(lab):
    run_dir = lab.new()
    assert lab.train(run_dir, ["--config.watch.replay_every=3"])["status"] == 0
    assert lab.differences(run_dir) == ""


@pytest.mark.slow
@pytest.mark.parametrize("trial", [0, 2, 3, 5, 6], ids=["restore", "step", "data", "save", "export"])
def test_sigterm_in_the_other_phases(lab, trial):
    assert STOP_ROWS["sigterm"](lab, trial) == ""


@pytest.mark.slow
@pytest.mark.parametrize("row", [pytest.param("kill", marks=pytest.mark.fault_row), "rerun", "mixed"])
def test_a_run_that_is_killed_is_the_same_run(lab, row):
    assert KILL_ROWS[row](lab, 0) == ""


@pytest.fixture
def stop():
    old = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        yield stop
    signal.signal(signal.SIGTERM, old)


def interrupt_soon():
    threading.Timer(0.1, signal.raise_signal, [signal.SIGTERM]).start()


def test_before_the_first_step_the_run_ends_at_once(stop):
    interrupt_soon()
    with pytest.raises(Preempted):
        time.sleep(60)
    signal.raise_signal(signal.SIGTERM)  # does no harm
    time.sleep(0.2)


def test_between_two_steps_the_loop_is_told(stop):
    stop.begin_training()
    stop.check()
    signal.raise_signal(signal.SIGTERM)
    time.sleep(0.5)
    with pytest.raises(Interrupted):
        stop.check()


def test_reading_a_batch_is_broken_into(stop):
    stop.begin_training()
    interrupt_soon()
    with pytest.raises(Interrupted), stop.waiting():
        time.sleep(60)
    time.sleep(0.2)  # and nothing else is


def test_a_stop_after_the_last_save_is_said_then(stop):
    stop.begin_training()
    signal.raise_signal(signal.SIGTERM)
    time.sleep(0.5)
    with pytest.raises(Preempted, match="after the last step"):
        stop.end_training()
