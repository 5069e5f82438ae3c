"""A scheduled program -> what is in memory when it needs the most: our own reading of the schedule, because the TPU
compiler gives the size of the peak and not what it is made of.

A buffer lives from the instruction that makes it to the last that reads it under any of its names: tuples, bitcasts,
loops and updates in place give new names to old buffers. What a loop's body makes comes on top of what lives around
the loop. Arguments of the program live throughout. The compiler shares and pads in ways that are not modelled, so the
sum is near its figure and not the same.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sft_jax.planning.hlo import Instruction, Program, Shape


@dataclass(frozen=True)
class Buffer:
    """One that lives at the peak."""

    shape: Shape
    num_bytes: float
    op_name: str
    source: str


class Peak(NamedTuple):
    num_bytes: float
    buffers: tuple[Buffer, ...]


@dataclass
class _Made:
    buffer: Buffer
    first: int
    last: int


def find_peak(program: Program) -> Peak:
    """Of temporaries and results: the arguments are known without reading a program."""
    peak = _peak_of(program, program.entry, {})
    return Peak(peak.num_bytes, tuple(sorted(peak.buffers, key=lambda buffer: -buffer.num_bytes)))


def _peak_of(program: Program, computation: str, known: dict[str, Peak]) -> Peak:
    if computation in known:
        return known[computation]
    instructions = list(program.computations[computation].values())
    made: list[_Made] = []
    leaves: dict[str, list[int | None]] = {}  # by instruction: the buffer of each array of its result; None: not ours
    carried_until: dict[int, int] = {}  # of the parameter's leaves: the last reader
    parameter: str | None = None
    inner: dict[int, Peak] = {}
    for place, instruction in enumerate(instructions):
        operands = [leaves[name] for name in instruction.operands if name in leaves]
        for operand, name in zip(operands, (n for n in instruction.operands if n in leaves), strict=True):
            if instruction.opcode not in _NAMES:
                for number in operand:
                    if number is not None:
                        made[number].last = place
            if name == parameter and instruction.opcode == "get-tuple-element":
                carried_until.setdefault(_index(instruction), place)
        leaves[instruction.name] = _result_buffers(program, instruction, operands, made, place)
        if instruction.opcode == "parameter":
            parameter = instruction.name if instruction.operands[0] == "0" else parameter
        called = instruction.called("body", "to_apply", "branch_computations", "true_computation", "false_computation")
        if instruction.opcode in ("while", "call", "conditional"):
            peaks = [_peak_of(program, name, known) for name in called if name in program.computations]
            inner[place] = max(peaks, key=lambda peak: peak.num_bytes, default=Peak(0, ()))
        if instruction.is_root:
            for number in leaves[instruction.name]:
                if number is not None:
                    made[number].last = len(instructions)
    known[computation] = _largest(instructions, made, inner, in_place=computation != program.entry)
    return known[computation]


_NAMES = {"tuple", "get-tuple-element", "bitcast", "opt-barrier"}


def _index(instruction: Instruction) -> int:
    match = re.search(r"\bindex=(\d+)", instruction.attributes)
    assert match is not None, instruction
    return int(match[1])


def _result_buffers(
    program: Program, instruction: Instruction, operands: Sequence[list[int | None]], made: list[_Made], place: int
) -> list[int | None]:
    """Which buffers hold the result: old ones under a new name, or new ones, which are added to `made`."""
    opcode, shapes = instruction.opcode, instruction.shapes
    if opcode in ("parameter", "constant"):
        return [None] * len(shapes)
    if opcode == "tuple":
        return [number for operand in operands for number in operand]
    if opcode in ("bitcast", "opt-barrier", "while") and operands and len(operands[0]) == len(shapes):
        return list(operands[0])
    if opcode == "get-tuple-element" and operands and _index(instruction) < len(operands[0]):
        return [operands[0][_index(instruction)]]
    if opcode.endswith("-done") and operands:
        # Of (to, from, ...) or (from, to, ...): the array of the result's shape.
        fits = [n for n in operands[0] if n is not None and made[n].buffer.shape.dims == shapes[0].dims]
        return [fits[0]] if fits else [None for _ in shapes]
    shared = _updated_in_place(program, instruction, operands)
    numbers: list[int | None] = []
    for i, shape in enumerate(shapes):
        if i in shared:
            numbers.append(shared[i])
            continue
        if opcode.endswith("-start") and any(
            n is not None and made[n].buffer.shape == shape for operand in operands for n in operand
        ):
            numbers.append(next(n for o in operands for n in o if n is not None and made[n].buffer.shape == shape))
            continue
        size = 0.0 if shape.on_chip else shape.num_bytes
        made.append(_Made(Buffer(shape, size, instruction.op_name, program.source_of(instruction)), place, place))
        numbers.append(len(made) - 1)
    return numbers


def _updated_in_place(
    program: Program, instruction: Instruction, operands: Sequence[list[int | None]]
) -> dict[int, int | None]:
    """Leaf of the result -> the operand's buffer that it overwrites."""
    if instruction.opcode == "dynamic-update-slice" and operands:
        return {0: operands[0][0]}
    match = re.search(r"output_to_operand_aliasing=\{(.*?)\}(?:,|$)", instruction.attributes)
    if match:
        pairs = re.findall(r"\{(\d*)\}: \((\d+), \{\}\)", match[1])
        return {int(i or 0): operands[int(o)][0] for i, o in pairs if int(o) < len(operands)}
    if instruction.opcode != "fusion":
        return {}
    fused = program.computations[instruction.called("calls")[0]]
    root = next(inner for inner in fused.values() if inner.is_root)
    roots = [fused.get(name, root) for name in root.operands] if root.opcode == "tuple" else [root]
    found = {}
    for i, part in enumerate(roots):
        while part.opcode == "bitcast" and part.operands[0] in fused:
            part = fused[part.operands[0]]
        target = fused.get(part.operands[0]) if part.opcode == "dynamic-update-slice" else None
        while target is not None and target.opcode == "bitcast":
            target = fused.get(target.operands[0])
        if target is not None and target.opcode == "parameter" and int(target.operands[0]) < len(operands):
            found[i] = operands[int(target.operands[0])][0]
    return found


def _largest(
    instructions: Sequence[Instruction], made: Sequence[_Made], inner: dict[int, Peak], in_place: bool
) -> Peak:
    """The moment with the most. In a loop's body, what becomes the next round's carry overwrites the last's."""
    ends = len(instructions)
    held = [m for m in made if m.buffer.num_bytes and not (in_place and m.last == ends)]
    changes = [0.0] * (ends + 2)
    for m in held:
        changes[m.first] += m.buffer.num_bytes
        changes[m.last + 1] -= m.buffer.num_bytes
    best, at, current = -1.0, 0, 0.0
    for place in range(ends):
        current += changes[place]
        total = current + (inner[place].num_bytes if place in inner else 0)
        if total > best:
            best, at = total, place
    buffers = [m.buffer for m in held if m.first <= at <= m.last]
    return Peak(max(best, 0.0), (*buffers, *(inner[at].buffers if at in inner else ())))
