"""What is published of each chip that a step may be planned for. All figures are of one jax device."""

from dataclasses import dataclass

_DOCS = "https://docs.cloud.google.com/tpu/docs"
_COMPILER = "HBM: limit in the TPU compiler's own out-of-memory message (libtpu 0.0.50)"


@dataclass(frozen=True)
class Chip:
    """One generation. A device is a chip, but on tpu7x half of one."""

    name: str
    hbm_bytes: int
    """What the compiler lets a program have."""
    flops_per_second: float
    """Peak of bfloat16 matmuls."""
    clock_hertz: float
    hbm_bytes_per_second: float
    link_bytes_per_second: float
    """Of one link between neighbours, one way."""
    dcn_bytes_per_second: float
    """Between slices, for each device, one way."""
    num_dims: int
    """Dimensions of the torus."""
    devices_per_chip: int
    cores_per_chip: int
    """What the cloud counts in names such as v5p-128."""
    source: str


def _gib(gib: int | float) -> int:
    return int(gib * 2**30)


# A clock is published for v4 (https://arxiv.org/abs/2304.01433) and v5e (https://jax-ml.github.io/scaling-book/tpus).
# At each clock here, 4 matrix units a core do a multiplication and an addition in every cell at the peak: units of
# 128 x 128 cells, from v6e on of 256 x 256. Google's page of v6e counts 2 of them: by its own estimates, the compiler
# would then have products done faster than at the peak.
#
# A link's bandwidth is the chip's published bidirectional one over its ports (4 in 2D, 6 in 3D), halved for one way.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", _gib(30.75), 275e12, 1.05e9, 1200e9, 45e9, 6.25e9, 3, 1, 2,
             f"{_DOCS}/v4; links: https://jax-ml.github.io/scaling-book/tpus; {_COMPILER}"),
        Chip("v5e", _gib(15.75), 197e12, 1.5e9, 819e9, 50e9, 3.125e9, 2, 1, 1, f"{_DOCS}/v5e; {_COMPILER}"),
        Chip("v5p", _gib(95.73), 459e12, 1.75e9, 2765e9, 100e9, 6.25e9, 3, 1, 2, f"{_DOCS}/v5p-training; {_COMPILER}"),
        Chip("v6e", _gib(31.24), 918e12, 1.75e9, 1638e9, 100e9, 12.5e9, 2, 1, 1, f"{_DOCS}/v6e; {_COMPILER}"),
        Chip("tpu7x", _gib(94.74), 2307e12 / 2, 2.2e9, 7380e9 / 2, 100e9, 12.5e9 / 2, 3, 2, 2,
             f"{_DOCS}/tpu7x; {_COMPILER}"),
        # No chip: for looking at the program on the machine at hand. One core's order of magnitude.
        Chip("cpu", _gib(8), 100e9, 1e9, 20e9, 10e9, 1e9, 1, 1, 1, "none: round figures"),
    )
}  # fmt: skip
