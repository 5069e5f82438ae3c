"""Rows split over the `context` axis against the reference on one device: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_splash import assert_same, make_inputs, pack_rows, run

from sft_jax.config_schema import MeshConfig
from sft_jax.datatypes import ConfigError
from sft_jax.model.attention import Scores, attend
from sft_jax.sharding import build_mesh


def make_mesh(**axes):
    sizes = {"fsdp": 1} | axes
    return build_mesh(MeshConfig(**sizes), jax.devices()[: int(np.prod([*sizes.values()]))])


@pytest.mark.parametrize(
    ("axes", "lengths", "softcap"),
    [
        ({"context": 2}, ([300, 200], [512]), None),  # segments that cross the borders of shares and of chunks
        ({"context": 4}, ([900, 100], [130, 700, 1, 100]), None),
        ({"context": 3}, ([700], [400, 368]), 3.0),
        ({"context": 2, "fsdp": 2, "tensor": 2}, ([500], [100, 312]), None),
    ],
)
def test_it_gives_the_references_values_and_gradients(axes, lengths, softcap):
    length = 256 * axes["context"]
    inputs, rows, scores = make_inputs(length=length), pack_rows(*lengths, length=length), Scores(0.125, None, softcap)
    found = run("splash", inputs, rows, scores, mesh=make_mesh(**axes))
    assert_same(found, run("reference", inputs, rows, scores))


def test_padding_gives_zeros_and_takes_no_gradient():
    inputs, rows = make_inputs(1, length=512), pack_rows([100], length=512)
    out, (grads, _) = run("splash", inputs, rows, Scores(0.125), mesh=make_mesh(context=2))
    for array in (out, *grads):
        assert np.isfinite(array).all()
        assert np.abs(array[:, :100]).max() > 0
        assert np.array_equal(array[:, 100:], np.zeros_like(array[:, 100:]))


@pytest.mark.parametrize(
    ("length", "options", "message"),
    [
        (512, {"scores": Scores(0.125, window=100)}, "config.mesh.context: is 2, and this model has windows"),
        (512, {"sinks": jnp.zeros(4)}, "config.mesh.context: is 2, and this model has attention sinks"),
        (640, {}, "config.data.max_seq_len: is 640; .* needs a multiple of 512. Set 1024"),
    ],
)
def test_what_it_cannot_do_is_refused(length, options, message):
    options = {"scores": Scores(0.125)} | options
    with pytest.raises(ConfigError, match=message):
        attend(
            "splash",
            *make_inputs(1, length=length),
            pack_rows([100], length=length),
            mesh=make_mesh(context=2),
            **options,
        )
