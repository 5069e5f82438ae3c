"""Where every array lives: the mesh, the one table from logical dims to mesh axes, and placing a batch on devices.

A parameter names its dims (`("layers", "embed", "mlp")`, in model/transformer.py), a rule names mesh axes for each:

    layers.0.0.mlp.up.kernel  [layers, embed,   mlp      ]
                              ->  P(None, "fsdp", "tensor")

All five mesh axes always exist, with size 1 where unused. A rule is a *tuple* of axes, so that a dim may be split over
several of them.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sft_jax.config import MESH_AXES
from sft_jax.config_schema import Config, MeshConfig
from sft_jax.datatypes import ConfigError, HostBatch
from sft_jax.typing import Array

RULES: dict[str | None, tuple[str, ...]] = {
    None: (),
    "batch": ("replica", "fsdp"),
    "seq": ("context",),
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "expert": ("expert",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "vocab": ("tensor",),
    "head_dim": (),
    "layers": (),
    "rank": (),  # of adapters: too small to split
    "norm": (),  # scales are small: a copy on every device
}
BATCH_AXES = RULES["batch"]
HOST_MEMORY = "pinned_host"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows on the mesh, as in `datatypes.PackedRow`. `rows` numbers them over the whole run: row i of step s is
    s * B + i, whatever the mesh; random draws are keyed by it."""

    inputs: Any  # int32 [B, L]
    targets: Any  # int32 [B, L]
    loss_weights: Any  # float32 [B, L]
    segment_ids: Any  # int32 [B, L]
    positions: Any  # int32 [B, L]
    source_ids: Any  # int32 [B, L]
    rows: Any  # int32 [B]


