import pytest

from sft_jax.testbed.make import make_testbed


@pytest.fixture(scope="session")
def testbed(tmp_path_factory):
    """The folder that `python -m sft_jax.testbed.make` writes."""
    folder = tmp_path_factory.mktemp("testbed")
    make_testbed(folder)
    return folder
