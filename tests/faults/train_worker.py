"""Runs of training with faults: for each line of stdin a process of its own trains, and stdout says how it ended.

The processes are forked when all is imported and before jax has a backend, so that a trial does not wait for imports.
A line has the arguments of `python -m sft_jax.main`, and the faults by name (faults.py).
"""

import json
import os
import sys
import time

import faults
import jax

from sft_jax.command_line import run_command
from sft_jax.main import main
from sft_jax.processes import coordinator

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def train(trial: dict) -> int:
    out = os.open(trial["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.setpgid(0, 0)
    os.environ.update(trial["env"])
    os.environ[faults.VARIABLE] = json.dumps(trial["faults"])
    faults.arm()
    status = run_command(main, trial["args"])
    if coordinator() is not None:  # what a process does at its end, which this one leaves out
        jax.distributed.shutdown()
    return status


def serve() -> None:
    for line in sys.stdin:
        trial = json.loads(line)
        if (child := os.fork()) == 0:
            status = 1
            try:
                status = train(trial)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        print(json.dumps({"pid": child}), flush=True)
        _, status = os.waitpid(child, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status), "ended": time.time()}), flush=True)


if __name__ == "__main__":
    serve()
