"""An instruction and the shapes around it -> the bytes that it moves: in memory, and between devices."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sft_jax.planning.hlo import Instruction, Program, inner_instructions

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))? \{([^}]*)\}")
# Names for what is there already, memory that nothing fills, and the ends of what another instruction has started.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "iota", "domain", "add-dependency",
}  # fmt: skip
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast")
_SLICES = ("dynamic-slice", "slice", "gather")


def count_memory_bytes(program: Program, computation: str, instruction: Instruction) -> float:
    """HBM bytes read and written by one run, by these rules:

    * an array in the core's own memory costs nothing, on whichever side it is;
    * a slice reads what it gives and an update writes what it takes, at any depth of fusions and under any name;
    * all else reads its operands once and writes its result once;
    * what is asynchronous, such as a prefetch, counts where it starts.
    """
    opcode, around = instruction.opcode, program.computations[computation]
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0.0
    if opcode == "custom-call" and any(f'"{target}"' in instruction.attributes for target in _FREE_CALLS):
        return 0.0
    if opcode == "fusion":
        return _fusion_bytes(program, around, instruction)
    operands = [around[name] for name in instruction.operands]
    if opcode in ("call-start", "async-start"):
        names = instruction.called("to_apply", "calls")
        inner = ((name, inner) for name in names for inner in program.computations[name].values())
        return sum((count_memory_bytes(program, name, instruction) for name, instruction in inner), 0.0)
    if opcode.removesuffix("-start") in _SLICES:
        given = instruction.shapes[-2 if opcode.endswith("-start") else 0]  # of (from, to, context)
        return given.num_bytes * (_is_in_memory(operands[0]) + (not given.on_chip))
    if opcode == "dynamic-update-slice":
        return 2 * _result_bytes(operands[1])
    if opcode.endswith("-start"):
        return _result_bytes(instruction)  # (to, from, ...)
    return _result_bytes(instruction) + sum(_result_bytes(operand) for operand in operands)


def _is_in_memory(instruction: Instruction) -> bool:
    return not any(shape.on_chip for shape in instruction.shapes)


def _result_bytes(instruction: Instruction) -> float:
    return sum((shape.num_bytes for shape in instruction.shapes if not shape.on_chip), 0.0)


def _fusion_bytes(program: Program, around: Mapping[str, Instruction], instruction: Instruction) -> float:
    fused = program.computations[instruction.called("calls")[0]]
    total = 0.0
    for inner in fused.values():
        if inner.opcode == "parameter":
            whole = _result_bytes(around[instruction.operands[int(inner.operands[0])]])
            total += min(whole, _read_bytes(program, fused, inner)) if whole else 0.0
    root = next(inner for inner in fused.values() if inner.is_root)
    roots = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for part, shape in zip(roots, instruction.shapes, strict=False):
        if not shape.on_chip:
            total += min(shape.num_bytes, _written_bytes(program, fused, part))
    return total


def _read_bytes(program: Program, fused: Mapping[str, Instruction], array: Instruction) -> float:
    """Of an array that comes into a fusion, what is used there."""
    whole, total = sum(shape.num_bytes for shape in array.shapes), 0.0
    uses = [inner for inner in fused.values() if array.name in inner.operands]
    for use in uses:
        if use.opcode in _SLICES and use.operands[0] == array.name:
            total += use.shapes[0].num_bytes
        elif use.opcode == "bitcast":
            total += _read_bytes(program, fused, use)
        elif use.opcode == "fusion":
            called = program.computations[use.called("calls")[0]]
            for inner in called.values():
                if inner.opcode == "parameter" and use.operands[int(inner.operands[0])] == array.name:
                    total += _read_bytes(program, called, inner)
        elif not _updates(use, array.name):  # what is updated in place counts where it is written
            return whole
    return whole if array.is_root else min(whole, total)


def _written_bytes(program: Program, fused: Mapping[str, Instruction], result: Instruction) -> float:
    """Of a fusion's result, what is new."""
    if result.opcode == "bitcast" and result.operands[0] in fused:
        return _written_bytes(program, fused, fused[result.operands[0]])
    if result.opcode == "fusion":
        called = program.computations[result.called("calls")[0]]
        return _written_bytes(program, called, next(inner for inner in called.values() if inner.is_root))
    updated = fused[result.operands[1]] if result.opcode == "dynamic-update-slice" else result
    return sum((shape.num_bytes for shape in updated.shapes), 0.0)


