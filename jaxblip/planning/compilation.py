"""Compiles the training step of a config for devices that need not be there, and measures it."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxblip import sharding
from jaxblip.planning import costs, roofline, topologies
from jaxblip.planning.hardware import GIB
from jaxblip.planning.operations import count_operations
from jaxblip.planning.topologies import Topology
from jaxblip.tasks import Task, make_task
from jaxblip.tasks.parts import network_sections, trains
from jaxblip.training.initialize import abstract_params
from jaxblip.training.optimizer import learning_rate, make_optimizer
from jaxblip.training.state import Params, TrainState, merge_params
from jaxblip.training.step import jit_step, make_train_step

# Vocabularies of the published models, for configs that leave them to the tokenizer.
BERT_VOCAB = 30_522
VOCABULARIES = {"clip": 49_408, "opt": 50_272, "llama": 32_000, "t5": 32_128}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip; the first four by the shardings, `temporary` by the compiler."""

    trainable: int
    optimizer: int
    frozen: int
    batch: int
    temporary: int = 0  # activations, gradients, and what is gathered just before use
    capacity: int = 0  # 0: not known

    @property
    def state(self) -> int:
        """All that lives as long as the run."""
        return self.trainable + self.optimizer + self.frozen

    @property
    def total(self) -> int:
        return self.state + self.batch + self.temporary

    @property
    def fits(self) -> bool:
        return not self.capacity or self.total <= self.capacity


@dataclasses.dataclass(frozen=True)
class Compilation:
    """The step of one setting on one topology.

    Attributes:
      operations: of the model in a step, on all chips, without what is computed again.
      operations_per_chip: compiled; with what is computed again, and by several chips.
      traffic: bytes that a chip reads from and writes to its memory.
      collectives: kind -> bytes on a chip.
      times: resource -> seconds that it needs for a step; {} where the chip's peaks are not known.
      unread: XLA could not read the compiled program back. Then there are neither traffic nor
        times, nor operations of a chip.
      problem: why it did not compile; then there are neither, too.
    """

    topology: str
    num_chips: int
    mesh: dict[str, int]
    batch_size: int
    remat: str
    memory: Memory
    operations: int
    operations_per_chip: int = 0
    traffic: int = 0
    collectives: dict[str, int] = dataclasses.field(default_factory=dict)
    times: dict[str, float] = dataclasses.field(default_factory=dict)
    trace_s: float = 0.0
    compile_s: float = 0.0
    unread: bool = False
    problem: str = ""

    @property
    def fits(self) -> bool:
        return not self.problem and self.memory.fits

    @property
    def step_s(self) -> float:
        """The least time of a step: that of the resource which needs longest."""
        return max(self.times.values(), default=math.nan)

    @property
    def bound(self) -> str:
        """The resource that sets it."""
        return max(self.times, key=self.times.get, default="")

    def largest_batch(self, accumulation_steps: int = 1) -> int:
        """Estimated: the largest batch that fits, since all but parameters grows with it; or 0."""
        each = (self.memory.total - self.memory.state) / self.batch_size
        room = min(self.memory.capacity, self.memory.total) - self.memory.state
        parts = self.num_chips // self.mesh["tensor"] * accumulation_steps
        # Less than would fill the memory to the last byte.
        return max(0, int(0.95 * room / each)) // parts * parts if each else 0

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Compilation:
        return cls(**{**saved, "memory": Memory(**saved["memory"])})


def with_full_vocabulary(config: ConfigDict) -> ConfigDict:
    """A copy with the vocabularies that the tokenizer would decide: those of the published models.

    A tokenizer that the run would train has `data.vocab_size` entries.
    """
    config = config.copy_and_resolve_references()
    for name, section in config.model.items():
        if isinstance(section, ConfigDict) and section.get("vocab_size") == 0:
            section.vocab_size = _vocabulary(config, name, section)
        if isinstance(section, ConfigDict) and section.get("start_token_id") == -1:
            section.start_token_id = 0
    text = config.model.get("qformer", config.model.get("text"))
    for field, back in (("dec_token_id", 1), ("enc_token_id", 2)):
        if config.model.get(field) == -1:
            config.model[field] = text.vocab_size - back
    return config


def _vocabulary(config: ConfigDict, name: str, section: ConfigDict) -> int:
    if name == "language_model":
        return VOCABULARIES[section.architecture]
    if config.task == "clip":
        return VOCABULARIES["clip"]
    return BERT_VOCAB + ("dec_token_id" in config.model) + ("enc_token_id" in config.model)


@dataclasses.dataclass(frozen=True)
class AbstractStep:
    """What a training step takes, as shapes: nothing is computed, read or downloaded."""

    task: Task
    optimizer: optax.GradientTransformation
    state: TrainState
    frozen: Params
    batch: dict[str, jax.ShapeDtypeStruct]

    @classmethod
    def of(cls, config: ConfigDict) -> AbstractStep:
        """Those of a config with its vocabularies (`with_full_vocabulary`)."""
        task, optimizer = make_task(config), make_optimizer(config)
        trainable, frozen = abstract_params(task)
        state = jax.eval_shape(
            lambda params: TrainState.create(params, optimizer, jax.random.key(0)), trainable
        )
        return cls(task, optimizer, state, frozen, task.batch_shapes(config.batch_size))

    def memory(self, sizes: Mapping[str, int]) -> Memory:
        """Bytes of a chip of what is there before a step, by the sharding rules.

        Args:
          sizes: of all axes of the mesh, none of them -1.
        """
        mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
        of_batch = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in self.batch.values())
        return Memory(
            trainable=_bytes(self.state.params, mesh),
            optimizer=_bytes(self.state.opt_state, mesh),
            frozen=_bytes(self.frozen, mesh),
            batch=of_batch // sharding.batch_shards(mesh),
        )


