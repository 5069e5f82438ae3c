"""The name of a slice of TPUs -> the devices that a step is compiled for, none of which need be here.

Both spellings are read: chips by dimension, `v5p:4x4x4`, and the cloud's accelerator types, whose number counts chips
(v5litepod-16, v6e-16) or cores, two a chip (v4-128, v5p-128, tpu7x-128).
"""

import contextlib
import math
import os
import re
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from sft_jax.datatypes import ConfigError
from sft_jax.planning.chips import CHIPS, Chip

_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v7x": "tpu7x", "v7": "tpu7x"}
# Shapes that the cloud gives a number of chips. Source: the "Configurations" of each page in chips.py.
_SHAPES = {
    2: {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    3: {
        4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
        1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Topology:
    """`num_slices` slices of chips, each a block of `dims`."""

    chip: Chip
    dims: tuple[int, ...]
    num_slices: int = 1

    @property
    def name(self) -> str:
        slices = f" x {self.num_slices} slices" if self.num_slices > 1 else ""
        return f"{self.chip.name}:{'x'.join(map(str, self.dims))}{slices}"

    @property
    def num_chips(self) -> int:
        return math.prod(self.dims) * self.num_slices

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.chip.devices_per_chip

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Which dimensions are rings. Of 3D slices, all from whole cubes of 4x4x4 up; of 2D ones, only those of 16.

        Source: https://docs.cloud.google.com/tpu/docs/v4 ("3D mesh and 3D torus"),
        https://jax-ml.github.io/scaling-book/tpus ("TPU networking")
        """
        if self.chip.num_dims == 3:
            return (all(size % 4 == 0 for size in self.dims),) * 3
        return tuple(size == 16 for size in self.dims)


def parse_topology(name: str, num_slices: int = 1) -> Topology:
    """`v5p:4x4x4`, `v5p-128`, `cpu:8` -> Topology.

    Raises:
      ConfigError: no such generation or shape; lists those known.
    """
    match = re.fullmatch(r"([a-z0-9]+)(?::([0-9x]+)|-([0-9]+))", name.strip().lower())
    chip = CHIPS.get(_ALIASES.get(match[1], match[1])) if match else None
    if match is None or chip is None or num_slices < 1 or (chip.name == "cpu" and not match[2]):
        raise ConfigError(
            f"--topology={name}, --num-slices={num_slices}: no such slice. Known: {_known_names()}; and cpu:8, fake "
            "devices of this machine."
        )
    if match[3]:
        num_chips = int(match[3]) // (chip.cores_per_chip if chip.num_dims == 3 else 1)
        shape = _SHAPES[chip.num_dims].get(num_chips)
        if shape is None or num_chips * (chip.cores_per_chip if chip.num_dims == 3 else 1) != int(match[3]):
            raise ConfigError(f"--topology={name}: {chip.name} has no slice of that size. Known: {_known_names()}.")
    else:
        shape = match[2]
    dims = tuple(int(size) for size in shape.split("x") if size)
    if len(dims) != chip.num_dims or 0 in dims:
        raise ConfigError(
            f"--topology={name}: {chip.name} has {chip.num_dims} dimensions, as in "
            f"{chip.name}:{'x'.join('4' * chip.num_dims)}. Known: {_known_names()}."
        )
    return Topology(chip, dims, num_slices)


def _known_names() -> str:
    listed = {chip.name: list(_SHAPES[chip.num_dims].values()) for chip in CHIPS.values() if chip.num_dims > 1}
    ours = ", ".join(f"{name}:{shapes[0]} to {name}:{shapes[-1]}" for name, shapes in listed.items())
    return f"{ours}, and the cloud's v5p-128, v5litepod-16, v6e-256 and the like"


def open_devices(topology: Topology) -> list[jax.Device]:
    """Devices to compile for. Of TPUs the compiler makes them up, on any machine that has libtpu.

    Raises:
      ConfigError: libtpu is not installed, or does not know the shape.
    """
    # Never this machine's own accelerator: it may be training. Nothing to do where jax has devices already.
    jax.config.update("jax_platforms", "cpu")
    if topology.chip.name == "cpu":
        with contextlib.suppress(RuntimeError):  # jax has its devices already
            jax.config.update("jax_num_cpu_devices", topology.num_devices)
        devices = jax.devices("cpu")
        if len(devices) < topology.num_devices:
            raise ConfigError(f"--topology={topology.name}: this process has {len(devices)} CPU devices. Ask for less.")
        return devices[: topology.num_devices]
    for name, value in _LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options: dict = {"num_slices": topology.num_slices} if topology.num_slices > 1 else {}
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # one device for a chip's two cores
    dims, wraps = topology.dims, topology.wraps
    if any(wraps):
        options["wrap"] = (*wraps, *[False] * (3 - len(wraps)))
    name = f"{topology.chip.name}:{'x'.join(map(str, dims))}"
    try:
        return list(topologies.get_topology_desc(name, platform="tpu", **options).devices)
    except Exception as error:  # whatever libtpu raises, and its absence, are the same to a user
        if "libtpu" in str(error).lower() or "tpu platform" in str(error).lower() or isinstance(error, ImportError):
            hint = "Install the TPU compiler, which needs no TPU: pip install 'sft_jax[tpu]'"
        else:
            hint = f"Known: {_known_names()}"
        raise ConfigError(f"--topology={topology.name}: {type(error).__name__}: {str(error)[:300]}. {hint}.") from error


# So that libtpu neither looks for a machine of the cloud's around it nor for another process's TPU.
_LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
