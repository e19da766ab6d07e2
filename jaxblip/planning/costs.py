"""What a compiled program costs one device: operations, bytes of memory, bytes of collectives."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from jaxblip.planning import hlo
from jaxblip.planning.hlo import Instruction, Program, Shape

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute",
)  # fmt: skip
# These move no bytes of memory, or what they call does.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
    "conditional", "after-all", "partition-id", "replica-id", "async-start", "async-update",
    "opt-barrier", "domain", "get-dimension-size",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program, on each device that takes part.

    Attributes:
      bytes: of the whole array on one device: the result, of a reduce-scatter the operand.
      group: devices that take part with device 0 of the group, by their place in the mesh.
      times: how often it runs in a step.
    """

    kind: str
    bytes: int
    group: tuple[int, ...]
    times: int


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one run of a program on one device."""

    operations: int  # of matrix products and convolutions
    memory_bytes: int  # read from and written to the device's main memory
    collectives: tuple[Collective, ...]


def costs(text: str, *, num_devices: int, is_tpu: bool = False) -> Costs:
    """Costs of the program that `compiled.as_text()` prints.

    Loops count as often as they run, which XLA's own `cost_analysis` does not. Arrays that a TPU
    program keeps in the chip's own small memory cost no bytes.
    """
    program = hlo.parse(text)
    times = hlo.executions(program)
    fused = _fused(program)
    operations = memory_bytes = 0
    for name, count in times.items():
        for instruction in program.computations.get(name, {}).values():
            operations += count * _operations(program, name, instruction)
            if name not in fused:
                memory_bytes += count * _memory_bytes(program, name, instruction, is_tpu)
    return Costs(operations, memory_bytes, tuple(_collectives(program, times, num_devices)))


def _fused(program: Program) -> set[str]:
    return {
        called
        for computation in program.computations.values()
        for each in computation.values()
        if each.opcode == "fusion"
        for called in each.called("calls")
    }


# Operations


def _operations(program: Program, name: str, each: Instruction) -> int:
    if each.opcode == "dot":
        return _dot(program, name, each, each.attributes)
    if each.opcode == "convolution":
        return _convolution(program, name, each)
    if each.opcode == "custom-call" and re.search(r"\$(lt\$)?(matmul|gemm)", each.attributes):
        return _dot(program, name, each, each.attributes)
    if each.opcode == "custom-call" and "$conv" in each.attributes:
        return _convolution(program, name, each)
    return 0


def _dot(program: Program, name: str, each: Instruction, attributes: str) -> int:
    left = program.shapes(name, each.operands[0])[0].sizes
    found = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][\[{]([^\]}]*)[\]}]', attributes)
    axes = map(int, re.findall(r"\d+", found[1]))
    return 2 * math.prod(left[axis] for axis in axes) * math.prod(each.shapes[0].sizes)


def _convolution(program: Program, name: str, each: Instruction) -> int:
    """Only products of what is there count, not those with padding and dilation."""
    first, second = (program.shapes(name, operand)[0].sizes for operand in each.operands[:2])
    left, kernel, output = first, second, each.shapes[0].sizes
    if "BackwardFilter" in each.attributes:  # cuDNN keeps the labels of the forward pass
        kernel, output = output, second
    elif "BackwardInput" in each.attributes:
        left, output = output, first
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.attributes)
    window = _window(each.attributes)
    pairs = 1
    for axis in sorted(set(labels[1]) & set("0123456789")):
        of_kernel = kernel[labels[2].index(axis)]
        of_output = output[labels[3].index(axis)]
        stride, low, input_dilation, kernel_dilation = (
            window[field][int(axis)] if field in window else default
            for field, default in (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))
        )
        place = stride * np.arange(of_output)[:, None] - low
        place = place + kernel_dilation * np.arange(of_kernel)[None]
        inside = (place >= 0) & (place <= (left[labels[1].index(axis)] - 1) * input_dilation)
        pairs *= int((inside & (place % input_dilation == 0)).sum())
    batch = output[labels[3].index("b")]
    features = output[labels[3].index("f")]
    groups = re.search(r"batch_group_count=(\d+)", each.attributes)
    per_group = kernel[labels[2].index("i")]  # features of a group already
    return 2 * batch * features * per_group * pairs // (int(groups[1]) if groups else 1)


def _window(attributes: str) -> dict[str, list[int]]:
    """The fields of `window={size=1x8 pad=0_0x7_7 …}`; of the padding that before the array."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    fields = (field.split("=") for field in (found[1].split() if found else ()))
    return {
        name: [int(part.split("_")[0]) for part in value.split("x")] for name, value in fields
    }


# Memory


def _memory_bytes(program: Program, name: str, each: Instruction, is_tpu: bool) -> int:
    """Bytes that an instruction outside of fusions reads and writes."""
    opcode = each.opcode
    if opcode in _FREE or opcode.endswith("-done") or opcode.removesuffix("-start") in COLLECTIVES:
        return 0

    def size(shapes) -> int:
        return sum(s.bytes for s in shapes if not (is_tpu and s.memory_space))

    if opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
        moved = list(hlo.shapes_of(hlo.parts_of_tuple(each.text_of_shape)[1]))
        return sum(s.bytes for s in moved)
    if opcode == "fusion":
        (called,) = each.called("calls")
        return _fusion_bytes(program, name, each, called, size)
    if opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * size(each.shapes)
    if opcode in ("dynamic-update-slice", "scatter"):
        update = each.operands[-1 if opcode == "scatter" else 1]
        return 2 * size(program.shapes(name, update))
    results = each.shapes
    if opcode == "custom-call":
        if not re.search(r"matmul|gemm|conv|tpu_custom", each.attributes):
            return 0  # marks of the compiler
        if "$" in each.attributes:
            results = results[:1]  # behind it stands the library's workspace
    return size(results) + sum(size(program.shapes(name, o)) for o in each.operands)


