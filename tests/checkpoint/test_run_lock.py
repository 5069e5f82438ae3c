"""One run directory, one trainer: whoever else comes is refused, and a dead one is in nobody's way."""

import os
import subprocess
import sys

import msgspec
import pytest
from etils import epath

from sft_jax.checkpoint import run_lock
from sft_jax.checkpoint.run_lock import RunLock, find_owner, read_owner
from sft_jax.datatypes import StorageError

_HOLDER = """
import sys
from etils import epath
from sft_jax.checkpoint.run_lock import RunLock
RunLock(epath.Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the lock."""
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_trainer_is_refused_until_the_first_is_gone(tmp_path, holder):
    run_dir = epath.Path(tmp_path)
    for _ in range(10):
        with pytest.raises(StorageError, match=f"being trained in by process {holder.pid} on .*config.run.dir"):
            RunLock(run_dir)
    assert find_owner(run_dir).pid == holder.pid
    holder.kill()
    holder.wait()
    assert find_owner(run_dir) is None
    lock = RunLock(run_dir)
    assert read_owner(lock.path).pid == os.getpid()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def foreign(lock_path):
    """The lock as another host would have left it."""
    owner = run_lock.Owner("far", "another start", 1, "then", "k")
    lock_path.write_bytes(msgspec.json.encode(owner))


def test_of_another_host_a_lock_counts_as_long_as_it_is_touched(tmp_path, monkeypatch):
    run_dir = epath.Path(tmp_path)
    foreign(run_dir / "lock")
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 1e12)
    naps = []

    def nap(seconds):
        naps.append(seconds)
        os.utime(run_dir / "lock", (1, 1))  # the owner lives: it touches its lock

    monkeypatch.setattr(run_lock.time, "sleep", nap)
    with pytest.raises(StorageError, match="process 1 on far"):
        RunLock(run_dir)
    assert naps == [1.0]
    assert find_owner(run_dir).host == "far"
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 60.0)
    assert find_owner(run_dir) is None  # it was last touched in 1970
    RunLock(run_dir).release()
    assert naps == [1.0]


def test_who_has_lost_the_lock_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.01)
    lock = RunLock(epath.Path(tmp_path))
    lock.check()
    foreign(lock.path)
    lock._beating.join(timeout=60)
    with pytest.raises(StorageError, match="process 1 on far, since then has taken this run over"):
        lock.check()
    lock.release()
    assert read_owner(lock.path).host == "far"


def test_the_owner_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.01)
    lock = RunLock(epath.Path(tmp_path))
    os.utime(lock.path, (1, 1))
    while os.stat(lock.path).st_mtime == 1:
        pass
    lock.release()
