"""The GPU kernel, interpreted, against the reference: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_splash import PACKED, assert_same, make_inputs, pack_rows, run

from sft_jax.config_schema import MeshConfig
from sft_jax.datatypes import ConfigError
from sft_jax.model.attention import Scores, attend
from sft_jax.sharding import build_abstract_mesh, build_mesh

SCORES = Scores(0.125)
TOKENS, KERNEL = "config.data.max_seq_len", "config.model.attention: 'pallas_gpu'"


@pytest.mark.parametrize(
    ("heads", "head_dim", "lengths"),
    [
        ((2, 2), 64, PACKED),  # a segment that crosses the blocks' border, one that fills the row, and padding
        ((4, 2), 128, ([128, 128], [1, 200])),
        ((3, 1), 48, ([256], [5, 5, 5])),
    ],
)
def test_it_gives_the_references_values_and_gradients(heads, head_dim, lengths):
    inputs = make_inputs(num_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim, value_dim=head_dim)
    rows = pack_rows(*lengths)
    assert_same(run("pallas_gpu", inputs, rows, SCORES), run("reference", inputs, rows, SCORES))


def test_padding_gives_zeros_and_takes_no_gradient():
    out, (grads, _) = run("pallas_gpu", make_inputs(1), pack_rows([100]), SCORES)
    for array in (out, *grads):
        assert np.isfinite(array).all()
        assert np.abs(array[:, :100]).max() > 0
        assert np.array_equal(array[:, 100:], np.zeros_like(array[:, 100:]))


def test_a_mesh_changes_nothing():
    inputs, rows = make_inputs(), pack_rows(*PACKED)
    mesh = build_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    assert_same(run("pallas_gpu", inputs, rows, SCORES, mesh=mesh), run("reference", inputs, rows, SCORES))


def test_bfloat16_is_as_near_as_the_references():
    inputs, rows = make_inputs(1), pack_rows([100, 156])
    exact = run("reference", inputs, rows, SCORES)[0]
    narrow = [x.astype(jnp.bfloat16) for x in inputs]
    ours, reference = (run(name, narrow, rows, SCORES)[0] for name in ("pallas_gpu", "reference"))
    assert ours.dtype == jnp.bfloat16
    assert np.linalg.norm(ours - exact) < 1.5 * np.linalg.norm(reference - exact)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ({}, {"scores": Scores(0.125, window=100)}, f"{KERNEL} has no windows"),
        ({}, {"scores": Scores(0.125, softcap=2.0)}, f"{KERNEL} has no soft-caps"),
        ({}, {"sinks": jnp.zeros(4)}, f"{KERNEL} has no attention sinks"),
        ({}, {"kv_rows": pack_rows([100])}, f"{KERNEL} is for packed rows, and these queries read a cache"),
        ({"value_dim": 32}, {}, f"{KERNEL} has heads of one size, .* keys have 64 dims, its values 32"),
        ({"head_dim": 24, "value_dim": 24}, {}, f"{KERNEL} has heads of 16 to 128 .* this model's have 24"),
        ({"head_dim": 256, "value_dim": 256}, {}, f"{KERNEL} has heads of 16 to 128 .* this model's have 256"),
        ({"length": 200}, {}, f"{TOKENS}: is 200; .* needs a multiple of 128. Set 256"),
        (
            {},
            {"mesh": build_abstract_mesh(MeshConfig(fsdp=1, context=2), 2)},
            "config.mesh.context: is 2, and config.model.attention 'pallas_gpu' needs whole rows",
        ),
    ],
)
def test_what_it_cannot_do_is_refused(shape, options, message):
    inputs, options = make_inputs(1, **shape), {"scores": SCORES} | options
    with pytest.raises(ConfigError, match=message):
        attend("pallas_gpu", *inputs, pack_rows([100], length=inputs[0].shape[1]), **options)


def test_other_dtypes_and_platforms_are_refused(monkeypatch):
    inputs, rows = make_inputs(1), pack_rows([100])
    with jax.enable_x64(True), pytest.raises(ConfigError, match="compute_dtype is float64"):
        attend("pallas_gpu", *(x.astype(jnp.float64) for x in inputs), rows, SCORES)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(ConfigError, match="'pallas_gpu' is a GPU kernel, and the devices are tpu"):
        attend("pallas_gpu", *inputs, rows, SCORES)
