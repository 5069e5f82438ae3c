"""The TPU kernel, interpreted, against the reference: values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import pack_rows as pack_any_rows

from sft_jax.config_schema import MeshConfig
from sft_jax.datatypes import ConfigError
from sft_jax.model.attention import Scores, attend
from sft_jax.model.splash import choose_blocks
from sft_jax.sharding import build_abstract_mesh, build_mesh

LENGTH = 256
PACKED = ([100, 56, 60], [LENGTH])


def make_inputs(batch=2, length=LENGTH, num_heads=4, num_kv_heads=2, head_dim=64, value_dim=64):
    rng = np.random.default_rng(0)
    shapes = [(num_heads, head_dim), (num_kv_heads, head_dim), (num_kv_heads, value_dim)]
    return [jnp.asarray(rng.normal(size=(batch, length, *shape)), jnp.float32) for shape in shapes]


pack_rows = functools.partial(pack_any_rows, length=LENGTH)


def run(name, inputs, rows, scores, sinks=None, mesh=None):
    """(mixed values, gradients of all inputs under an arbitrary loss that reads padding too)."""

    def loss(inputs, sinks):
        out = attend(name, *inputs, rows, scores, sinks=sinks, mesh=mesh)
        return jnp.sum(jnp.sin(3 * out + 1)), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(inputs, sinks)
    return out, grads


def assert_same(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


@pytest.mark.parametrize(
    ("heads", "options"),
    [
        ((4, 4), {}),
        ((4, 2), {"window": 40}),
        ((3, 1), {"softcap": 2.0}),
        ((4, 2), {"window": 130, "softcap": 5.0}),
    ],
)
def test_it_gives_the_references_values_and_gradients(heads, options):
    inputs, rows, scores = make_inputs(num_heads=heads[0], num_kv_heads=heads[1]), pack_rows(*PACKED), Scores(0.125)
    scores = scores._replace(**options)
    assert_same(run("splash", inputs, rows, scores), run("reference", inputs, rows, scores))


def test_sinks_and_values_of_another_width():
    inputs, rows = make_inputs(head_dim=96, value_dim=64), pack_rows(*PACKED)
    sinks = jnp.array([-1.0, 0.0, 1.0, 4.0])
    assert_same(run("splash", inputs, rows, Scores(0.1), sinks), run("reference", inputs, rows, Scores(0.1), sinks))


def test_padding_gives_zeros_and_takes_no_gradient():
    out, (grads, _) = run("splash", make_inputs(1), pack_rows([100]), Scores(0.125))
    assert np.array_equal(out[:, 100:], np.zeros_like(out[:, 100:]))
    for grad in grads:
        assert np.isfinite(grad).all()
        assert np.abs(grad[:, :100]).max() > 0
        assert np.array_equal(grad[:, 100:], np.zeros_like(grad[:, 100:]))


@pytest.mark.parametrize("axes", [{"fsdp": 2, "tensor": 2}, {"replica": 2, "expert": 2}])
def test_a_mesh_changes_nothing(axes):
    inputs, rows = make_inputs(), pack_rows(*PACKED)
    sinks = jnp.array([-1.0, 0.0, 1.0, 4.0])
    mesh = build_mesh(MeshConfig(**({"fsdp": 1} | axes)), jax.devices()[:4])
    one_device = run("splash", inputs, rows, Scores(0.125), sinks)
    assert_same(run("splash", inputs, rows, Scores(0.125), sinks, mesh), one_device)


@pytest.mark.parametrize(
    ("length", "window", "block"), [(128, None, 128), (1280, None, 640), (8192, None, 1024), (8192, 512, 512),
                                    (8192, 4, 256), (131072, None, 1024), (3 * 8192, 4096, 1024)]
)  # fmt: skip
def test_blocks_divide_the_row(length, window, block):
    blocks = choose_blocks(length, window)
    assert (blocks.block_q, blocks.block_kv) == (block, block)
    assert block % blocks.block_kv_compute == 0


@pytest.mark.parametrize(("length", "message"), [(200, "is 200.*Set 256"), (1021 * 128, "130688.*1021 blocks")])
def test_lengths_that_it_cannot_do_are_refused(length, message):
    with pytest.raises(ConfigError, match=f"config.data.max_seq_len: .*{message}"):
        choose_blocks(length, None)


def test_what_it_cannot_do_is_refused():
    inputs, rows = make_inputs(1), pack_rows([100])
    with pytest.raises(ConfigError, match="these queries read a cache"):
        attend("splash", *inputs, rows, Scores(0.125), kv_rows=rows)
    with jax.enable_x64(True), pytest.raises(ConfigError, match="compute_dtype is float64"):
        attend("splash", *(x.astype(jnp.float64) for x in inputs), rows, Scores(0.125))


def test_another_platform_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ConfigError, match="the devices are gpu"):
        attend(
            "splash", *make_inputs(1), pack_rows([100]), Scores(0.125), mesh=build_abstract_mesh(MeshConfig(fsdp=1), 1)
        )
