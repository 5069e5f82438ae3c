"""The other processes of this run: found by jax on Cloud TPU, GKE and Slurm, or named in the environment."""

import os

import jax

from sft_jax.datatypes import ConfigError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def join_processes() -> None:
    """Before anything else of jax: a backend that is there already knows of this process only.

    Where jax knows the cluster, nothing need be set. Elsewhere (`launch/local.py`, plain machines) each process has
    host:port of process 0, how many there are, and which it is, from 0:

        JAX_COORDINATOR_ADDRESS=10.0.0.1:8476 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=1

    Raises:
      ConfigError: neither, or only some of the three.
    """
    try:
        if COUNT in os.environ or INDEX in os.environ:
            jax.distributed.initialize(os.environ[ADDRESS], int(os.environ[COUNT]), int(os.environ[INDEX]))
        else:
            jax.distributed.initialize()
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"config.run.distributed: the other processes are not known ({type(error).__name__}: {error}). Leave it "
            f"false for one process, start by a script of launch/, or give each process {ADDRESS}, {COUNT} and {INDEX}."
        ) from error
