"""What each instruction computes and moves -> seconds, by a roofline that is stated whole:

* an instruction takes the longer of its products and its HBM bytes at the peak bandwidth;
* products take the cycles that the compiler estimates, which knows its tiles and what else it has fused with them, and
  no less than at the peak of bfloat16; kernels, for which it has no estimate, are at the peak. Its estimates of what
  has no product are not used: a constant written to memory would take ten times as long as its bytes do;
* a prefetch goes on beside them, in what they leave of the bandwidth: computation is the sum of their times, or the
  time of all HBM bytes where that is more;
* a collective within a slice sends its bytes over the links of the torus dimensions that its group spans, both ways
  where they wrap; between slices, over the data-center network;
* asynchronous collectives overlap with computation, all others add to it:

    step = max(computation, asynchronous) + synchronous

Kernels never reach their peak, and may read an operand more than once. How much of what is asynchronous can be hidden
is not looked at. It is a means to compare, and no measurement.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sft_jax.config import MESH_AXES
from sft_jax.planning.flops import count_flops, count_kernel_flops
from sft_jax.planning.hlo import Program, walk_executed
from sft_jax.planning.topology import Topology
from sft_jax.planning.traffic import Collective, count_memory_bytes, find_collectives

READING = 2
"""Goes up where the same program gets other figures than before: a plan of a lower one is to be made again."""


@dataclass
class Work:
    """One device's share of a step."""

    flops: float = 0.0
    memory_bytes: float = 0.0
    compute_seconds: float = 0.0
    """Of products alone, at the peak."""
    product_seconds: float = 0.0
    """Of products alone, by the compiler's cycles."""
    memory_seconds: float = 0.0
    """Of HBM traffic alone."""
    serial_seconds: float = 0.0
    """Of all instructions but prefetches, each the longer of the two."""
    sync_seconds: float = 0.0
    async_seconds: float = 0.0
    collectives: dict[tuple[str, str, bool], list[float]] = field(default_factory=dict)
    """(kind, mesh axes, asynchronous) -> [number, bytes sent, seconds]."""
    uncounted: set[str] = field(default_factory=set)
    """Kernels whose products nobody has counted."""

    @property
    def busy_seconds(self) -> float:
        """Of computation: everything on the device itself."""
        return max(self.serial_seconds, self.memory_seconds)

    @property
    def collective_bytes(self) -> float:
        return sum((entry[1] for entry in self.collectives.values()), 0.0)

    @property
    def step_seconds(self) -> float:
        return max(self.busy_seconds, self.async_seconds) + self.sync_seconds

    @property
    def bound(self) -> str:
        """What takes the most of the step: compute, memory or collectives."""
        memory = self.busy_seconds - self.product_seconds
        times = {"compute": self.product_seconds, "memory": memory, "collectives": self.sync_seconds}
        if self.async_seconds > self.busy_seconds:
            times["collectives"] += self.async_seconds
        return max(times, key=lambda name: times[name])


def count_work(
    program: Program, topology: Topology, mesh_sizes: Mapping[str, int], coords: np.ndarray, unknown_trips: int
) -> Work:
    """
    Args:
      coords: for each device, in the mesh's order: its slice and its place in the torus.
      unknown_trips: rounds of a loop whose end is data.
    """
    work, chip = Work(), topology.chip
    for instruction, computation, times in (
        (e.instruction, e.computation, e.times) for e in walk_executed(program, unknown_trips)
    ):
        collectives = find_collectives(program, computation, instruction, topology.num_devices)
        for collective in collectives:
            seconds = collective_seconds(collective, topology, coords)
            key = (collective.kind, spanned_axes(collective.group, mesh_sizes), collective.is_async)
            entry = work.collectives.setdefault(key, [0, 0.0, 0.0])
            for i, amount in enumerate((1, collective.wire_bytes, seconds)):
                entry[i] += amount * times
            if collective.is_async:
                work.async_seconds += seconds * times
            else:
                work.sync_seconds += seconds * times
        flops = count_flops(program, computation, instruction)
        if collectives and not flops:
            continue  # its bytes are on the links
        moved = count_memory_bytes(program, computation, instruction)
        compute, memory = flops / chip.flops_per_second, moved / chip.hbm_bytes_per_second
        products = max(compute, instruction.estimated_cycles / chip.clock_hertz) if flops else 0.0
        work.flops += flops * times
        work.memory_bytes += moved * times
        work.compute_seconds += compute * times
        work.product_seconds += products * times
        work.memory_seconds += memory * times
        if not instruction.opcode.endswith("-start"):
            work.serial_seconds += max(products, memory) * times
        around = program.computations[computation]
        if 'custom_call_target="tpu_custom_call"' in instruction.attributes and (
            count_kernel_flops(around, instruction) is None
        ):
            work.uncounted.add(instruction.op_name or instruction.name)
    return work


def spanned_axes(group: Sequence[int], mesh_sizes: Mapping[str, int]) -> str:
    """The mesh axes along which the devices of a group differ: `fsdp`, or `fsdp x tensor`."""
    places = np.array(np.unravel_index(np.array(group), tuple(mesh_sizes.values())))
    return " x ".join(axis for axis, place in zip(MESH_AXES, places, strict=True) if len(set(place)) > 1)


def collective_seconds(collective: Collective, topology: Topology, coords: np.ndarray) -> float:
    chip, places = topology.chip, coords[list(collective.group)]
    num_slices = len(set(places[:, 0]))
    per_slice = len(collective.group) // num_slices
    links = sum(2 if wraps else 1 for dim, wraps in enumerate(topology.wraps) if len(set(places[:, 1 + dim])) > 1)
    on_links = collective.wire_bytes / (chip.link_bytes_per_second * max(links, 1)) if per_slice > 1 else 0.0
    if num_slices == 1:
        return on_links
    # Each device exchanges, with its like in the other slices, what is left after its own slice has been joined.
    share = collective.wire_bytes / per_slice
    return on_links + share / chip.dcn_bytes_per_second
