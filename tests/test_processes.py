"""A run whose other processes cannot be found says so before it does anything; one that dies is named by the others."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from sft_jax.datatypes import ConfigError
from sft_jax.processes import join_processes


@pytest.mark.parametrize(
    "env",
    [
        {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
        {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_PROCESS_ID": "0"},
        {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
    ],
)
def test_some_of_the_three_are_not_enough(monkeypatch, env):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"^config\.run\.distributed: the other processes are not known"):
        join_processes()


_BEATS = """
import os, sys, time
from sft_jax import processes
processes.BEAT_SECONDS = 0.3
processes.join_processes()
print("joined", flush=True)
time.sleep(120)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_silent_is_named_by_the_others(number):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    named = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "3", "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _BEATS],
            env=os.environ | named | {"JAX_PROCESS_ID": str(index), "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(3)
    ]
    for process in processes:
        assert process.stdout.readline() == "joined\n"
    processes[2].send_signal(number)
    for process in processes[:2]:
        _, err = process.communicate(timeout=100)
        assert process.returncode == 6, err
        assert "error: process 2 has been silent" in err
    processes[2].kill()
    processes[2].communicate()
