"""`<run>/lock`: one run directory, one trainer.

The kernel holds the lock (`flock`) and lets go of it when the process dies, however it dies; so on one host nothing is
ever stale. The file says who has it. Where a file system does not pass `flock` on between hosts, and on an object
store, the owner is alive as long as it touches the file, which needs no free space. Ages are differences of two times
of the same file system: clocks of hosts do not matter.
"""

import contextlib
import fcntl
import os
import platform
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import IO

import msgspec
from etils import epath

from sft_jax.data.stored_files import is_url
from sft_jax.datatypes import StorageError

BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0


class Owner(msgspec.Struct, frozen=True):
    """`host_id` is of this start of the host: a number of a process means nothing after another start."""

    host: str
    host_id: str
    pid: int
    started: str
    key: str
    """Of this very lock."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.started}"


class RunLock:
    """Held from construction until `release`, or until the process dies.

    Raises:
      StorageError: another process trains in this directory, or the lock cannot be written.
    """

    def __init__(self, run_dir: epath.Path) -> None:
        self.path = run_dir / "lock"
        self._owner = Owner(
            socket.gethostname(), _host_id(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"), uuid.uuid4().hex
        )
        self._stream: IO[bytes] | None = None
        self._stopped = threading.Event()
        self._lost = ""
        try:
            if is_url(str(self.path)):
                self._wait_until_stale()
                self._write()
            else:
                self._lock_file()
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be locked: {error}. Is the disk there, and writable?") from error
        self._beating = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._beating.start()

    def check(self) -> None:
        """Raises StorageError where another process has taken the lock, because this one did not beat for too long."""
        if self._lost:
            raise StorageError(
                f"{self.path}: {self._lost} has taken this run over, because this process was silent for "
                f"{STALE_SECONDS:.0f} s. It stops, so that they do not both write."
            )

    def release(self) -> None:
        self._stopped.set()
        self._beating.join()
        if not self._lost:
            with contextlib.suppress(OSError):  # a lock that nobody touches is as good as none
                self.path.unlink(missing_ok=True)
        if self._stream is not None:
            self._stream.close()

    def _lock_file(self) -> None:
        """Until the file that is locked is the one that has the name: the last owner removes it as it goes."""
        while True:
            stream = open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")  # noqa: SIM115
            try:
                self._take(stream)
                if _is_same_file(stream, self.path):
                    self._stream = stream
                    self._write()
                    return
            except BaseException:
                stream.close()
                raise
            stream.close()

    def _take(self, stream: IO[bytes]) -> None:
        try:
            _lock_now(stream)
        except BlockingIOError:
            raise self._refused(read_owner(self.path)) from None
        except OSError:  # a file system without locks
            self._wait_until_stale()
            return
        owner = read_owner(self.path)
        if owner is not None and owner.host_id != self._owner.host_id:  # whose lock this kernel may not know of
            self._wait_until_stale()

    def _wait_until_stale(self) -> None:
        """Raises StorageError where the owner, if there is one, shows a sign of life."""
        owner, first = read_owner(self.path), _modified(self.path)
        if owner is None:
            return
        while _now(self.path) - first < STALE_SECONDS:
            time.sleep(1.0)
            if _modified(self.path) != first:
                raise self._refused(owner)

    def _refused(self, owner: Owner | None) -> StorageError:
        return StorageError(
            f"config.run.dir: {self.path.parent} is being trained in by {owner or 'another process'}. Stop it, or name "
            "another config.run.dir."
        )

    def _write(self) -> None:
        data = msgspec.json.encode(self._owner)
        if self._stream is None:
            self.path.write_bytes(data)
            return
        self._stream.seek(0)
        self._stream.write(data)
        self._stream.truncate()
        self._stream.flush()

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            owner = read_owner(self.path)
            if owner is not None and owner.key != self._owner.key:
                self._lost = str(owner)
                return
            with contextlib.suppress(OSError):  # one beat of six
                if self._stream is None:
                    self._write()
                else:
                    os.utime(self._stream.fileno())


def read_owner(path: epath.Path) -> Owner | None:
    """Who has the lock, as far as the file says; None: it says nothing."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Owner)
    except (OSError, msgspec.DecodeError):
        return None


def find_owner(run_dir: epath.Path) -> Owner | None:
    """Who trains in a run's directory now; None: nobody, whatever a dead process has left."""
    path = run_dir / "lock"
    owner = read_owner(path)
    if owner is None:
        return None
    if is_url(str(path)) or owner.host_id != _host_id():  # by this host's clock: looking on writes nothing
        return owner if time.time() - _modified(path) < STALE_SECONDS else None
    with open(path, "rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return owner
    return None


def _lock_now(stream: IO[bytes]) -> None:
    """Raises BlockingIOError where another process has the lock for longer than `find_owner` does."""
    for _ in range(4):
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.1)
    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_same_file(stream: IO[bytes], path: epath.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _modified(path: epath.Path) -> float:
    return path.stat().mtime if is_url(str(path)) else os.stat(path).st_mtime


def _now(path: epath.Path) -> float:
    """The file system's own time."""
    probe = path.with_name(f"lock.{uuid.uuid4().hex}")
    probe.write_bytes(b"")
    try:
        return _modified(probe)
    finally:
        probe.unlink()


def _host_id() -> str:
    """Of this start of this host."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else platform.node()
