"""The watcher and the main thread; whole runs that are told to stop are in tests/faults."""

import os
import signal
import threading

import pytest

from sft_jax.training import stop_signal
from sft_jax.training.stop_signal import Interrupted, StopSignal


def test_a_stop_that_came_just_before_the_wait_that_it_should_end_is_told_again(monkeypatch):
    sent, send = list[int](), signal.pthread_kill

    def lose_the_first(thread: int, number: int) -> None:
        sent.append(number)
        if len(sent) > 1:
            send(thread, number)

    monkeypatch.setattr(signal, "pthread_kill", lose_the_first)
    monkeypatch.setattr(stop_signal, "_POLL_SECONDS", 0.05)

    def wait() -> None:
        with stop.waiting():
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(60)

    with StopSignal() as stop:
        stop.begin_training()
        with pytest.raises(Interrupted):
            wait()
