"""`jaxblip train`: from a config to a finished run, top to bottom."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxblip import sharding
from jaxblip.data import inputs
from jaxblip.data.features import check_encoder
from jaxblip.data.pipeline import TrainBatches
from jaxblip.evaluation.evaluate import Evaluations
from jaxblip.planning.shortage import explained_shortage
from jaxblip.training.checkpoints import Checkpoints
from jaxblip.training.initialize import frozen_params
from jaxblip.training.monitor import Monitor
from jaxblip.training.setup import (
    Setup,
    begin_or_resume,
    compiled_step,
    files_undone_unless_kept,
    prepare,
    write_description,
)
from jaxblip.training.state import Params, TrainState


def train(config: ConfigDict, workdir: str) -> dict[str, float]:
    """Trains, or goes on training, in a work directory; returns the last evaluation's metrics.

    A run that was killed and is started again with the same arguments ends with the same bits as
    one that was not.

    Raises:
      UserError: config, data or work directory cannot be used; raised before anything compiles.
      RunStopped: too many bad samples, or too many updates in a row that were not finite.
    """
    setup = prepare(config, workdir)
    config, mesh = setup.config, setup.mesh
    evaluations = Evaluations(setup.task, setup.tokenizer, mesh, setup.qformer_tokenizer)
    evaluations.check_metric(config.checkpoint.best_metric)
    frozen, references = frozen_params(setup.task, mesh)
    if config.data.get("features"):
        check_encoder(setup.sources, references["vision"])
        if not evaluations:
            del frozen["vision"]  # which nothing reads any more

    with contextlib.ExitStack() as stack:
        keep_files = stack.enter_context(files_undone_unless_kept(workdir))
        write_description(setup)
        saved = stack.enter_context(_checkpoints(setup, references))
        state, position = begin_or_resume(setup, saved)
        step = begin = int(state.step)
        train_step = compiled_step(setup, state, frozen)
        batches = stack.enter_context(_batches(setup, position))
        monitor = stack.enter_context(Monitor(config, workdir, step))
        must_stop = stack.enter_context(_stop_signal(saved))
        for line in _description(setup, state, frozen, evaluations):
            monitor.message(line)

        def evaluation_due() -> bool:
            every = config.eval.every_steps
            return bool(evaluations) and (step == config.steps or _is_due(step, every))

        def evaluate() -> dict[str, float]:
            results = evaluations.run(state.params, frozen)
            monitor.log_evaluation(step, results)
            return results

        results: dict[str, float] = monitor.written_evaluation(step)
        if begin and evaluation_due() and not results:
            results = evaluate()  # the run was stopped between this step and its evaluation

        while step < config.steps:
            with monitor.waiting():
                batch = next(batches)
            with explained_shortage(config):
                state, metrics = train_step(state, frozen, sharding.put_batch(batch, mesh))
            step += 1
            monitor.after_step(step, metrics)
            keep_files()  # of a start that fails before its first step nothing is left
            last, stopping = step == config.steps, must_stop(step)
            if last or _is_due(step, config.log_every_steps):
                monitor.log(step, metrics, batches)
            evaluating = evaluation_due() and not stopping
            if evaluating:
                results = evaluate()
            if last or stopping or _is_due(step, config.checkpoint.every_steps):
                saved.save(step, state, batches.state(), results if evaluating else None)
            if stopping:
                break

        saved.wait()
        monitor.end(step, batches)
    return results


def _checkpoints(setup: Setup, references: Mapping[str, Mapping[str, str]]) -> Checkpoints:
    settings = setup.config.checkpoint
    return Checkpoints(
        setup.workdir,
        keep_last=settings.keep_last,
        best_metric=settings.best_metric,
        best_mode=settings.best_mode,
        keep_best=settings.keep_best,
        frozen=references,
    )


def _batches(setup: Setup, position: dict[str, Any] | None) -> TrainBatches:
    return inputs.train_batches(
        setup.config,
        setup.task.fields,
        setup.sources,
        setup.tokenizer,
        sharding.process_shard(setup.mesh),
        position,
        setup.qformer_tokenizer,
    )


@contextlib.contextmanager
def _stop_signal(saved: Checkpoints) -> Iterator[Callable[[int], bool]]:
    """A function of the step that says whether the run must save and stop now.

    With `jax.distributed` its own handler of SIGTERM makes all processes agree on a step; alone,
    a process stops after the step that is running.
    """
    if jax.distributed.is_initialized():
        yield saved.reached_preemption
        return
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield lambda step: bool(received)
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _description(
    setup: Setup, state: TrainState, frozen: Params, evaluations: Evaluations
) -> Iterator[str]:
    """What the run is, in a few lines."""

    def size(tree: Params) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    config, mesh, step = setup.config, setup.mesh, int(state.step)
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    yield (
        f"Task {config.task}: {size(state.params):,} parameters train, {size(frozen):,} are "
        f"frozen; {mesh.size} {mesh.devices.flat[0].platform} device(s), mesh {axes}."
    )
    yield from sharding.replicated_report(state.params, mesh)
    if config.data.get("features"):
        yield f"Steps do without the image encoder: its output is in {config.data.features}."
    yield from evaluations.describe()
    if not evaluations:
        yield (
            "No evaluation: --config.eval.source=FILE names a source for it, "
            "--config.eval.heldout_examples=500 keeps the last 500 examples of data.train for it."
        )
    beginning = "Resuming at" if step else "Starting from"
    yield f"{beginning} step {step} of {config.steps} in {setup.workdir}."
