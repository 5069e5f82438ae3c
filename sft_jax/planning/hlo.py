"""The text of a compiled program -> its instructions, and how often each of them runs.

XLA's own cost analysis counts the body of a loop once. Here a loop's body counts as often as the loop says it runs:
in `known_trip_count`, or in where its counter starts, by how much it goes up, and the constant that its condition
compares it with. Where there is no constant, as in a loop whose end is data, the caller says how many rounds to count.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

ITEM_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4,
    "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "f8e4m3fn": 1, "f8e5m2": 1, "f8e4m3b11fnuz": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """One array. `on_chip`: it lies in the core's own memory (a TPU's VMEM or SMEM), not in HBM."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool

    @property
    def num_bytes(self) -> float:
        return float(math.prod(self.dims) * ITEM_BYTES[self.dtype])


@dataclass(frozen=True)
class Instruction:
    name: str
    shapes: tuple[Shape, ...]
    """Of its result: several where it is a tuple."""
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    """All that follows the operands."""
    is_root: bool

    def called(self, *keys: str) -> list[str]:
        """Names of the computations under any of these attributes."""
        found = re.findall(rf"\b(?:{'|'.join(keys)})=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.attributes)
        return [name.strip().lstrip("%") for group, single in found for name in (group or single).split(",")]

    @property
    def op_name(self) -> str:
        """Where it came from in the traced program, such as `jit(step)/while/body/dot_general`."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def estimated_cycles(self) -> int:
        """What the TPU compiler thinks that it takes; 0 where it does not say."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(match[1]) if match and int(match[1]) < 2**62 else 0


@dataclass
class Program:
    """All computations by name, each its instructions by name in order."""

    computations: dict[str, dict[str, Instruction]] = field(default_factory=dict)
    entry: str = ""
    source_lines: dict[int, str] = field(default_factory=dict)
    """`file.py:12` by stack frame."""

    def source_of(self, instruction: Instruction) -> str:
        """`file.py:12`, or an empty string where the compiler kept none."""
        match = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        if match:
            return self.source_lines.get(int(match[1]), "")
        match = re.search(r'source_file="([^"]*)" source_line=(\d+)', instruction.attributes)
        return f"{_short_path(match[1])}:{match[2]}" if match else ""


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?(?:->.*)?\{\s*$")
_FOOTER = re.compile(r"^\}(, execution_thread=.*)?$")
_ASSIGN = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b(" + "|".join(sorted(ITEM_BYTES, key=len, reverse=True)) + r")\[([\d,]*)\](\{[^}]*\})?")


def parse_program(text: str) -> Program:
    """What `compiled.as_text()` gives. An instruction may go over several lines, as kernels do."""
    program = Program(source_lines=_parse_source_lines(text))
    current: dict[str, Instruction] | None = None
    pending: list[str] = []

    def finish() -> None:
        if pending and current is not None:
            match = _ASSIGN.match(pending[0])
            assert match is not None
            rest = "\n".join(pending)[match.end() :]
            current[match[2]] = _parse_instruction(match[2], rest, bool(match[1]))
        pending.clear()

    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header and not line.startswith(" "):
                current = program.computations.setdefault(header[2], {})
                program.entry = header[2] if header[1] else program.entry
        elif _FOOTER.match(line):
            finish()
            current = None
        elif _ASSIGN.match(line):
            finish()
            pending.append(line)
        elif pending:
            pending.append(line)
    return program


def _parse_instruction(name: str, rest: str, is_root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    operands = rest[opening + 1 : closing]
    names = re.findall(r"%([\w.\-]+)", operands)
    opcode = rest[:opening]
    if opcode in ("parameter", "constant"):
        names = [operands]
    return Instruction(name, _parse_shapes(result), opcode, tuple(names), rest[closing + 1 :], is_root)


def _parse_shapes(text: str) -> tuple[Shape, ...]:
    shapes = []
    for dtype, dims, layout in _ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size) for size in dims.split(",") if size)
        shapes.append(Shape(dtype, sizes, bool(space) and space is not None and space[1] != "0"))
    return tuple(shapes)


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"{text[:80]!r}: a parenthesis is not closed")


def _parse_source_lines(text: str) -> dict[int, str]:
    """The tables at the head: stack frame -> location -> file."""

    def table(title: str) -> dict[int, str]:
        match = re.search(rf"^{title}\n((?:\d+ .*\n)+)", text, re.MULTILINE)
        rows = (line.split(" ", 1) for line in match[1].splitlines()) if match else ()
        return {int(number): value for number, value in rows}

    files, locations = table("FileNames"), table("FileLocations")
    found = {}
    for frame, value in table("StackFrames").items():
        match = re.search(r"file_location_id=(\d+)", value)
        location = locations.get(int(match[1]), "") if match else ""
        match = re.search(r"file_name_id=(\d+).*? line=(\d+)", location)
        if match:
            found[frame] = f"{_short_path(files[int(match[1])].strip(chr(34)))}:{match[2]}"
    return found


def _short_path(path: str) -> str:
    """From the package on: `sft_jax/training/step.py`."""
    parts = path.split("/")
    for root in ("sft_jax", "site-packages"):
        if root in parts[:-1]:
            start = len(parts) - 1 - parts[::-1].index(root, 1)
            return "/".join(parts[start + (root != "sft_jax") :])
    return path


