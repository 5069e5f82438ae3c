"""Eight fake CPU devices, strict jax, shapes checked at run time. Runs before any test imports jax."""

import os
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Tests compile more than they compute: a quarter of the compile time for slower code.
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
)

import hypothesis
import jax
from jaxtyping import install_import_hook

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no error
hypothesis.settings.load_profile("untimed")
jax.config.update("jax_numpy_rank_promotion", "raise")
install_import_hook("sft_jax", "beartype.beartype")


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real models, tokenizers and data sets."""
    folder = os.environ.get("SFT_JAX_ASSETS")
    if not folder:
        pytest.skip("SFT_JAX_ASSETS is not set: the real assets are not here")
    return Path(folder)
