"""An instruction and the shapes around it -> the floating-point operations of its matrix products.

A product of [M, K] and [K, N] is 2 M N K. TPU programs write products as convolutions; of those only the taps that fall
on data count, because a batch dim is written as a window with holes. Elementwise work is not counted: the time of an
instruction without a product is its bytes.
"""

import functools
import math
import re
from collections.abc import Mapping

import numpy as np

from sft_jax.planning.hlo import Instruction, Program, Shape


def count_flops(program: Program, computation: str, instruction: Instruction) -> float:
    """Of one run on one device, with all that a fusion holds. Kernels of foreign code: see `count_kernel_flops`."""
    if instruction.opcode in ("dot", "convolution"):
        return _product_flops(program.computations[computation], instruction)
    if instruction.opcode == "custom-call":
        return count_kernel_flops(program.computations[computation], instruction) or 0.0
    if instruction.opcode == "fusion":
        called = instruction.called("calls")
        inner = ((name, inner) for name in called for inner in program.computations[name].values())
        return sum((count_flops(program, name, instruction) for name, instruction in inner), 0.0)
    return 0.0


def _product_flops(around: Mapping[str, Instruction], instruction: Instruction) -> float:
    left, right = (around[name].shapes[0] for name in instruction.operands[:2])
    out = instruction.shapes[0]
    if instruction.opcode == "dot":
        dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        contracted = [left.dims[int(dim)] for dim in dims[1].split(",") if dim] if dims else []
        return 2.0 * math.prod(out.dims) * math.prod(contracted)
    return _convolution_flops(instruction.attributes, left, right, out)


def _convolution_flops(attributes: str, left: Shape, right: Shape, out: Shape) -> float:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    assert labels is not None, attributes
    inputs, kernel, outputs = labels.groups()
    flops = 2.0 * right.dims[kernel.index("i")]
    flops *= out.dims[outputs.index("b")] * out.dims[outputs.index("f")]
    window = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    for axis in range(len(kernel) - 2):
        label = str(axis)

        def field(name: str, default: str, axis: int = axis) -> str:
            return fields[name].split("x")[axis] if name in fields else default

        low = int(field("pad", "0_0").split("_")[0])
        flops *= _count_taps(
            out.dims[outputs.index(label)],
            right.dims[kernel.index(label)],
            left.dims[inputs.index(label)],
            int(field("stride", "1")),
            low,
            int(field("lhs_dilate", "1")),
            int(field("rhs_dilate", "1")),
        )
    return flops


@functools.lru_cache
def _count_taps(num_out: int, size: int, num_in: int, stride: int, low: int, spread_in: int, spread_window: int) -> int:
    """Pairs of an output place and a tap of the window that meet a value, along one dim."""
    if num_out * size > 10**7:
        return num_out * size
    places = np.arange(num_out)[:, None] * stride + np.arange(size)[None, :] * spread_window - low
    return int(np.sum((places >= 0) & (places <= (num_in - 1) * spread_in) & (places % spread_in == 0)))


# Products over each pair of a query and a key. dq and dkv make the scores again.
_SPLASH_PRODUCTS = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2)}


def count_kernel_flops(around: Mapping[str, Instruction], instruction: Instruction) -> float | None:
    """Of a Pallas kernel, from its name and the shapes of its operands; None for one that is not known.

    splash attention: products over the dims of keys and of values, for every pair in the blocks that it visits. Its
    first operand, the table of blocks, has their numbers: [1, blocks of queries, blocks of keys at most].

    ragged dots, as XLA's own kernels: every row counts with one expert's matrix, those of experts elsewhere too.
    """
    name = f"{instruction.name} {instruction.op_name}"
    if "ragged-dot-metadata" in name:
        return 0.0
    shapes = [around[operand].shapes[0] for operand in instruction.operands]
    if "ragged-dot" in name:
        tokens, other = [shape for shape in shapes if len(shape.dims) >= 2 and "f" in shape.dtype]
        inner = other.dims[-2] if len(other.dims) == 3 else tokens.dims[-1]  # [E, in, out], or rows of the gradient
        return 2.0 * tokens.dims[0] * inner * other.dims[-1]
    match = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", name)
    if not match:
        return None
    table = next(shape for shape in shapes if len(shape.dims) >= 3 and shape.dtype.startswith("s"))
    q, _, v = [shape for shape in shapes if len(shape.dims) >= 3 and "f" in shape.dtype][:3]
    of_keys, of_values = _SPLASH_PRODUCTS[match[1]]
    length, num_rows = q.dims[-2], math.prod(q.dims[:-2])
    rows, columns = table.dims[-2:]
    visited = _visited_blocks(max(rows, columns), min(rows, columns))
    pairs = num_rows * visited * (length / max(rows, columns)) ** 2
    return 2.0 * pairs * (of_keys * q.dims[-1] + of_values * v.dims[-1])


def _visited_blocks(num_blocks: int, width: int) -> int:
    """Of a causal square of blocks, at most `width` in each row."""
    return sum(min(row + 1, width) for row in range(num_blocks))
