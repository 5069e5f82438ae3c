"""A program run by two processes of four fake devices each, joined by jax.distributed on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_two_processes(program: str, folder: Path, modules: Path) -> list[str]:
    """What each process printed.

    Args:
      program: Python; its arguments are the coordinator's address, the process' number and `folder`.
      modules: a folder that it imports from besides.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, address, str(number), str(folder)],
            env=os.environ | flags | {"PYTHONPATH": os.pathsep.join([str(modules), *sys.path])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    results = [process.communicate(timeout=300) for process in processes]
    for process, (_, err) in zip(processes, results, strict=True):
        assert process.returncode == 0, err[-3000:]
    return [out for out, _ in results]
