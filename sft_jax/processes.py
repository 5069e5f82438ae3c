"""The other processes of this run: found by jax on Cloud TPU, GKE and Slurm, or named in the environment; and whether
they live."""

import collections
import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
from jax._src import distributed  # no public name gives the client; tested with two processes

from sft_jax.datatypes import ConfigError, MachineError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
BIND_ADDRESS = "JAX_COORDINATOR_BIND_ADDRESS"
BEAT_SECONDS, MISSED_BEATS = 5.0, 5
"""A process of which so many beats are missed is dead, and all others end, within 30 s, and name it."""
JAX_HEARTBEAT_SECONDS = 60
"""jax's own, which ends them without a word of ours: only where process 0 cannot say it."""
LEAVE_SECONDS = 20.0
_GO_SECONDS = 1.0
"""From saying that one goes to being gone."""
_BEAT, _DEAD = "sft_jax/beat", "sft_jax/dead"


def join_processes() -> None:
    """Before anything else of jax: a backend that is there already knows of this process only.

    Where jax knows the cluster, nothing need be set. Elsewhere (`launch/local.py`, plain machines) each process has
    host:port of process 0, how many there are, and which it is, from 0:

        JAX_COORDINATOR_ADDRESS=10.0.0.1:8476 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=1

    Process 0 listens on that address alone; where it must listen on another, JAX_COORDINATOR_BIND_ADDRESS names it.

    Raises:
      ConfigError: neither, or only some of the three.
    """
    # SIGTERM is ours to agree on (training/stop_signal.py): jax's service can only answer once steps are under way.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        named: dict[str, Any] = {}
        if COUNT in os.environ or INDEX in os.environ:
            address = os.environ[ADDRESS]
            named = dict(
                coordinator_address=address,
                num_processes=int(os.environ[COUNT]),
                process_id=int(os.environ[INDEX]),
                coordinator_bind_address=os.environ.get(BIND_ADDRESS, address),
            )
        jax.distributed.initialize(**named, heartbeat_timeout_seconds=JAX_HEARTBEAT_SECONDS)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"config.run.distributed: the other processes are not known ({type(error).__name__}: {error}). Leave it "
            f"false for one process, start by a script of launch/, or give each process {ADDRESS}, {COUNT} and {INDEX}."
        ) from error
    threading.Thread(target=_beat, name="heartbeat", daemon=True).start()


def _beat() -> None:
    """Say that this process lives, and look who does not: process 0 at all, the others at process 0. Silence is counted
    in beats and not by the clock: a machine that was suspended as a whole has not lost anybody."""
    client, (index, count) = coordinator(), process_place()
    seen, missed = dict[str, str](), collections.Counter[int]()
    heard = ""  # of process 0

    def listen() -> None:
        """By a thread of its own: where process 0 is stopped, what asks it anything does not come back."""
        last, silent = "", 0
        while silent < MISSED_BEATS:
            time.sleep(BEAT_SECONDS)
            silent = silent + 1 if heard == last else 0
            last = heard
        _end([0])

    if index:
        threading.Thread(target=listen, name="listen", daemon=True).start()
    for number in itertools.count():
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # there is no such key, or no process 0, as jax will say
            client.key_value_set(f"{_BEAT}/{index}", str(number), allow_overwrite=True)
            if index == 0:
                now = {key.rpartition("/")[2]: value for key, value in client.key_value_dir_get(_BEAT)}
                for other in range(1, count):
                    silent = now.get(str(other)) == seen.get(str(other))
                    missed[other] = missed[other] + 1 if silent else 0
                seen = now
                if dead := [other for other, beats in missed.items() if beats >= MISSED_BEATS]:
                    client.key_value_set(_DEAD, ", ".join(map(str, dead)))
            heard = client.key_value_try_get(f"{_BEAT}/0")
            dead = [int(other) for other in client.key_value_try_get(_DEAD).split(",")]
            if index not in dead:
                _end(dead)
        time.sleep(BEAT_SECONDS)


def _end(dead: list[int]) -> NoReturn:
    which = ", ".join(f"process {index}" for index in dead)
    print(
        f"error: {which} has been silent for {BEAT_SECONDS * MISSED_BEATS:.0f} s: dead, stopped or cut off. The last "
        "checkpoint is kept: run the same command to go on.",
        file=sys.stderr,
    )
    leave(MachineError.exit_code, dead)


def wait_for_verdict() -> None:
    """After an error of jax's that a dead process may be the cause of: returns if none is found to be dead."""
    if coordinator() is not None:
        time.sleep(BEAT_SECONDS * (MISSED_BEATS + 2))


def coordinator() -> Any:
    """Jax's client of process 0's key-value store; None in a run of one process."""
    return distributed.global_state.client


def process_place() -> tuple[int, int]:
    """(index, count) as far as is known yet, without starting a backend, which would wait for the other processes."""
    state = distributed.global_state
    return state.process_id, state.num_processes or 1


def leave(status: int, dead: Sequence[int] = ()) -> NoReturn:
    """End this process at once, without jax's barrier, at which a process that is stuck would keep all others. Process
    0, whose end is the end of all that are still there, goes last, or after LEAVE_SECONDS."""
    client, (index, count) = coordinator(), process_place()
    if client is not None and 0 not in dead:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # it is gone: nobody waits
            if index:
                client.key_value_set(f"sft_jax/left/{index}", "")
            else:
                end = time.monotonic() + LEAVE_SECONDS
                for other in set(range(1, count)) - {*dead}:
                    milliseconds = int(1000 * max(0.1, end - time.monotonic()))
                    client.blocking_key_value_get(f"sft_jax/left/{other}", milliseconds)
                time.sleep(_GO_SECONDS)
    with contextlib.suppress(OSError, ValueError):  # a pipe that nobody reads
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
