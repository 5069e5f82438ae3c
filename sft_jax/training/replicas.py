"""A tree on the mesh -> which devices hold another copy of a part than the others do.

Devices that hold the same part of an array hold the same bits, unless one of them computes or remembers wrongly. Each
sums the bits of its own part, every word times an odd number of its place, modulo 2^32: one flipped bit always changes
the sum, and an exchange of two words nearly always. What travels is one word for each array and device.
"""

import collections
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from sft_jax.datatypes import MachineError
from sft_jax.sharding import group_for_device, replicated, to_device
from sft_jax.typing import Array


class ReplicaCheck:
    """Compiled once for all trees that are placed as `placed`, of arrays or of their shapes."""

    def __init__(self, placed: Any, mesh: Mesh | AbstractMesh) -> None:
        assert isinstance(mesh, Mesh)  # a run's is of devices
        self._mesh: Mesh = mesh
        leaves = jax.tree_util.tree_leaves_with_path(placed)
        self._names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
        self._parts = [_parts(leaf.sharding, leaf.shape, self._mesh) for _, leaf in leaves]
        self._groups = group_for_device([leaf for _, leaf in leaves])
        specs = [leaf.sharding.spec for _, leaf in leaves]
        self._sums = [jax.jit(make_sum(self._mesh, [specs[number] for number in group])) for group in self._groups]

    def check(self, step: int, tree: Any) -> None:
        """Every process must call this, and all find the same.

        Raises:
          MachineError: naming the array, and the devices whose copy differs from that of most.
        """
        leaves = jax.tree.leaves(tree)
        sums = np.zeros((self._mesh.size, len(leaves)), np.uint32)
        for group, sum_up in zip(self._groups, self._sums, strict=True):
            sums[:, group] = jax.device_get(sum_up([leaves[number] for number in group]))
        for name, parts, of_devices in zip(self._names, self._parts, sums.T, strict=True):
            for devices in parts:
                if len({int(of_devices[device]) for device in devices}) > 1:
                    raise MachineError(self._describe(step, name, devices, of_devices))

    def _describe(self, step: int, name: str, devices: Sequence[int], sums: np.ndarray) -> str:
        counts = collections.Counter(int(sums[device]) for device in devices)
        (usual, votes), *_ = counts.most_common()
        odd = [device for device in devices if sums[device] != usual] if votes > len(devices) / 2 else list(devices)
        flat = self._mesh.devices.flat
        names = ", ".join(f"{flat[device]} of process {flat[device].process_index}" for device in odd)
        which = "differs from the other copies on" if len(odd) < len(devices) else "differs between"
        return (
            f"step {step}: {name} {which} {names}: a device has computed or kept a wrong value, and training on would "
            "spread it. The last checkpoint is from before. Run the same command to go on, without that host if it "
            "happens again."
        )


def _parts(sharding: NamedSharding, shape: tuple[int, ...], mesh: Mesh) -> list[list[int]]:
    """Devices, by their number in the mesh, that hold the same part; only where there are several."""
    numbers = {device: number for number, device in enumerate(mesh.devices.flat)}
    parts: dict[str, list[int]] = collections.defaultdict(list)
    for device, index in sharding.devices_indices_map(shape).items():
        parts[str(index)].append(numbers[device])
    return [devices for devices in parts.values() if len(devices) > 1]


def make_sum(mesh: Mesh, specs: list[PartitionSpec]) -> Callable[[list[Array]], Array]:
    """Leaves -> sums [device, leaf] on every device."""

    def local(leaves: list[Array]) -> Array:
        return jnp.stack([sum_bits(leaf) for leaf in leaves])[None]

    every = PartitionSpec(mesh.axis_names)
    summed = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=every, check_vma=False)
    return lambda leaves: jax.lax.with_sharding_constraint(summed(to_device(leaves)), replicated(mesh))


def sum_bits(values: Array) -> Array:
    """Sum over i of (2 i + 1) * word i, modulo 2^32; words are of 32 bits, or of fewer, widened."""
    width = values.dtype.itemsize
    words = jax.lax.bitcast_convert_type(values, jnp.dtype(f"uint{8 * min(width, 4)}")).reshape(-1).astype(jnp.uint32)
    places = 2 * jax.lax.iota(jnp.uint32, words.size) + 1
    return jnp.sum(places * words, dtype=jnp.uint32)
