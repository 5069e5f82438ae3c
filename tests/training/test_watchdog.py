"""A step that does not end is found, with the place where it is and all stacks; what may take long is left alone."""

import threading
import time

import pytest

from sft_jax.training import watchdog as watchdog_module
from sft_jax.training.watchdog import Watchdog


@pytest.fixture
def left(monkeypatch):
    """Set when the process would have ended; its status."""
    left = threading.Event()
    left.status = None

    def leave(status):
        left.status = status
        left.set()
        watchdog.close()

    monkeypatch.setattr(watchdog_module, "leave", leave)
    watchdog = Watchdog(3.0, 0.2)
    left.watchdog = watchdog
    yield left
    watchdog.close()


def take_steps(watchdog, count):
    for step in range(count):
        with watchdog.at(f"step {step}"):
            time.sleep(0.001)
        watchdog.step_is_over()


def test_a_step_that_does_not_end(left, capfd):
    take_steps(left.watchdog, 10)
    with left.watchdog.at("step 11, reading its batch"):
        assert left.wait(60)
    assert left.status == 6
    err = capfd.readouterr().err
    assert "process 0 has been at step 11, reading its batch for " in err
    assert "test_watchdog.py" in err  # where this thread stands


@pytest.mark.parametrize("case", ["the first steps", "what is not watched", "a step that ends"])
def test_no_false_alarm(left, case):
    if case == "the first steps":
        take_steps(left.watchdog, 2)
        with left.watchdog.at("step 3, compiling"):
            time.sleep(0.8)
    else:
        take_steps(left.watchdog, 10)
        if case == "what is not watched":
            time.sleep(0.8)
        else:
            for _ in range(40):
                with left.watchdog.at("a step"):
                    time.sleep(0.02)
    assert not left.is_set()
