"""Does a run fit, how long may it take, and which mesh or rematerialisation would do better?"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
from ml_collections import ConfigDict

from jaxblip import sharding
from jaxblip.errors import UserError
from jaxblip.models.layers import REMAT_POLICIES
from jaxblip.planning import compilation, topologies
from jaxblip.planning.compilation import AbstractStep, Compilation, Memory
from jaxblip.planning.topologies import Topology
from jaxblip.planning.worker import compile_apart
from jaxblip.tasks.parts import network_sections, trains

Compile = Callable[[ConfigDict, Topology], Compilation]

# Guesses for the order of trying, no more: what a policy leaves of the temporary values, and how
# much longer it makes the step.
_LEFT = {"none": 1.0, "dots": 0.7, "dots_with_no_batch_dims": 0.6, "full": 0.35}
_SLOWER = {"none": 1.0, "dots": 1.05, "dots_with_no_batch_dims": 1.1, "full": 1.3}
_TENSOR = (1, 2, 4, 8, 16)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is varied: all else is the config's."""

    mesh: tuple[int, int, int]  # along sharding.AXES
    remat: str
    batch_size: int

    @property
    def sizes(self) -> dict[str, int]:
        return dict(zip(sharding.AXES, self.mesh, strict=True))

    @property
    def rows(self) -> int:
        """Examples on each device."""
        return self.batch_size // math.prod(self.sizes[axis] for axis in sharding.BATCH_AXES)

    def of(self, config: ConfigDict) -> ConfigDict:
        """The config with this setting."""
        if self.remat != compilation.remat_of(config):
            config = compilation.with_remat(config, self.remat)
        config = config.copy_and_resolve_references()
        config.batch_size = self.batch_size
        config.mesh.update(self.sizes)
        return config


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was asked about, and what was tried besides.

    Attributes:
      asked: None where the config's batch cannot be split over its mesh, as `note` says.
      tried: `asked` first.
      parts: of the model that have a rematerialisation policy.
    """

    topology: str
    num_chips: int
    steps: int
    asked: Compilation | None
    tried: tuple[Compilation, ...]
    parts: tuple[str, ...] = ()
    note: str = ""

    @property
    def best(self) -> Compilation | None:
        """Of those that fit the one with most images a second; the first where that is unknown."""
        fitting = [each for each in self.tried if each.fits]
        return max(fitting, key=images_per_second, default=None)


def images_per_second(each: Compilation) -> float:
    """At most, by the peaks; 0 where they are not known."""
    return 0.0 if math.isnan(each.step_s) else each.batch_size / each.step_s


def plan(
    config: ConfigDict,
    topology: Topology,
    *,
    tries: int = 3,
    is_asked_mesh: bool = False,
    compile_step: Compile | None = None,
) -> Plan:
    """Compiles the step as the config has it, and others where it does not fit or waits.

    Args:
      config: of a run; sizes of vocabularies that it leaves open become those of published models.
      tries: compilations besides that of the config.
      is_asked_mesh: the mesh is the user's wish, so that a batch which it cannot split is an error.
      compile_step: of a config on a topology; by default in a process of its own, but for the
        devices at hand.

    Raises:
      UserError: the mesh wastes devices, or the config cannot be used.
    """
    config = compilation.with_full_vocabulary(config)
    topologies.check_installed(topology)
    if compile_step is None:
        compile_step = compile_apart if topology.chip else compilation.compile_step
    num_chips = topology.num_chips
    sizes = sharding.mesh_sizes(config.mesh, num_chips)
    asked = Setting(tuple(sizes.values()), compilation.remat_of(config), config.batch_size)
    note, tried = "", []
    accumulation = config.optimizer.accumulation_steps
    mesh = jax.sharding.AbstractMesh(asked.mesh, sharding.AXES)
    try:
        sharding.check_batch_size(config.batch_size, mesh, accumulation)
    except UserError as error:
        if is_asked_mesh:
            raise
        note = str(error)
    search = _Search(config, topology, asked)
    if not note:
        tried.append(search.compile(asked, compile_step))
    while len(tried) - (not note) < tries and not _is_good(tried):
        following = search.next()
        if following is None:
            break
        tried.append(search.compile(following, compile_step))
    return Plan(
        topology.name,
        num_chips,
        config.steps,
        None if note else tried[0],
        tuple(tried),
        tuple(compilation.remat_sections(config)),
        note,
    )


def _is_good(tried: list[Compilation]) -> bool:
    """Whether one fits that does not wait for the network, or of which this is not known."""
    return any(each.fits and each.bound != "network" for each in tried)


class _Search:
    """Settings in the order of what is guessed of them, corrected by what was compiled."""

    def __init__(self, config: ConfigDict, topology: Topology, asked: Setting):
        self.config, self.topology, self.asked = config, topology, asked
        self.done: dict[Setting, Compilation] = {}
        self.step = AbstractStep.of(config)
        self.memory: dict[tuple[int, ...], Memory] = {}
        self.capacity = topologies.capacity(topology)
        self.whole = self.state((1, 1, 1))

    def state(self, mesh: tuple[int, int, int]) -> Memory:
        if mesh not in self.memory:
            sizes = dict(zip(sharding.AXES, mesh, strict=True))
            self.memory[mesh] = self.step.memory(sizes)
        return self.memory[mesh]

    def compile(self, setting: Setting, compile_step: Compile) -> Compilation:
        memory = dataclasses.replace(self.state(setting.mesh), capacity=self.capacity)
        if self.capacity and memory.state > self.capacity:
            found = Compilation(
                self.topology.name, math.prod(setting.mesh), setting.sizes, setting.batch_size,
                setting.remat, memory, operations=0,
                problem="parameters and optimizer alone do not fit; not compiled",
            )  # fmt: skip
        else:
            found = compile_step(setting.of(self.config), self.topology)
        self.done[setting] = found
        return found

    def next(self) -> Setting | None:
        """The setting that promises most of those that were not tried."""
        rest = [each for each in self.candidates() if each not in self.done]
        fitting = [each for each in rest if self.guessed_memory(each) <= 0.95 * self.capacity]
        best = [found for found in self.done.values() if found.fits]
        if best:  # something else is worth a trial only if it promises more
            seconds = min(found.times.get("network", 0.0) / found.batch_size for found in best)
            guess = min(
                self.guessed_seconds(setting) / setting.batch_size
                for setting, found in self.done.items()
                if found.fits and found.times.get("network", 0.0) / found.batch_size == seconds
            )
            fitting = [
                each for each in fitting
                if self.guessed_seconds(each) / each.batch_size < 0.95 * guess
            ]  # fmt: skip
        elif not fitting:
            return min(rest, key=self.guessed_memory, default=None)
        return min(fitting, key=self.order, default=None)

    def order(self, each: Setting) -> tuple[float, ...]:
        other_batch = each.batch_size != self.asked.batch_size
        return (self.guessed_seconds(each) / each.batch_size, other_batch)

    def candidates(self) -> Iterator[Setting]:
        """All meshes of powers of two that split the batch, or one near it, and all policies."""
        chips = math.prod(self.asked.mesh)
        accumulation = self.config.optimizer.accumulation_steps
        batches = [self.asked.batch_size]
        if batches[0] % (chips * accumulation):
            batches.append(max(1, round(batches[0] / chips / accumulation)) * chips * accumulation)
        has_parts = bool(compilation.remat_sections(self.config))
        policies = REMAT_POLICIES if has_parts else (self.asked.remat,)
        for batch, policy, tensor in itertools.product(batches, policies, _TENSOR):
            for fsdp in _divisors(chips // tensor) if chips % tensor == 0 else ():
                shards = chips // tensor
                if batch % (shards * accumulation) == 0:
                    yield Setting((shards // fsdp, fsdp, tensor), policy, batch)

    def guessed_memory(self, each: Setting) -> float:
        """State exactly; the rest in proportion to what the compiler said of another setting."""
        fixed = self.state(each.mesh)
        known = [
            (found.memory.temporary, setting)
            for setting, found in self.done.items()
            if found.memory.temporary
        ]
        if not known:
            return fixed.state
        guesses = [
            temporary * each.rows / other.rows * _LEFT[each.remat] / _LEFT.get(other.remat, 1.0)
            for temporary, other in known
        ]
        return fixed.state + max(guesses)

    def guessed_seconds(self, each: Setting) -> float:
        """In units of bytes sent by a chip: parameters, gradients, and activations by `tensor`."""
        sizes, whole = each.sizes, self.whole
        moved = 0.0
        if sizes["fsdp"] > 1:  # gathered forwards and backwards; gradients scattered
            moved += (2 * (whole.frozen + whole.trainable) + whole.trainable) / sizes["tensor"]
        if sizes["data"] > 1:
            moved += 2 * whole.trainable / (sizes["fsdp"] * sizes["tensor"])
        if sizes["tensor"] > 1:
            moved += each.rows * _activation_bytes(self.config)
        return moved * _SLOWER.get(each.remat, 1.0)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _activation_bytes(config: ConfigDict) -> float:
    """Bytes an example that `tensor` sums: twice a block, forwards and backwards."""
    total = 0.0
    sections = network_sections(config)
    queries = sections.get("qformer", {}).get("num_query_tokens", 0)
    queries += sections.get("perceiver", {}).get("num_latents", 0)
    for name, section in sections.items():
        if "num_layers" not in section:
            continue
        length = config.data.max_text_tokens + queries
        if "patch_size_px" in section:
            length = (config.data.image_size_px // section.patch_size_px) ** 2 + 1
        passes = 1 if name == "vision" and not trains(config, name) else 2
        layers = section.num_layers + section.get("num_decoder_layers", 0)
        width = section.width if "width" in section else config.model.vision.width
        total += 2 * 2 * 2 * passes * layers * length * width
    return total


def schedule(each: Compilation, steps: int) -> Mapping[str, float]:
    """What the whole run takes at least: `days` and `chip_hours`."""
    seconds = each.step_s * steps
    return {"days": seconds / 86_400, "chip_hours": seconds * each.num_chips / 3600}


def mesh_of(text: str) -> dict[str, int]:
    """`data=16,fsdp=16` as sizes; an axis that is not named has size 1.

    Raises:
      UserError: it is not of this form.
    """
    sizes = dict.fromkeys(sharding.AXES, 1)
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in sizes or not size.removeprefix("-").isdigit():
            raise UserError(
                f"--mesh={text} is no mesh: name sizes of {', '.join(sharding.AXES)}, as in "
                "--mesh=data=16,fsdp=16; -1 for one of them is the rest."
            )
        sizes[axis] = int(size)
    return sizes


def write_json(path: str, value: object) -> None:
    """Writes it, or ends with a sentence."""
    try:
        Path(path).write_text(json.dumps(value, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--json={path} cannot be written: {error.strerror}.") from error
