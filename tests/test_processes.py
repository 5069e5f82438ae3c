"""A run whose other processes cannot be found says so before it does anything."""

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