@dataclass(frozen=True)
class Executed:
    """An instruction that a device runs, `times` in a step. `computation` is where it stands."""

    instruction: Instruction
    computation: str
    times: int


def walk_executed(program: Program, unknown_trips: int = 1) -> Iterator[Executed]:
    """Every instruction outside fusions, with the product of the trip counts of the loops around it. Of a conditional
    all branches are counted. What a fusion, a reduction or an asynchronous start computes inside is its own affair.

    Args:
      unknown_trips: rounds of a loop that does not say how many it has.
    """
    yield from _walk(program, program.entry, 1, unknown_trips)


def _walk(program: Program, computation: str, times: int, unknown_trips: int) -> Iterator[Executed]:
    for instruction in program.computations[computation].values():
        if instruction.opcode == "while":
            trips = count_trips(program, computation, instruction)
            inner = times * (unknown_trips if trips is None else trips)
            yield from _walk(program, instruction.called("body")[0], inner, unknown_trips)
        elif instruction.opcode in ("call", "conditional"):
            keys = ("to_apply", "branch_computations", "true_computation", "false_computation")
            for name in instruction.called(*keys):
                yield from _walk(program, name, times, unknown_trips)
        else:
            yield Executed(instruction, computation, times)


def count_trips(program: Program, computation: str, loop: Instruction) -> int | None:
    """Rounds of a `while` that stands in `computation`; None where its end is data. Its counter goes up by 1 from 0, as
    jax's do, where it does not say otherwise: the compiler writes loops of its own, some of which count by 2."""
    match = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes)
    if match:
        return int(match[1])
    condition = program.computations[loop.called("condition")[0]]
    compare, sides = _comparison(program, condition)
    if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
        return None
    bounds = [value for inside, name in sides if (value := _integer(program, inside, name, {})) is not None]
    if len(bounds) != 1:
        return None
    compared = {name for _, name in sides}
    counter = next((place for place, name in _carried(condition) if name in compared), None)
    start, step = _counting(program, program.computations[computation], loop, counter)
    return max(0, -(-(bounds[0] - start) // step))


def _comparison(
    program: Program, condition: dict[str, Instruction]
) -> tuple[Instruction, list[tuple[dict[str, Instruction], str]]]:
    """What ends a loop, and what it compares: names in its condition, or in a fusion that is all of it."""
    root = next(instruction for instruction in condition.values() if instruction.is_root)
    if root.opcode != "fusion":
        return root, [(condition, name) for name in root.operands]
    fused = program.computations[root.called("calls")[0]]
    compare = next(instruction for instruction in fused.values() if instruction.is_root)
    inner = [fused[name] for name in compare.operands if name in fused]
    outside = {i.name: root.operands[int(i.operands[0])] for i in inner if i.opcode == "parameter"}
    return compare, [(condition, outside[i.name]) if i.name in outside else (fused, i.name) for i in inner]


def _counting(
    program: Program, around: dict[str, Instruction], loop: Instruction, counter: int | None
) -> tuple[int, int]:
    """From where, and by how much, what a loop carries at the place `counter` goes up."""
    first = around.get(loop.operands[0])
    body = program.computations[loop.called("body")[0]]
    last = next(instruction for instruction in body.values() if instruction.is_root)
    if counter is None or first is None or first.opcode != "tuple" or last.opcode != "tuple":
        return 0, 1
    start = _integer(program, around, first.operands[counter], {})
    known = {name: 0 for place, name in _carried(body) if place == counter}
    step = _integer(program, body, last.operands[counter], known)
    return start or 0, step or 1


def _carried(computation: dict[str, Instruction]) -> Iterator[tuple[int, str]]:
    """(place, name) of what is taken from the one parameter of a loop's body or condition."""
    parameter = next((i.name for i in computation.values() if i.opcode == "parameter"), None)
    for instruction in computation.values():
        match = re.search(r"\bindex=(\d+)", instruction.attributes)
        if instruction.opcode == "get-tuple-element" and instruction.operands[0] == parameter and match:
            yield int(match[1]), instruction.name


def _integer(program: Program, computation: dict[str, Instruction], name: str, known: dict[str, int]) -> int | None:
    """Value of an integer that is made of constants and of what is known; None where it is not."""
    instruction = computation.get(name)
    if name in known or instruction is None:
        return known.get(name)
    if instruction.opcode == "constant":
        return int(instruction.operands[0]) if instruction.operands[0].lstrip("-").isdigit() else None
    if instruction.opcode not in ("add", "copy", "bitcast", "convert", "fusion"):
        return None
    values = [_integer(program, computation, operand, known) for operand in instruction.operands]
    if instruction.opcode == "fusion":
        fused = program.computations[instruction.called("calls")[0]]
        inner = {i.name: int(i.operands[0]) for i in fused.values() if i.opcode == "parameter"}
        given = {name: value for name, place in inner.items() if (value := values[place]) is not None}
        root = next(instruction.name for instruction in fused.values() if instruction.is_root)
        return _integer(program, fused, root, given)
    return None if None in values else sum(value for value in values if value is not None)


def inner_instructions(program: Program, instruction: Instruction) -> Iterator[Instruction]:
    """Those of the computations that a fusion or an asynchronous start calls, and of those that they call."""
    for name in instruction.called("calls"):
        for inner in program.computations[name].values():
            yield inner
            yield from inner_instructions(program, inner)
