"""A pod on one machine: N processes with M fake CPU devices each, on the same path through the program as on TPU hosts.

    python launch/local.py --processes=2 --devices=4 --config=configs/demo.py --config.run.dir=runs/two

Hardware: any machine. Cost to try: a minute of its CPU. Stop: Ctrl-C, or SIGTERM to this process, which all of them get
and save; the same command goes on. What each process says comes with its number in front. Where one fails, the others
are ended, and its status is the status; 75 is "stopped and saved".
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO

from sft_jax.datatypes import PREEMPTED_EXIT_CODE


@contextmanager
def reserved_port() -> Iterator[int]:
    """A free port of 127.0.0.1 that stays ours: bound here and never listened on, so that no other program is given it
    while the coordinator, which shares ports as gRPC does, listens on it."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def process_env(index: int, num_processes: int, num_devices: int, port: int) -> dict[str, str]:
    """What a process has in its environment more than this one."""
    address = f"127.0.0.1:{port}"
    device_count = f"--xla_force_host_platform_device_count={num_devices}"
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {device_count}".strip(),
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_COORDINATOR_BIND_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(num_processes),
        "JAX_PROCESS_ID": str(index),
    }


class LocalProcesses:
    """Processes that begin and end together."""

    def __init__(self, command: Sequence[str], envs: Sequence[Mapping[str, str]]) -> None:
        self._lock = threading.Lock()
        # Each in a group of its own: Ctrl-C is for this process, which asks them to save.
        self._processes = [
            subprocess.Popen(
                command,
                env=os.environ | env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                process_group=0,
            )
            for env in envs
        ]
        self._pumps = [
            threading.Thread(target=self._pump, args=(index, source, target))
            for index, process in enumerate(self._processes)
            for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
        ]
        for pump in self._pumps:
            pump.start()

    def _pump(self, index: int, source: IO[str], target: IO[str]) -> None:
        with source:
            for line in source:
                with self._lock:
                    print(f"[{index}] {line.rstrip()}", file=target, flush=True)

    def _signal(self, number: int) -> None:
        for process in self._processes:
            process.send_signal(number)  # nothing to one that has ended

    def wait(self, stop: threading.Event, grace_seconds: float) -> int:
        """The worst status of those that ended of themselves. `stop`, whenever it is set, is passed on as SIGTERM. From
        the first that fails the others have `grace_seconds` to end: they would wait for the one that is gone."""
        worst, deadline, ending = 0, float("inf"), False
        while True:
            running = [process for process in self._processes if process.poll() is None]
            if not ending:
                worst = worst_status([p.returncode for p in self._processes if p.returncode is not None])
            if not running:
                break
            if worst and deadline == float("inf"):
                deadline = time.monotonic() + grace_seconds
                if worst != PREEMPTED_EXIT_CODE:  # else they were all told to stop, and are saving
                    ending = True
                    self._signal(signal.SIGTERM)
            if time.monotonic() > deadline:
                ending = True
                self._signal(signal.SIGKILL)
            if stop.is_set():
                stop.clear()
                self._signal(signal.SIGTERM)
            time.sleep(0.05)
        for pump in self._pumps:
            pump.join()
        return worst


def worst_status(returncodes: Sequence[int]) -> int:
    """A failure before 75, and 75 before 0; a death by a signal as a shell gives it."""
    statuses = [128 - code if code < 0 else code for code in returncodes]
    failures = [status for status in statuses if status not in (0, PREEMPTED_EXIT_CODE)]
    return max(failures or statuses, default=0)


def main(args: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "python launch/local.py",
        description="Train in several processes on this machine's CPU. Other arguments go to sft_jax.main.",
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=4, help="fake CPU devices of each process")
    parser.add_argument(
        "--grace-seconds", type=float, default=30, help="from the first failure to SIGKILL for the rest"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    options, rest = parser.parse_known_args(args)
    if min(options.processes, options.devices) < 1:
        parser.error(f"--processes={options.processes} --devices={options.devices}: at least one of each.")
    command = [sys.executable, "-m", "sft_jax.main", *rest, "--config.run.distributed=true"]
    with reserved_port() as port:
        envs = [process_env(i, options.processes, options.devices, port) for i in range(options.processes)]
        if options.dry_run:
            for env in envs:
                print(shlex.join(["env", *(f"{name}={value}" for name, value in env.items()), *command]))
            return 0
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: stop.set())
        return LocalProcesses(command, envs).wait(stop, options.grace_seconds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
