"""What `jaxblip plan` prints, and writes as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from jaxblip.planning.compilation import Compilation, Memory
from jaxblip.planning.hardware import CHIPS, GIB
from jaxblip.planning.plan import Plan, images_per_second, schedule
from jaxblip.planning.topologies import sizes_shown

MODELLED = "[modelled]"
GPUS = [name for name, chip in CHIPS.items() if chip.kind == "gpu"]
WITHOUT_CUDNN = (
    "compiled with XLA's attention, since cuDNN's compiles on a GPU only: with that a run needs "
    "less memory and traffic"
)
MEMORY_FIELDS = {
    "trainable": "parameters that train",
    "optimizer": "optimizer",
    "frozen": "frozen parameters",
    "batch": "batch",
    "temporary": "activations and other temporaries",
}


def lines(plan: Plan) -> Iterator[str]:
    """A plan for people; what was not compiled says so."""
    yield f"{plan.topology} ({plan.num_chips} chips)"
    if plan.topology.partition(":")[0] in GPUS:
        yield f"  {WITHOUT_CUDNN}"
    if plan.note:
        yield f"  not possible as configured: {plan.note}"
    if plan.asked is not None:
        yield from of_compilation(plan.asked, plan.steps)
    others = [each for each in plan.tried if each is not plan.asked]
    if others:
        yield "  tried besides:"
        yield from (f"    {one_line(each)}" for each in others)
    best = plan.best
    if best is None:
        yield "  Nothing that was tried fits."
    elif best is not plan.asked:
        yield f"  Best: {options(plan, best)}"
        yield from of_compilation(best, plan.steps)


def of_compilation(each: Compilation, steps: int) -> Iterator[str]:
    """One setting in full."""
    yield f"  {setting(each)} ({each.batch_size // _shards(each)} examples a chip)"
    if each.problem:
        yield f"    {each.problem}: {memory_breakdown(each.memory)}"
        return
    fit = "" if not each.memory.capacity else "fits: " if each.fits else "does not fit: "
    yield f"    {fit}{memory_breakdown(each.memory)}"
    if each.unread:
        yield f"    operations a step: {_big(each.operations)}, by the model"
        yield "    XLA cannot read this program back, so what it moves and its time stay unknown"
        return
    yield (
        f"    operations a step: {_big(each.operations)}, by the model; "
        f"{_big(each.operations_per_chip)} a chip as compiled"
    )
    moved = ", ".join(f"{kind} {_bytes(size)}" for kind, size in sorted(each.collectives.items()))
    yield f"    moved a chip and step: {moved or 'nothing'}; memory traffic {_bytes(each.traffic)}"
    if each.times:
        shown = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in each.times.items())
        least = f"{each.step_s:.3f} s, set by {each.bound}"
        yield f"    a step takes at least {least} ({shown}) {MODELLED}"
        whole = schedule(each, steps)
        yield (
            f"    at most {images_per_second(each):,.0f} images/s; {steps:,} steps in "
            f"{whole['days']:.1f} days or {whole['chip_hours']:,.0f} chip-hours at least {MODELLED}"
        )
    else:
        yield "    no data sheet of these devices, so no time is modelled"
    yield f"    compiled in {each.compile_s:.0f} s, traced in {each.trace_s:.0f} s"


def setting(each: Compilation) -> str:
    """Mesh, policy and batch."""
    remat = "" if each.remat == "none" else f", remat {each.remat}"
    return f"{sizes_shown(each.mesh)}{remat}, batch {each.batch_size:,}"


def options(plan: Plan, each: Compilation) -> str:
    """The options of the command line that make another setting of the config's."""
    asked = plan.asked
    words = [
        f"--config.mesh.{axis}={size}"
        for axis, size in each.mesh.items()
        if asked is None or size != asked.mesh[axis]
    ]
    if asked is None or each.remat != asked.remat:
        words += [f"--config.model.{part}.remat={each.remat}" for part in plan.parts]
    if asked is None or each.batch_size != asked.batch_size:
        words.append(f"--config.batch_size={each.batch_size}")
    return " ".join(words)


def one_line(each: Compilation) -> str:
    """A setting that was tried."""
    needs = f"{_gib(each.memory.total)} GiB a chip"
    if each.problem:
        return f"{setting(each)}: {each.problem} ({needs})"
    fit = "" if each.fits else "does not fit, "
    time = f", {each.step_s:.3f} s a step, set by {each.bound} {MODELLED}" if each.times else ""
    return f"{setting(each)}: {fit}{needs}{time}"


def memory_breakdown(memory: Memory) -> str:
    """`9.1 of 15.8 GiB a chip: parameters that train 0.7, …`."""
    of = f" of {_gib(memory.capacity)}" if memory.capacity else ""
    parts = ", ".join(
        f"{name} {_gib(getattr(memory, field))}" for field, name in MEMORY_FIELDS.items()
    )
    return f"{_gib(memory.total)}{of} GiB a chip: {parts}"


def as_json(plan: Plan) -> dict[str, Any]:
    """A plan for machines: bytes, seconds and operations."""
    tried = [of_json(each, plan.steps) for each in plan.tried]
    return {
        "topology": plan.topology,
        "num_chips": plan.num_chips,
        "steps": plan.steps,
        "note": plan.note,
        "asked": 0 if plan.asked else None,  # its place in `tried`
        "best": plan.tried.index(plan.best) if plan.best else None,
        "tried": tried,
    }


def of_json(each: Compilation, steps: int) -> dict[str, Any]:
    modelled = {}
    if each.times:
        modelled = {
            "times_s": each.times,
            "step_s": each.step_s,
            "bound": each.bound,
            "images_per_second": images_per_second(each),
            **schedule(each, steps),
        }
    fields = dataclasses.asdict(each)
    del fields["times"]
    fields["memory"] |= {"total": each.memory.total}
    return fields | {"fits": each.fits, "modelled": modelled}


def _shards(each: Compilation) -> int:
    return each.num_chips // each.mesh["tensor"]


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size < GIB else f"{size / GIB:.1f}"


def _bytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size < 1e12 else f"{size / 1e12:,.2f} TB"


def _big(operations: float) -> str:
    """`12.3 TFLOP`."""
    power = min(5, max(2, int(math.log10(max(operations, 1)) // 3)))
    return f"{operations / 1000**power:,.1f} {'MGTP'[power - 2]}FLOP"