def _updates(use: Instruction, name: str) -> bool:
    return use.opcode == "dynamic-update-slice" and use.operands[0] == name and use.operands[1] != name


@dataclass(frozen=True)
class Collective:
    """One exchange among a group of devices."""

    kind: str
    payload_bytes: float
    """Of the whole array, gathered or unreduced, on one device."""
    group: tuple[int, ...]
    """The places in the mesh, counted in its order, of the devices of the first group."""
    is_async: bool

    @property
    def wire_bytes(self) -> float:
        """What each device sends: an all-reduce is a reduce-scatter and an all-gather."""
        others = (len(self.group) - 1) / len(self.group)
        if self.kind == "collective-permute":
            return self.payload_bytes
        return self.payload_bytes * others * (2 if self.kind == "all-reduce" else 1)


def find_collectives(
    program: Program, computation: str, instruction: Instruction, num_devices: int
) -> Sequence[Collective]:
    """Those that an instruction starts: itself, or inside a fusion or an asynchronous wrapper."""
    if instruction.opcode.endswith("-done"):
        return ()
    found = []
    is_async = instruction.opcode.endswith("-start") or "async" in instruction.name
    for inner in (instruction, *inner_instructions(program, instruction)):
        kind = inner.opcode.removesuffix("-start")
        if kind not in COLLECTIVES or not inner.shapes:
            continue
        around = next(c for c in program.computations.values() if inner.name in c and c[inner.name] is inner)
        sizes = [shape.num_bytes for shape in inner.shapes]
        operands = [shape.num_bytes for name in inner.operands if name in around for shape in around[name].shapes]
        payload = sum(operands) if kind in ("reduce-scatter", "all-reduce", "all-to-all") else max(sizes)
        if kind == "all-reduce" and "all-reduce-scatter" in "".join([instruction.name, *instruction.called("calls")]):
            kind = "reduce-scatter"  # the TPU compiler's fusion of a reduction and the slice of it that is kept
        group = _first_group(inner.attributes, num_devices)
        if len(group) > 1:
            found.append(Collective(kind, payload, group, is_async or inner.opcode.endswith("-start")))
    return found


def _first_group(attributes: str, num_devices: int) -> tuple[int, ...]:
    """`{{0,1},{2,3}}` -> (0, 1); `[2,2]<=[2,2]T(1,0)` -> (0, 2); `mesh['a'=2,'b'=2] {'a'}` -> (0, 2), and of a part of
    an axis `mesh['a'=8] {'a':(2)2}` -> (0, 2); of a permutation, its first step that moves."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed:
        return tuple(int(i) for i in listed[1].split(","))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        shape, source = ([int(i) for i in text.split(",")] for text in iota.groups()[:2])
        ids = np.arange(math.prod(source)).reshape(source)
        if iota[3]:
            ids = ids.transpose([int(i) for i in iota[3].split(",")])
        return tuple(int(i) for i in ids.reshape(shape)[0])
    mesh = _MESH.search(attributes)
    if mesh:
        places = _mesh_group(mesh[1], mesh[4])
        if not mesh[2]:
            return places
        shape, order = ([int(i) for i in text.split(",")] for text in (mesh[2], mesh[3]))
        ids = np.arange(math.prod(shape)).reshape(shape).transpose(order).reshape(-1)
        return tuple(int(ids[place]) for place in places)
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
    if pairs:
        steps = [tuple(map(int, pair.split(","))) for pair in re.findall(r"\{?(\d+,\d+)", pairs[1])]
        return next((step for step in steps if step[0] != step[1]), (0,))
    return tuple(range(num_devices))


def _mesh_group(axes: str, spanned: str) -> tuple[int, ...]:
    """The first group along the axes in `spanned`, of devices counted over `axes`, the last fastest."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    strides, stride = {}, 1
    for name in reversed(sizes):
        strides[name] = stride
        stride *= sizes[name]
    ids = np.zeros(1, int)
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", spanned):
        size = int(part or sizes[name])
        step = strides[name] * (sizes[name] // (int(before) * size) if part else 1)
        ids = (ids[:, None] + step * np.arange(size)[None, :]).reshape(-1)
    return tuple(int(i) for i in ids)
