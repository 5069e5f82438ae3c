"""A run whose other processes cannot be found says so before it does anything; one that dies is named by the others."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

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


_FAILS_ALONE = """
import sys, time
from sft_jax import main, processes
from sft_jax.command_line import run_command
from sft_jax.datatypes import StorageError
processes.BEAT_SECONDS = 0.3

def run(config):
    processes.join_processes()
    print("joined", flush=True)
    if processes.process_place()[0] == int(sys.argv[1]):
        time.sleep(2.0)
        raise StorageError("run: is gone. Look.")
    time.sleep(120)

main.run = run
sys.exit(run_command(main.main, ["--config=configs/demo.py"]))
"""


@pytest.fixture
def start():
    """A function: a program and its arguments -> three processes of it, which have joined."""
    started = []

    def start(program, *args):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        named = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "3", "JAX_PLATFORMS": "cpu"}
        started.extend(
            subprocess.Popen(
                [sys.executable, "-c", program, *args],
                env=os.environ | named | {"JAX_PROCESS_ID": str(index), "PYTHONPATH": os.pathsep.join(sys.path)},
                cwd=Path(__file__).parents[1],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(3)
        )
        for process in started:
            assert process.stdout.readline() == "joined\n"
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


def listening(pid):
    """The IPv4 addresses on which a process accepts connections, as /proc/net has them: bytes from last to first."""
    sockets = {os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()}
    lines = [line for name in ("tcp", "tcp6") for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]]
    found = []
    for _, address, _, state, *rest in map(str.split, lines):
        if state == "0A" and f"socket:[{rest[5]}]" in sockets:
            found.append(address.split(":")[0].removeprefix("0000000000000000FFFF0000"))
    return found


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's /proc")
def test_process_0_listens_on_the_given_address_and_nothing_else_does(start):
    loopback = "0100007F"
    assert [listening(process.pid) for process in start(_BEATS)] == [[loopback], [], []]


def test_a_process_that_fails_alone_does_not_wait_for_the_others_which_name_it(start):
    processes = start(_FAILS_ALONE, "2")
    _, err = processes[2].communicate(timeout=100)
    assert (processes[2].returncode, err.count("error: run: is gone. Look.")) == (5, 1), err
    for process in processes[:2]:
        _, err = process.communicate(timeout=100)
        assert process.returncode == 6, err
        assert "error: process 2 has been silent" in err


@pytest.mark.parametrize(("silent", "number"), [(2, signal.SIGKILL), (2, signal.SIGSTOP), (0, signal.SIGSTOP)])
def test_a_process_that_is_silent_is_named_by_the_others(start, silent, number):
    """But process 0 where it is killed: jax, which sees its connection break, is faster, and names nobody."""
    processes = start(_BEATS)
    processes[silent].send_signal(number)
    for process in processes[:silent] + processes[silent + 1 :]:
        _, err = process.communicate(timeout=100)
        assert process.returncode == 6, err
        assert f"error: process {silent} has been silent" in err
