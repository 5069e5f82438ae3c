"""What each policy keeps, read in the traced gradient. That no number changes: test_transformer.py, test_step.py."""

import jax
import jax.numpy as jnp
import pytest
from test_ring import make_mesh
from test_splash import make_inputs, pack_rows

from sft_jax.model.attention import Scores, attend
from sft_jax.model.remat import rematerialized


def trace_gradient(remat, **axes):
    """All operations of the gradient of one layer that is attention alone, those of loops and calls too."""
    q, k, v = make_inputs(1, length=512)
    rows, mesh = pack_rows([512], length=512), make_mesh(**axes) if axes else None

    def layer(x, kv):
        mixed = attend("splash", 2 * x, *kv, rows, Scores(0.125), mesh=mesh)
        return jnp.sin(mixed), None

    def loss(x):
        return jnp.sum(jax.lax.scan(rematerialized(layer, remat), x, (k[None], v[None]))[0])

    return list(walk(jax.make_jaxpr(jax.grad(loss))(q)))


def walk(value):
    if hasattr(value, "eqns"):
        read = {id(var) for eqn in value.eqns for var in eqn.invars} | {id(var) for var in value.outvars}
        for eqn in value.eqns:
            if any(id(var) in read for var in eqn.outvars):  # what nothing reads is not compiled
                yield eqn
                yield from walk(eqn.params)
    elif isinstance(value, dict | tuple | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from walk(item)
    elif hasattr(value, "jaxpr"):
        yield from walk(value.jaxpr)


@pytest.mark.parametrize(("axes", "per_pass"), [({}, 1), ({"context": 2}, 4)], ids=["splash", "ring"])
def test_attentions_forward_pass_runs_once_where_its_output_is_kept(axes, per_pass):
    """The ring has a causal kernel, one of a device's second chunk on its first, and two for each turn."""

    def count(remat):
        kernels = [eqn for eqn in trace_gradient(remat, **axes) if eqn.primitive.name == "pallas_call"]
        return sum("_fwd" in str(eqn.params["name"]) for eqn in kernels)

    assert count("none") == count("attention") == count("offload_attention") == per_pass
    assert count("full") == count("offload") == 2 * per_pass


@pytest.mark.parametrize(("remat", "arrays"), [("full", 0), ("attention", 0), ("offload", 1), ("offload_attention", 3)])
def test_what_is_offloaded_goes_to_the_host_and_back(remat, arrays):
    """The layer's input; attention's output and the sums of its exponentials."""
    moves = [str(eqn.params["devices"]) for eqn in trace_gradient(remat) if eqn.primitive.name == "device_put"]
    assert len([move for move in moves if "Host" in move]) == arrays
    assert len([move for move in moves if "Device" in move]) == arrays
