"""Sums that are scattered: over rings and without them, the parts are those of the whole sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sft_jax.config import MESH_AXES
from sft_jax.config_schema import MeshConfig
from sft_jax.model import gradient_sums
from sft_jax.model.gradient_sums import Torus, find_torus, look_up, multiply, scatter_sum
from sft_jax.sharding import build_mesh, spec_for

TORI = [
    Torus((8,), (False,)), Torus((8,), (True,)), Torus((2, 4), (True, True)), Torus((4, 2), (True, True)),
    Torus((2, 2, 2), (True, True, True)), Torus((2, 4), (False, True)), Torus((2, 2, 2), (False, True, True)),
]  # fmt: skip


@pytest.mark.parametrize("torus", TORI, ids=lambda torus: f"{torus.sizes}-{torus.is_ring}")
@pytest.mark.parametrize("dim", [0, 1])
def test_each_device_keeps_its_part(torus, dim, monkeypatch):
    monkeypatch.setattr(gradient_sums, "find_torus", lambda mesh: torus)
    mesh = build_mesh(MeshConfig(fsdp=8))
    shape = [256, 256]
    shape[dim] = 16
    whole = np.random.default_rng(0).integers(-9, 9, (8, *shape)).astype(np.float32)
    spec = P(*[None] * dim, "fsdp")
    run = jax.shard_map(
        lambda x: scatter_sum(x[0], dim, mesh), mesh=mesh, in_specs=P("fsdp"), out_specs=spec, check_vma=False
    )
    np.testing.assert_array_equal(jax.jit(run)(whole), whole.sum(0))


AXES = [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"replica": 2, "fsdp": 2, "context": 2}, {"fsdp": 2, "expert": 4}]


@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("dims", [("embed", "mlp"), ("heads", "embed"), ("embed", None)], ids=str)
def test_a_product_has_the_gradients_of_a_plain_one(axes, dims):
    mesh, rng = build_mesh(MeshConfig(**axes)), np.random.default_rng(0)
    x, kernel, weights = (rng.normal(size=shape).astype(np.float32) for shape in ((8, 4, 16), (16, 24), (8, 4, 24)))
    if dims[1] == "embed":
        kernel, x = kernel.T.copy(), rng.normal(size=(8, 4, 24)).astype(np.float32)
        weights = weights[:, :, :16]
    kernel = jax.device_put(kernel, jax.NamedSharding(mesh, spec_for(dims)))

    def loss(mesh, x, kernel):
        return jnp.sum(multiply(x, kernel, dims, mesh) * weights)

    both = [jax.jit(jax.value_and_grad(lambda *args, m=m: loss(m, *args), (0, 1)))(x, kernel) for m in (mesh, None)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *both)
    assert both[0][1][1].sharding.is_equivalent_to(kernel.sharding, 2)


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_looking_up_has_the_gradient_of_a_plain_one(axes):
    mesh, rng = build_mesh(MeshConfig(**axes)), np.random.default_rng(0)
    table, weights = rng.normal(size=(12, 16)).astype(np.float32), rng.normal(size=(8, 4, 16)).astype(np.float32)
    ids = jnp.asarray(rng.integers(0, 12, (8, 4), dtype=np.int32))
    grads = [jax.jit(jax.grad(lambda t, m=m: jnp.sum(look_up(t, ids, m) * weights)))(table) for m in (mesh, None)]
    np.testing.assert_allclose(*grads, rtol=1e-5, atol=1e-5)


def test_no_gradient_is_made_of_what_is_frozen():
    mesh = build_mesh(MeshConfig(fsdp=8))
    x, kernel = jnp.ones((8, 4, 16)), jnp.ones((16, 24))

    def collectives(argnum):
        grad = jax.grad(lambda x, kernel: jnp.sum(multiply(x, kernel, ("embed", "mlp"), mesh)), argnum)
        return str(jax.make_jaxpr(grad)(x, kernel)).count("reduce_scatter")

    assert (collectives(0), collectives(1)) == (0, 1)


class _Tpu:
    platform = "tpu"

    def __init__(self, slice_index, *coords):
        self.slice_index, self.coords = slice_index, coords


@pytest.mark.parametrize(
    ("slices", "dims", "shape", "expected"),
    [
        (1, (4, 4, 4), (1, 64, 1, 1, 1), Torus((4, 4, 4), (True, True, True))),
        (1, (4, 4, 1), (1, 16, 1, 1, 1), Torus((4, 4), (True, True))),
        (1, (4, 4, 1), (1, 4, 1, 4, 1), Torus((4,), (True,))),
        (2, (2, 2, 1), (1, 8, 1, 1, 1), Torus((2, 2, 2), (False, True, True))),
        (2, (2, 2, 1), (2, 4, 1, 1, 1), Torus((2, 2), (True, True))),
        (1, (1, 1, 1), (1, 1, 1, 1, 1), Torus((), ())),
    ],
)
def test_the_torus_is_found_in_the_devices_places(slices, dims, shape, expected):
    devices = np.array([_Tpu(s, *place) for s in range(slices) for place in np.ndindex(dims)])

    assert find_torus(Mesh(devices.reshape(shape), MESH_AXES)) == expected
    cpus = build_mesh(MeshConfig(fsdp=8))
    assert find_torus(cpus) == Torus((8,), (False,))
