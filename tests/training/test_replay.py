"""Gradients that are computed twice: equal where the machine is sound, and told where one bit is another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback
from jax.sharding import NamedSharding, PartitionSpec

from sft_jax.config_schema import MeshConfig
from sft_jax.datatypes import MachineError
from sft_jax.sharding import Batch, build_mesh
from sft_jax.training.replay import ReplayCheck

MESH = build_mesh(MeshConfig(replica=2, fsdp=4))
SPECS = {"kernel": PartitionSpec("fsdp"), "scale": PartitionSpec()}
PARAMS = {
    name: jax.device_put(np.linspace(-1, 1, 32, dtype=np.float32).reshape(8, 4), NamedSharding(MESH, spec))
    for name, spec in SPECS.items()
}
ROWS = np.ones((8, 4), np.int32)
BATCH = Batch(ROWS, ROWS, ROWS.astype(np.float32), ROWS, ROWS, ROWS, np.arange(8, dtype=np.int32))


def gradients(params, frozen, batch):
    return {name: jnp.sin(value) * jnp.sum(batch.loss_weights) for name, value in params.items()}, None


def test_a_sound_machine_computes_the_same():
    check = ReplayCheck(gradients, PARAMS, MESH)
    for step in (1, 2):
        check.check(step, PARAMS, {}, BATCH)


@pytest.mark.parametrize(("name", "row", "devices"), [("kernel", 5, [2, 6]), ("scale", 5, list(range(8)))])
def test_one_bit_is_told(name, row, devices):
    """Of the second computation; a device of an 8 x 4 array over fsdp = 4 holds two rows of it."""
    calls = []

    def flips(_):
        calls.append(1)
        return np.uint32(len(calls) == 2)

    def poisoned(params, frozen, batch):
        grads, sums = gradients(params, frozen, batch)
        bit = io_callback(flips, jax.ShapeDtypeStruct((), jnp.uint32), batch.rows[0])
        words = jax.lax.bitcast_convert_type(grads[name], jnp.uint32)
        words = words.at[row, 1].set(words[row, 1] ^ bit)
        return grads | {name: jax.lax.bitcast_convert_type(words, jnp.float32)}, sums

    check = ReplayCheck(poisoned, PARAMS, MESH)
    with pytest.raises(
        MachineError, match=f"step 7: computed again, the gradients of 1 arrays, the first of them {name}, "
    ) as error:
        check.check(7, PARAMS, {}, BATCH)
    names = ", ".join(f"{MESH.devices.flat[number]} of process 0" for number in devices)
    assert f" {len(devices)} of 8 devices: {names}. " in error.value.args[0]
    assert len(calls) == 2
