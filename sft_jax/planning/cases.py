"""Arguments of `sft-jax plan` -> its plan, made in a child process: the compiler's memory is given back, and a child
that ends badly is a row of a table."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

_LONGEST = 300  # characters of a problem


class Case(NamedTuple):
    """What was planned: as a reader would name it, and as arguments of `sft-jax plan`."""

    label: str
    args: tuple[str, ...]


class Outcome(NamedTuple):
    """`plan` is what `--json` prints; None where there is none, and then `problem` says why."""

    case: Case
    plan: dict[str, Any] | None
    problem: str = ""

    @property
    def fits(self) -> bool:
        return self.plan is not None and self.plan["fits"]

    @property
    def step_seconds(self) -> float:
        return float(self.plan["step_seconds"]) if self.plan is not None and self.fits else float("inf")

    def to_json(self) -> dict[str, Any]:
        return {"case": self.case.label, "args": list(self.case.args), "plan": self.plan, "problem": self.problem}


Run = Callable[[Case], Outcome]


def run_case(case: Case) -> Outcome:
    command = [sys.executable, "-m", "sft_jax.cli.plan", "--json", *case.args]
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode in (0, 1) and child.stdout.startswith("{"):
        return Outcome(case, json.loads(child.stdout))
    return Outcome(case, None, _problem(child.returncode, child.stderr))


def _problem(status: int, stderr: str) -> str:
    if status < 0:
        name = signal.Signals(-status).name
        reason = ", as the system does where memory ends" if name == "SIGKILL" else ""
        return f"the compiler was ended by {name}{reason}"
    lines = [line for line in stderr.splitlines() if line.strip()]
    said = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), "")
    return (said or (lines[-1] if lines else f"exit status {status}"))[:_LONGEST]