def _fusion_bytes(program: Program, name: str, each: Instruction, called: str, size) -> int:
    """Operands of which only slices are read count with these, and so does what is written."""
    total = 0
    for place, operand in enumerate(each.operands):
        whole = size(program.shapes(name, operand))
        read = _read(program, called, place) if whole else None
        total += whole if read is None else min(whole, read)
    return total + sum(size(shapes) for shapes in _written(program, called))


# What only changes how an array is seen, inside a fusion.
_SAME = ("bitcast", "reshape", "copy", "convert", "transpose")


def _read(program: Program, name: str, place: int) -> int | None:
    """Bytes that a fused computation reads of a parameter; None where that is all of it."""
    body = program.computations[name]
    parameters = (i for i in body.values() if i.opcode == "parameter")
    parameter = next((i for i in parameters if int(i.attributes) == place), None)
    return 0 if parameter is None else _read_of(program, name, parameter.name)


def _read_of(program: Program, computation: str, name: str) -> int | None:
    read = 0
    for user in program.users[computation].get(name, ()):
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            more = sum(shape.bytes for shape in user.shapes)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            more = 0  # in place
        elif user.opcode in _SAME:
            more = _read_of(program, computation, user.name)
        elif user.opcode == "fusion":
            inside = [
                _read(program, called, place)
                for called in user.called("calls")
                for place, operand in enumerate(user.operands)
                if operand == name
            ]
            more = None if None in inside else sum(inside)
        else:
            more = None
        if more is None:
            return None
        read += more
    return read


def _written(program: Program, name: str) -> Iterator[tuple[Shape, ...]]:
    """What a fused computation writes: of an array that it updates in place the update."""
    body = program.computations[name]
    (root,) = (each for each in body.values() if each.is_root)
    for part in [body[name] for name in root.operands] if root.opcode == "tuple" else [root]:
        origin = part
        while origin.opcode in _SAME and origin.operands[0] in body:
            origin = body[origin.operands[0]]
        if origin.opcode == "dynamic-update-slice":
            yield program.shapes(name, origin.operands[1])
        elif origin.opcode == "fusion":
            for called in origin.called("calls"):
                yield from _written(program, called)
        else:
            yield part.shapes


# Collectives


def _collectives(program: Program, times: dict[str, int], num_devices: int):
    """Those of a loop's body count as often as it runs.

    TPU programs repeat one collective in each of the fusions that hide it: of those with one
    channel that stand in fusions of the same computation, one counts.
    """
    owner = {
        called: name
        for name, computation in program.computations.items()
        for each in computation.values()
        if each.opcode == "fusion"
        for called in each.called("calls")
    }
    seen = set()
    for is_fused in (False, True):
        for name in times:
            if (name in owner) != is_fused:
                continue
            for each in program.computations.get(name, {}).values():
                kind = each.opcode.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                top = name
                while top in owner:
                    top = owner[top]
                channel = re.search(r"channel_id=(\d+)", each.attributes)
                key = (kind, channel and channel[1], top)
                if is_fused and key in seen:
                    continue
                seen.add(key)
                group = _group(each.attributes, num_devices)
                size = _array_bytes(each, kind, len(group))
                if len(group) > 1:
                    yield Collective(kind, size, group, times[top])


def _array_bytes(each: Instruction, kind: str, group_size: int) -> int:
    text = each.text_of_shape
    if each.opcode.endswith("-start") and kind != "all-reduce":
        text = hlo.parts_of_tuple(text)[1]  # (operands, results, …)
    size = sum(shape.bytes for shape in hlo.shapes_of(text))
    return size * group_size if kind == "reduce-scatter" else size


# [groups, devices]<=[sizes]T(permutation), and the axes of a mesh over which a group runs.
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")


def _group(attributes: str, num_devices: int) -> tuple[int, ...]:
    """The first group of devices; of a permutation the first pair that differs."""
    if pairs := re.search(r"source_target_pairs=\{([\d{},]*)\}", attributes):
        numbers = list(map(int, re.findall(r"\d+", pairs[1])))
        different = (p for p in zip(numbers[::2], numbers[1::2], strict=True) if p[0] != p[1])
        return next(different, (0,))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(map(int, listed[1].split(",")))
    if iota := _IOTA.search(attributes):
        sizes = [int(size) for size in iota[3].split(",")]
        ids = np.arange(math.prod(sizes)).reshape(sizes)
        if iota[4]:
            ids = ids.transpose([int(axis) for axis in iota[4].split(",")])
        return tuple(ids.reshape(int(iota[1]), int(iota[2]))[0].tolist())
    if mesh := _MESH.search(attributes):
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        ids = np.arange(math.prod(axes.values())).reshape(list(axes.values()))
        names = re.findall(r"'([^']+)'", mesh[2])
        chosen = tuple(slice(None) if axis in names else 0 for axis in axes)
        return tuple(np.ravel(ids[chosen]).tolist())
    return tuple(range(num_devices))