def _bytes(tree: Any, mesh: Any) -> int:
    """Bytes on one chip of a tree of parameters or moments."""
    total = 0
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = sharding.parameter_spec(name, leaf.shape, mesh)
        parts = math.prod(mesh.shape[axis] for axis in spec if axis)
        total += math.prod(leaf.shape) * leaf.dtype.itemsize // parts
    return total


def operations(config: ConfigDict) -> int:
    """Of the model in a step, forwards and backwards, without what is computed again."""
    step = AbstractStep.of(with_remat(config, "none"))

    def loss(trainable, frozen, batch, rng):
        return step.task.loss(merge_params(trainable, frozen), batch, rng).loss

    rng = jax.eval_shape(lambda: jax.random.key(0))
    return count_operations(jax.grad(loss), step.state.params, step.frozen, step.batch, rng)


def compile_step(
    config: ConfigDict, topology: Topology, devices: Sequence[jax.Device] | None = None
) -> Compilation:
    """Compiles the step that `jaxblip train` would run, for the mesh of the config.

    Args:
      config: with its vocabularies (`with_full_vocabulary`).
      devices: by default those of the topology.

    Raises:
      UserError: the mesh does not fit the number of devices or the batch.
    """
    devices = topologies.devices(topology) if devices is None else devices
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_batch_size(config.batch_size, mesh, config.optimizer.accumulation_steps)
    parts = AbstractStep.of(config)
    step = jit_step(
        make_train_step(
            parts.task, parts.optimizer, learning_rate(config), config.optimizer.accumulation_steps
        ),
        sharding.tree_shardings(parts.state, mesh),
        sharding.tree_shardings(parts.frozen, mesh),
        sharding.batch_sharding(mesh),
    )
    memory = dataclasses.replace(
        parts.memory(mesh.shape), capacity=topologies.capacity(topology)
    )
    found = Compilation(
        topology.name,
        mesh.size,
        dict(mesh.shape),
        config.batch_size,
        remat_of(config),
        memory,
        operations(config),
    )
    begin = time.perf_counter()
    traced = step.trace(parts.state, parts.frozen, parts.batch)
    lowered = traced.lower(lowering_platforms=(topology.platform,))
    found = dataclasses.replace(found, trace_s=time.perf_counter() - begin)
    begin = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = _too_large(found, str(error))
        return dataclasses.replace(found, compile_s=time.perf_counter() - begin)
    found = dataclasses.replace(found, compile_s=time.perf_counter() - begin)
    return _measured(found, topology, mesh, compiled)


def _measured(found: Compilation, topology: Topology, mesh: Mesh, compiled: Any) -> Compilation:
    analysis = compiled.memory_analysis()
    # Results that reuse no argument's memory are among what only the step needs.
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    memory = dataclasses.replace(
        found.memory, temporary=analysis.temp_size_in_bytes + max(0, results)
    )
    try:
        program = compiled.as_text()
    except jax.errors.JaxRuntimeError:  # of some of libtpu's, as with asynchronous parts for v5p
        return dataclasses.replace(found, memory=memory, unread=True)
    spent = costs.costs(program, num_devices=mesh.size, is_tpu=topology.platform == "tpu")
    moved: collections.Counter[str] = collections.Counter()
    for each in spent.collectives:
        moved[each.kind] += each.bytes * each.times
    return dataclasses.replace(
        found,
        memory=memory,
        operations_per_chip=spent.operations,
        traffic=spent.memory_bytes,
        collectives=dict(moved),
        times=roofline.times(topology, mesh, spent),
    )


def _too_large(found: Compilation, message: str) -> Compilation:
    """What TPU's compiler says of a program that does not fit: how much memory it wants in all.

    It calls that the memory for temporaries, but arguments are among it.
    """
    needed = re.search(r"memory required[^(]*\(([\d.]+)([MG])\)", message)
    total = float(needed[1]) * (GIB if needed[2] == "G" else 1 << 20) if needed else 0
    memory = found.memory
    memory = dataclasses.replace(memory, temporary=max(0, int(total) - memory.total))
    return dataclasses.replace(found, memory=memory, problem="does not fit")


# Rematerialisation


def remat_sections(config: ConfigDict) -> list[str]:
    """The parts of the model through which gradients flow, which can be told to compute again."""
    return [
        name
        for name, section in sorted(network_sections(config).items())
        # A frozen image encoder comes before all that trains: it has no backward pass.
        if "remat" in section
        and not (name == "vision" and not trains(config, "vision"))
    ]


def remat_of(config: ConfigDict) -> str:
    """The policy of these parts, or each with its own where they differ."""
    policies = {name: config.model[name].remat for name in remat_sections(config)}
    if len(set(policies.values())) < 2:
        return next(iter(policies.values()), "none")
    return ", ".join(f"{name} {policy}" for name, policy in policies.items())


def with_remat(config: ConfigDict, policy: str) -> ConfigDict:
    """A copy in which all of these have a policy."""
    config = config.copy_and_resolve_references()
    for name in remat_sections(config):
        config.model[name].remat = policy
    return config
