"""A disk or an object store that may refuse: what may pass is tried again, and what may not is an error at once."""

import errno
import os
import re
import shutil
import time
from collections.abc import Callable
from typing import TypeVar

from etils import epath

from sft_jax.data.stored_files import is_url
from sft_jax.datatypes import StorageError

NUM_RETRIES = 3
_TRANSIENT = {
    errno.EIO, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ETIMEDOUT, errno.ESTALE, errno.ECONNRESET,
    errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EPIPE, errno.EREMOTEIO,
}  # fmt: skip
# tensorstore's errors are ValueErrors: an absl status in front, and of a local file the errno in the text.
_OS_ERROR = re.compile(r"os_error_code='(?P<number>\d+)'")
_SPEC = re.compile(r" \[tensorstore_spec='.*?'\](?= \[|$)", re.DOTALL)
_TRANSIENT_STATUS = re.compile(r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED)\b")
_Result = TypeVar("_Result")


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: not where the disk is full, read-only or over its quota."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _TRANSIENT
    if found := _OS_ERROR.search(str(error)):
        return int(found["number"]) in _TRANSIENT
    return _TRANSIENT_STATUS.search(str(error)) is not None


def describe_error(error: BaseException) -> str:
    """In one line, without what tensorstore adds for its own developers."""
    return " ".join(_SPEC.sub("", str(error)).split())


def backoff_seconds(num_failures: int) -> float:
    """1, 2, 4 after the first failures in a row."""
    return 2.0 ** (num_failures - 1)


def retried(operation: Callable[[], _Result]) -> _Result:
    """The result of an operation that may be repeated whole, after up to NUM_RETRIES transient errors."""
    for num_failures in range(1, NUM_RETRIES + 1):
        try:
            return operation()
        except OSError as error:
            if not is_transient(error):
                raise
            time.sleep(backoff_seconds(num_failures))
    return operation()


def write_whole(path: epath.Path, data: bytes) -> None:
    """The file appears with all of its content, or not at all. Raises OSError where the disk refuses."""

    def write() -> None:
        if is_url(str(path)):  # an object store shows no half of an object
            path.write_bytes(data)
            return
        partial = path.with_name(f"{path.name}.partial")
        with open(partial, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)

    retried(write)


def remove(path: epath.Path) -> None:
    """Remove a file or a folder that may be there, whole or in part. A link is removed, not what it leads to."""

    def remove_once() -> None:
        if os.path.islink(path) or (path.exists() and not path.is_dir()):
            path.unlink(missing_ok=True)
        elif path.exists():
            path.rmtree(missing_ok=True)

    retried(remove_once)


def check_free_space(run_dir: epath.Path, checkpoint_bytes: int, num_more: int) -> None:
    """
    Args:
      checkpoint_bytes: an upper bound of one checkpoint.
      num_more: how many there will be at one time, beyond those that are there.

    Raises:
      StorageError: they do not fit.
    """
    if is_url(str(run_dir)):
        return
    free, needed = shutil.disk_usage(run_dir).free, checkpoint_bytes * num_more
    if needed > free:
        raise StorageError(
            f"config.run.dir: {run_dir} has {free:,} bytes free, and {num_more} more checkpoints of up to "
            f"{checkpoint_bytes:,} need {needed:,} (those kept, and one that is being written). Free some space, lower "
            "config.checkpoint.keep_latest, or name another disk."
        )
