"""Foreign Jinja -> texts, from a process of its own (`jinja_program.py`) that is limited in time, memory and output.

The process starts at the first call, and anew after one that broke a limit. It is killed when the template is let go,
and ends when its parent does. After a fork the child starts one of its own. Nothing of the template is evaluated here,
not even at compiling, when Jinja folds constants such as `9 ** (9 ** 9)`.
"""

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sft_jax.data.child import start_child
from sft_jax.data.jinja_program import LENGTH_BYTES

_PROGRAM = str(Path(__file__).with_name("jinja_program.py"))
_START_SECONDS = 60.0
_CHUNK_BYTES = 1 << 16


class Limits(NamedTuple):
    """Of one rendering; compiling has the same."""

    cpu_seconds: float = 2.0
    wall_seconds: float = 20.0  # generous: on a loaded machine a quick rendering may wait for a core
    memory_bytes: int = 1 << 30  # beyond what the process has at its start
    output_chars: int = 1 << 24


DEFAULT_LIMITS = Limits()


class CompileError(Exception):
    """The template cannot be compiled. `line` counts from 1; None where it is not known."""

    def __init__(self, message: str, line: int | None = None):
        super().__init__(message)
        self.line = line


class RenderError(Exception):
    """The template refused, or failed."""


class LimitError(Exception):
    """The template broke a limit; the message goes on from its name."""


class SandboxedProgram:
    """A template in a process of its own; the same calls as `JinjaProgram`."""

    def __init__(self, text: str, limits: Limits = DEFAULT_LIMITS):
        self._text = text
        self._limits = limits
        self._process: _Process | None = None
        self._reads: set[str] = set()
        self._lock = threading.Lock()

    def variables_read(self) -> set[str]:
        """As `JinjaProgram.variables_read`.

        Raises:
          CompileError: the template cannot be compiled, or not within the limits.
        """
        with self._lock:
            self._open()
            return self._reads

    def render_each(
        self,
        variables: Mapping[str, Any],
        messages: Sequence[Mapping[str, Any]],
        requests: Sequence[tuple[Sequence[int], bool]],
    ) -> tuple[list[str], bool]:
        """As `JinjaProgram.render_each`, in one round trip.

        Raises:
          RenderError: the template refuses the messages.
          LimitError: it breaks a limit.
          CompileError: as `variables_read`.
        """
        numbered = [(list(numbers), add_generation_prompt) for numbers, add_generation_prompt in requests]
        frame = {"variables": variables, "messages": messages, "requests": numbered}
        with self._lock:
            process = self._open()
            answer = self._ask(process, frame, self._limits.wall_seconds * max(1, len(requests)))
        if "error" in answer:
            raise RenderError(answer["error"])
        return answer["texts"], answer["clock"]

    def close(self) -> None:
        """End the process; the next call starts another."""
        if self._process:
            self._process.stop()
        self._process = None

    def _open(self) -> "_Process":
        if self._process and self._process.owner != os.getpid():
            self.close()  # forked: the process answers our parent
        if not self._process:
            self._process = _Process()
            first = {"text": self._text, **self._limits._asdict()}
            try:
                answer = self._ask(self._process, first, _START_SECONDS)
            except LimitError as error:
                raise CompileError(f"{error}, to be compiled") from error
            if "error" in answer:
                self.close()
                raise CompileError(answer["error"], answer["line"])
            self._reads = set(answer["reads"])
        return self._process

    def _ask(self, process: "_Process", frame: dict[str, Any], wall_seconds: float) -> dict[str, Any]:
        try:
            answer = process.ask(frame, wall_seconds)
        except BaseException as error:  # Ctrl-C too: an answer that nobody read would be taken for the next one's
            self.close()
            if isinstance(error, TimeoutError):
                raise LimitError(f"has not answered within {wall_seconds:g} s, the limit of time") from None
            if isinstance(error, EOFError):
                raise LimitError(self._why_it_ended(process.status)) from None
            raise
        limit = answer.get("limit")
        if limit == "memory":
            self.close()
            raise LimitError(f"needs more than {self._limits.memory_bytes >> 20} MiB, the limit of memory")
        if limit == "output":
            raise LimitError(f"writes more than {self._limits.output_chars:,} characters, the limit of output")
        return answer

    def _why_it_ended(self, status: int | None) -> str:
        if status == -signal.SIGPROF:
            return f"needs more than {self._limits.cpu_seconds:g} s of a core, the limit of time"
        return f"ended its process (status {status}), so it may need more memory than its limit allows"


class _Process:
    """The running program and its pipes."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        # -P: no module beside the program is found.
        self._popen = start_child([sys.executable, "-P", _PROGRAM], bufsize=0, start_new_session=True)
        stdin, stdout = self._popen.stdin, self._popen.stdout
        assert stdin is not None
        assert stdout is not None
        self._stdin, self._stdout = stdin.fileno(), stdout.fileno()
        os.set_blocking(self._stdin, False)
        self.stop = weakref.finalize(self, _stop, self._popen, self.owner)

    @property
    def status(self) -> int | None:
        """Exit status, or minus the signal, once it has been stopped."""
        return self._popen.returncode

    def ask(self, frame: dict[str, Any], wall_seconds: float) -> dict[str, Any]:
        """One round trip.

        Raises:
          TimeoutError, EOFError: there is no answer in time; the process has ended.
        """
        deadline = time.monotonic() + wall_seconds
        content = json.dumps(frame).encode()
        self._write(len(content).to_bytes(LENGTH_BYTES, "little") + content, deadline)
        answer = self._read(b"", LENGTH_BYTES, deadline)
        answer = self._read(answer[LENGTH_BYTES:], int.from_bytes(answer[:LENGTH_BYTES], "little"), deadline)
        return json.loads(answer)

    def _write(self, content: bytes, deadline: float) -> None:
        rest = memoryview(content)
        try:
            while rest:
                _wait(self._stdin, select.POLLOUT, deadline)
                rest = rest[os.write(self._stdin, rest) :]
        except BrokenPipeError as error:
            raise EOFError from error

    def _read(self, have: bytes, num_bytes: int, deadline: float) -> bytes:
        """At least `num_bytes`, the first of which are there."""
        pieces, missing = [have], num_bytes - len(have)
        while missing > 0:
            _wait(self._stdout, select.POLLIN, deadline)
            piece = os.read(self._stdout, _CHUNK_BYTES)
            if not piece:
                raise EOFError
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)


def _wait(descriptor: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


def _stop(popen: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() == owner:
        popen.kill()
        popen.wait()
    else:
        popen.returncode = 0  # our parent's child: it is not for us to wait for
    for pipe in (popen.stdin, popen.stdout):
        if pipe:
            pipe.close()
