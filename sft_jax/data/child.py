"""A child process that ends when its pipe does, and not by the signals that ask our own process to stop."""

import signal
import subprocess
from collections.abc import Sequence
from typing import Any

_STOPS = {signal.SIGINT, signal.SIGTERM}


def start_child(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """`Popen` with pipes for stdin and stdout. The signals are blocked from its first instruction on: what is sent to
    all processes of a group or of a job would else end it before it could ignore them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
