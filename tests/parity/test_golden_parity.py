"""Our step gives torch's loss and gradients for a packed batch, as make_goldens.py stored them.

DESIGN's meaning of equal: a relative difference of 1e-6 for the loss and 1e-5 for gradients.
"""

from pathlib import Path

import pytest
import safetensors.numpy
from packed_step import relative_difference, step_loss_and_grads

from sft_jax.config_schema import MeshConfig

GOLDENS = sorted((Path(__file__).parent / "goldens").iterdir())


@pytest.mark.parametrize("folder", GOLDENS, ids=lambda folder: folder.name)
def test_loss_and_gradients_equal_torch_s(folder: Path) -> None:
    expected = safetensors.numpy.load_file(folder / "expected.safetensors")
    batch = {name.removeprefix("batch."): values for name, values in expected.items() if name.startswith("batch.")}
    grads = {name.removeprefix("grads."): values for name, values in expected.items() if name.startswith("grads.")}
    loss, ours = step_loss_and_grads(folder, batch, MeshConfig(), num_devices=1, grad_accum_steps=2)
    assert loss == pytest.approx(float(expected["loss"]), rel=1e-6)
    assert relative_difference(ours, grads) <= 1e-5
