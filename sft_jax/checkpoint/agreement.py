"""What process 0 finds out, every process knows: values and errors, named and with a time limit.

By the coordinator's key-value store and not by collectives: a process that does not come is named, and nobody waits
longer than the limit.
"""

import itertools
import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import msgspec
import numpy as np
from jax.experimental import multihost_utils

from sft_jax import datatypes
from sft_jax.datatypes import SftError, StorageError
from sft_jax.processes import coordinator

TIMEOUT_SECONDS = 600.0
_Result = TypeVar("_Result")
_numbers = itertools.count()


def decide(what: str, decision: Callable[[], _Result]) -> _Result:
    """`decision()` as process 0 finds it, which must be JSON. Every process must call this, in the same order.

    Args:
      what: for the error of a process that waits in vain.

    Raises:
      SftError: process 0 has raised it.
      StorageError: process 0 has not decided within TIMEOUT_SECONDS.
    """
    if jax.process_count() == 1:
        return decision()
    key = f"sft_jax/decide/{next(_numbers)}"
    if jax.process_index():
        said = msgspec.json.decode(_get(key, 0, what))
        if "error" in said:
            raise getattr(datatypes, said["error"])(said["message"])
        return said["result"]
    try:
        result = decision()
    except SftError as error:
        _set(key, {"error": type(error).__name__, "message": str(error)})
        raise
    except Exception as error:
        _set(key, {"error": "StorageError", "message": f"process 0: {what}: {type(error).__name__}: {error}"})
        raise
    _set(key, {"result": result})
    return result


def gather(what: str, value: Any) -> list[Any]:
    """Each process's value, in process 0; an empty list elsewhere. Values must be JSON.

    Raises:
      StorageError: a process has not given its value within TIMEOUT_SECONDS.
    """
    if jax.process_count() == 1:
        return [value]
    key = f"sft_jax/gather/{next(_numbers)}"
    if jax.process_index():
        _set(f"{key}/{jax.process_index()}", value)
        return []
    others = range(1, jax.process_count())
    return [value, *(msgspec.json.decode(_get(f"{key}/{index}", index, what)) for index in others)]


def meet(what: str) -> None:
    """Go on when every process is here.

    Raises:
      StorageError: on all that are, naming one that has not come within TIMEOUT_SECONDS.
    """
    if jax.process_count() == 1:
        return
    try:
        coordinator().wait_at_barrier(f"sft_jax/meet/{next(_numbers)}", int(TIMEOUT_SECONDS * 1000))
    except jax.errors.JaxRuntimeError as error:
        named = re.search(r"timed out task names:\s*(\S+)", str(error))
        raise StorageError(
            f"process {jax.process_index()}: process {named[1] if named else 'unknown'} did not come to {what} within "
            f"{TIMEOUT_SECONDS:.0f} s ({str(error).splitlines()[0]}). Is it alive? Start the run again."
        ) from error


def gather_array(what: str, values: Any) -> np.ndarray:
    """A global array on the host of every process. Who is not there is named before the collective, which names nobody.
    Raises as `meet` does."""
    meet(what)
    return multihost_utils.process_allgather(values, tiled=True)


def _set(key: str, value: Any) -> None:
    coordinator().key_value_set(key, msgspec.json.encode(value).decode())


def _get(key: str, owner: int, what: str) -> str:
    try:
        return coordinator().blocking_key_value_get(key, int(TIMEOUT_SECONDS * 1000))
    except jax.errors.JaxRuntimeError as error:
        raise StorageError(
            f"process {jax.process_index()}: process {owner} has not said {what} within {TIMEOUT_SECONDS:.0f} s "
            f"({str(error).splitlines()[0]}). Is it alive, and does it see the run directory? Start the run again."
        ) from error
