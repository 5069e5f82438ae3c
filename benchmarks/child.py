"""Run one measured part of a benchmark in a process of its own, on given cores: what it printed, and its memory."""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path


def run_child(command: list[str], cores: Iterable[int], env: dict[str, str] | None = None) -> dict:
    """The JSON object on the last line that the command prints, with `peak_mib`: the most memory that it and its
    children held together, sampled, or its own peak as the kernel has it, if that is more."""
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            command,
            env=os.environ | (env or {}),
            stdout=out,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        sampled = 0.0
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            sampled = max(sampled, sum(map(_memory_mib, _family(process.pid))))
            time.sleep(0.5)  # a look takes ten milliseconds, of the cores that are measured
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{text[-3000:]}")
    last = next(line for line in reversed(text.splitlines()) if line.startswith("{"))
    return json.loads(last) | {"peak_mib": max(sampled, usage.ru_maxrss / 1024)}


def _family(pid: int) -> list[int]:
    """A process and all its descendants that live."""
    family = [pid]
    for parent in family:
        for file in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                family += map(int, file.read_text().split())
            except OSError:  # it has ended meanwhile
                continue
    return family


def _memory_mib(pid: int) -> float:
    """Resident memory; what processes share is divided among them."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:  # it has ended meanwhile
        return 0.0
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) / 1024
