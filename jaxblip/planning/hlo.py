"""Reads the text of a compiled XLA program: its instructions, and how often each one runs."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

BITS = {"pred": 8, "token": 0, "opaque": 0}  # of types whose name does not end with them
_SHAPE = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([^\s=]+) = (.*)$")
_CALLED = re.compile(r"(calls|to_apply|body|condition|branch_computations|true_computation"
                     r"|false_computation)=(\{[^}]*\}|%?[\w.-]+)")  # fmt: skip
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array; what an instruction gives is one or, in a tuple, several."""

    dtype: str
    sizes: tuple[int, ...]
    memory_space: int  # 0 is the device's main memory

    @property
    def bytes(self) -> int:
        digits = re.search(r"\d+", self.dtype)
        bits = BITS.get(self.dtype, int(digits[0]) if digits else 8)
        return math.prod(self.sizes) * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    text_of_shape: str
    operands: tuple[str, ...]
    attributes: str  # all that stands behind the operands
    is_root: bool

    def called(self, *names: str) -> list[str]:
        """The computations that it calls under these attributes, or under any."""
        found = [(key, value) for key, value in _CALLED.findall(self.attributes)]
        return [
            part.strip().lstrip("%")
            for key, value in found
            if key in names or not names
            for part in value.strip("{}").split(",")
        ]


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, each a dict of instructions by name."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    @functools.cached_property
    def users(self) -> dict[str, dict[str, list[Instruction]]]:
        """Computation -> name -> the instructions of the computation that it is an operand of."""
        found = {}
        for computation, instructions in self.computations.items():
            found[computation] = collections.defaultdict(list)
            for each in instructions.values():
                for operand in dict.fromkeys(each.operands):
                    found[computation][operand].append(each)
        return found

    def shapes(self, computation: str, name: str) -> tuple[Shape, ...]:
        found = self.computations[computation].get(name)
        return found.shapes if found else ()


def parse(text: str) -> Program:
    """The program that `compiled.as_text()` prints."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            instruction = _instruction(bool(found[1]), found[2], found[3])
            current[instruction.name] = instruction
    return Program(computations, entry)


def _instruction(is_root: bool, name: str, text: str) -> Instruction:
    end = _closing(text) + 1 if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 1
    operands = tuple(re.findall(r"%([\w.-]+)", rest[:end])) if opcode != "constant" else ()
    attributes = rest[:end] if opcode in ("constant", "parameter") else rest[end + 1 :]
    return Instruction(name, opcode, tuple(shapes_of(shape)), shape, operands, attributes, is_root)


def shapes_of(text: str) -> Iterator[Shape]:
    """All arrays that a printed shape names."""
    for dtype, sizes, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        yield Shape(
            dtype, tuple(map(int, filter(None, sizes.split(",")))), int(space[1]) if space else 0
        )


def parts_of_tuple(text: str) -> list[str]:
    """What a printed tuple shape consists of; a shape that is none is its own only part."""
    if not text.startswith("("):
        return [text]
    parts, depth, begin = [], 0, 1
    for place, char in enumerate(text):
        depth += (char in "({[") - (char in ")}]")
        if (char == "," and depth == 1) or (char == ")" and depth == 0):
            parts.append(text[begin:place].strip())
            begin = place + 1
    return parts


def _closing(text: str) -> int:
    """Where the parenthesis closes that `text` begins with."""
    depth = 0
    for place in re.finditer(r"[()]", text):
        depth += 1 if place[0] == "(" else -1
        if not depth:
            return place.start()
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def executions(program: Program) -> dict[str, int]:
    """How often each computation runs in one run of the program, by its name.

    The bodies of loops count as often as they run, and those of fusions and calls as often as what
    calls them. The functions that reductions apply to elements are left out.
    """
    counts: collections.Counter[str] = collections.Counter()

    def visit(name: str, times: int) -> None:
        counts[name] += times
        for instruction in program.computations.get(name, {}).values():
            if instruction.opcode == "while":
                trips = _trip_count(program, name, instruction)
                for called in instruction.called("body"):
                    visit(called, times * trips)
            elif instruction.opcode in ("fusion", "call", "conditional", "async-start"):
                for called in instruction.called():
                    visit(called, times)

    visit(program.entry, 1)
    return dict(counts)


def _trip_count(program: Program, caller: str, loop: Instruction) -> int:
    """As the compiler notes it, or from `index < constant` in the loop's condition."""
    if noted := _TRIPS.search(loop.attributes):
        return int(noted[1])
    (condition,) = loop.called("condition")
    constants = [
        int(each.attributes)
        for name in (condition, *_fusions(program, condition))
        for each in program.computations[name].values()
        if each.opcode == "constant" and re.fullmatch(r"\d+", each.attributes)
    ]
    if len(constants) != 1:
        raise ValueError(f"the number of times that {loop.name} runs cannot be told")
    return constants[0]


def _fusions(program: Program, name: str) -> Iterator[str]:
    for each in program.computations[name].values():
        if each.opcode == "fusion":
            yield from each.called("calls")
