"""The other processes of this run: found by jax on Cloud TPU, GKE and Slurm, or named in the environment."""

import contextlib
import os
import sys
from typing import Any, NoReturn

import jax
from jax._src import distributed  # no public name gives the client; tested with two processes

from sft_jax.datatypes import ConfigError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
BIND_ADDRESS = "JAX_COORDINATOR_BIND_ADDRESS"
HEARTBEAT_SECONDS = 30
"""A process that is silent for so long is dead, and all others end."""
LEAVE_SECONDS = 20.0


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
        jax.distributed.initialize(**named, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"config.run.distributed: the other processes are not known ({type(error).__name__}: {error}). Leave it "
            f"false for one process, start by a script of launch/, or give each process {ADDRESS}, {COUNT} and {INDEX}."
        ) from error


def coordinator() -> Any:
    """Jax's client of process 0's key-value store; None in a run of one process."""
    return distributed.global_state.client


def process_place() -> tuple[int, int]:
    """(index, count) as far as is known yet, without starting a backend, which would wait for the other processes."""
    state = distributed.global_state
    return state.process_id, state.num_processes or 1


def leave(status: int) -> NoReturn:
    """End this process at once, without jax's barrier, at which a process that is stuck would keep all others. Process
    0, whose end is the end of all that are still there, goes last, or after LEAVE_SECONDS."""
    client, (index, count) = coordinator(), process_place()
    if client is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # it is gone: nobody waits
            if index:
                client.key_value_set(f"sft_jax/left/{index}", "")
            else:
                for other in range(1, count):
                    client.blocking_key_value_get(f"sft_jax/left/{other}", int(LEAVE_SECONDS * 1000))
    with contextlib.suppress(OSError, ValueError):  # a pipe that nobody reads
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
