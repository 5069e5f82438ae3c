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


@pytest.mark.parametrize(
    ("axes", "chunk", "scores"),
    [
        ({"context": 4}, 128, Scores(0.125, window=129)),  # a device meets its neighbours alone
        ({"context": 4}, 128, Scores(0.125, window=130)),  # and one token more is of the chunk after the next
        ({"context": 3}, 128, Scores(0.125, window=300, softcap=3.0)),  # longer than what a device holds
        # Of a chunk of two blocks the second sees nothing of the chunk before.
        ({"context": 2, "fsdp": 2, "tensor": 2}, 512, Scores(0.125, window=200)),
    ],
)
def test_windows_reach_over_borders_as_far_as_they_should(axes, chunk, scores):
    length = 2 * chunk * axes["context"]
    segments = [length // 3, length // 2], [length]  # the first ends in padding
    inputs, rows = make_inputs(length=length), pack_rows(*segments, length=length)
    assert_same(run("splash", inputs, rows, scores, mesh=make_mesh(**axes)), run("reference", inputs, rows, scores))


def test_with_a_window_no_device_is_met_in_vain():
    """With 8 devices and a window of a chunk: twice around, forward and backward, in 3 moves instead of 7, and one."""
    length = 2048
    inputs, rows = make_inputs(1, length=length), pack_rows([length], length=length)

    def count_moves(scores):
        def loss(q, k, v):
            return jnp.sum(attend("splash", q, k, v, rows, scores, mesh=make_mesh(context=8)))

        moves = []
        for operation, times in walk_with_rounds(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*inputs)):
            if operation.primitive.name == "ppermute" and is_once_around(operation.params["perm"]):
                moves += [len(operation.invars)] * times
        return sum(moves)

    keys, grads = 3, 2  # arrays
    assert count_moves(Scores(0.125)) == 7 * keys + 7 * (keys + grads) + grads
    assert count_moves(Scores(0.125, window=128)) == 3 * keys + 3 * (keys + grads) + grads


def walk_with_rounds(value, times=1):
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else [value]:
        jaxpr = getattr(item, "jaxpr", item)
        if isinstance(item, dict | tuple | list):
            yield from walk_with_rounds(item, times)
        for eqn in getattr(jaxpr, "eqns", ()):
            yield eqn, times
            yield from walk_with_rounds(eqn.params, times * eqn.params.get("length", 1))


def is_once_around(moves):
    return len({(end - start) % len(moves) for start, end in moves}) == 1


@pytest.mark.parametrize("options", [{}, {"window": 100}])
def test_sinks_take_their_share_once(options):
    inputs, rows, scores = make_inputs(length=512), pack_rows([300, 150], [512], length=512), Scores(0.125, **options)
    sinks = jnp.array([-1.0, 0.0, 1.0, 4.0])
    mesh = make_mesh(context=2, fsdp=2, tensor=2)
    assert_same(run("splash", inputs, rows, scores, sinks, mesh), run("reference", inputs, rows, scores, sinks))


def test_padding_gives_zeros_and_takes_no_gradient():
    inputs, rows = make_inputs(1, length=512), pack_rows([100], length=512)
    out, (grads, _) = run("splash", inputs, rows, Scores(0.125), mesh=make_mesh(context=2))
    for array in (out, *grads):
        assert np.isfinite(array).all()
        assert np.abs(array[:, :100]).max() > 0
        assert np.array_equal(array[:, 100:], np.zeros_like(array[:, 100:]))


def test_a_row_that_cannot_be_cut_into_chunks_is_refused():
    inputs, rows = make_inputs(1, length=640), pack_rows([100], length=640)
    with pytest.raises(ConfigError, match=r"config.data.max_seq_len: is 640; .* needs a multiple of 512. Set 1024"):
        attend("splash", *inputs, rows, Scores(0.125), mesh=make_mesh(context=2))