def mesh_shape(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Sizes of the five axes, with -1 filled.

    Raises:
      ConfigError: where they do not multiply to `num_devices`.
    """
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    filled = {axis: num_devices // fixed if size == -1 else size for axis, size in sizes.items()}
    if math.prod(filled.values()) != num_devices:
        raise ConfigError(
            f"config.mesh: {filled} needs {math.prod(filled.values())} devices, and there are {num_devices}. "
            "Choose axes whose product is the number of devices, or set one to -1."
        )
    return filled


def build_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of all devices of all processes (or of `devices`), neighbours on it being neighbours in the torus. With
    several slices the `replica` axis goes over them, or where it is 1, fsdp.

    Raises:
      ConfigError: axes that do not multiply to the number of devices, or slices that divide neither axis.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_shape(config, len(devices))
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if num_slices == 1:
        array = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    else:  # make_mesh refuses them
        axis = "replica" if sizes["replica"] > 1 else "fsdp"
        if sizes[axis] % num_slices:
            raise ConfigError(
                f"config.mesh.{axis}: is {sizes[axis]}, over {num_slices} slices, which do not divide it. "
                f"Set config.mesh.replica={num_slices}."
            )
        over = {name: num_slices if name == axis else 1 for name in sizes}
        within = [size // over[name] for name, size in sizes.items()]
        array = mesh_utils.create_hybrid_device_mesh(
            within, list(over.values()), devices, allow_split_physical_axes=True
        )
    return Mesh(array, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def build_abstract_mesh(config: MeshConfig, num_devices: int) -> AbstractMesh:
    """The same without devices, to trace a step for hardware that is not here."""
    sizes = mesh_shape(config, num_devices)
    return AbstractMesh(tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def device_coords(mesh: Mesh) -> np.ndarray:
    """[devices in the mesh's order, slice and place in the torus]."""

    def place(device: Any) -> tuple[int, ...]:
        if device.platform != "tpu":
            return (0, device.id)
        return (getattr(device, "slice_index", 0) or 0, *device.coords)

    return np.array([place(device) for device in mesh.devices.flat])


def spec_for(dims: Sequence[str | None]) -> PartitionSpec:
    """Logical dims -> PartitionSpec: `("embed", "mlp")` -> `P("fsdp", "tensor")`."""
    axes = [RULES[dim] for dim in dims]
    return PartitionSpec(*(None if not names else names[0] if len(names) == 1 else names for names in axes))


def shardings_for(
    mesh: Mesh | AbstractMesh, dims: Mapping[str, Sequence[str | None]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, NamedSharding]:
    """A sharding for each array by name.

    Raises:
      ConfigError: naming each array and dim that its mesh axes do not divide.
    """
    errors = []
    for name, shape in shapes.items():
        for dim, size in zip(dims[name], shape, strict=True):
            parts = num_parts(mesh, dim)
            if size % parts:
                axes = " x ".join(RULES[dim])
                errors.append(
                    f"config.mesh: {name} has {dim} = {size}, which {axes} = {parts} does not divide. "
                    f"Choose a size of {axes} that does."
                )
    if errors:
        raise ConfigError("\n".join(errors))
    return {name: NamedSharding(mesh, spec_for(dims[name])) for name in shapes}


def num_parts(mesh: Mesh | AbstractMesh, dim: str | None) -> int:
    """Into how many parts the mesh splits a logical dim."""
    return math.prod(mesh.shape[axis] for axis in RULES[dim])


def check_batch_divides(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """Each microbatch must give every shard of the batch the same number of rows, and every row every shard of its
    tokens the same number.

    Raises:
      ConfigError: it does not; says which sizes do.
    """
    shares, length = num_parts(mesh, "seq"), config.data.max_seq_len
    if length % shares:
        raise ConfigError(
            f"config.data.max_seq_len: is {length}, which config.mesh.context = {shares} does not divide. "
            f"Set {-(-length // shares) * shares}."
        )
    parts = num_parts(mesh, "batch")
    batch = config.batch
    for name, rows in (("batch_size / grad_accum_steps", batch.micro_batch_size), ("eval_batch_size", batch.eval_rows)):
        if rows % parts:
            raise ConfigError(
                f"config.batch: {name} is {rows} rows, which the {parts} shards of replica x fsdp do not divide. "
                f"Choose a multiple of {parts}."
            )


def constrain(x: Array, mesh: Mesh | AbstractMesh | None, *dims: str | None) -> Array:
    """Pin an activation's sharding by its logical dims; nothing without a mesh."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec_for(dims)))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def rows_of_process(mesh: Mesh | AbstractMesh, batch_size: int) -> list[int]:
    """The rows of a batch of `batch_size` of which devices of this process hold any token, ascending. Processes share a
    row whose tokens are split among them."""
    sharding = NamedSharding(mesh, spec_for(("batch",)))
    held = sharding.addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for index in held if index for row in range(batch_size)[index[0]]})


def place_batch(batch: HostBatch, mesh: Mesh | AbstractMesh, batch_size: int) -> Batch:
    """The rows of a global batch of `batch_size` rows that `rows_of_process` names -> arrays over the mesh."""
    held = np.array(rows_of_process(mesh, batch_size))
    numbers = (batch.step * batch_size + held) % 2**31  # int32 on device

    def place(values: np.ndarray, *dims: str | None) -> Array:
        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # of this process
            start, stop, _ = index[0].indices(batch_size)
            first = np.searchsorted(held, start)
            return values[first : first + stop - start, *index[1:]]

        sharding = NamedSharding(mesh, spec_for(dims))
        return jax.make_array_from_callback((batch_size, *values.shape[1:]), sharding, read)

    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(Batch) if f.name != "rows"}
    placed = {name: place(values, "batch", "seq") for name, values in fields.items()}
    return Batch(**placed, rows=place(numbers.astype(np.int32), "batch"))


def abstract_batch(mesh: Mesh | AbstractMesh, batch_size: int, length: int) -> Batch:
    """The same shapes and shardings with no data, for tracing and compiling."""
    rows = NamedSharding(mesh, spec_for(("batch", "seq")))
    ints = jax.ShapeDtypeStruct((batch_size, length), np.int32, sharding=rows)
    weights = jax.ShapeDtypeStruct((batch_size, length), np.float32, sharding=rows)
    fields = {f.name: ints for f in dataclasses.fields(Batch)} | {"loss_weights": weights}
    numbers = jax.ShapeDtypeStruct((batch_size,), np.int32, sharding=NamedSharding(mesh, spec_for(("batch",))))
    return Batch(**(fields | {"rows": numbers}))


# --- The host's memory ------------------------------------------------------------------------------------------------


def is_on_host(leaf: Any) -> bool:
    """Of an array, or an abstract one, with a sharding."""
    return bool(leaf.sharding.memory_kind == HOST_MEMORY)


def to_device(tree: Any) -> Any:
    """Traced arrays, wherever they are, in the memory of the devices that have them."""
    return jax.device_put(tree, jax.memory.Space.Device)


def group_for_device(leaves: Sequence[Any]) -> list[list[int]]:
    """Numbers of leaves that may be on the devices at one time: those that are, and each of the host's alone."""
    near = [number for number, leaf in enumerate(leaves) if not is_on_host(leaf)]
    return [near, *([number] for number, leaf in enumerate(leaves) if is_on_host(leaf))]
