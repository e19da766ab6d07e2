"""`jaxblip train`: from a config to a finished run, top to bottom."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping

import jax
from ml_collections import ConfigDict

from jaxblip import sharding
from jaxblip.data import inputs
from jaxblip.data.pipeline import TrainBatches
from jaxblip.errors import RunStopped
from jaxblip.evaluation.evaluate import Evaluation
from jaxblip.training.checkpoints import Checkpoints
from jaxblip.training.initialize import frozen_params
from jaxblip.training.metrics import MetricsWriter, read_metrics
from jaxblip.training.progress import Progress, Throughput
from jaxblip.training.setup import (
    Setup,
    begin_or_resume,
    compiled_step,
    prepare,
    write_description,
)
from jaxblip.training.state import Params, TrainState

_UNGROUPED = ("learning_rate", "grad_norm", "skipped_total", "skipped_in_a_row")


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
    evaluation = Evaluation(setup.task, setup.tokenizer, mesh) if config.eval.source else None
    frozen, references = frozen_params(setup.task, mesh)
    write_description(setup)

    with contextlib.ExitStack() as stack:
        saved = stack.enter_context(_checkpoints(setup, references))
        state, position = begin_or_resume(setup, saved)
        step = begin = int(state.step)
        train_step = compiled_step(setup, state, frozen)
        process = sharding.process_shard(mesh)
        batches = stack.enter_context(
            inputs.train_batches(
                config, setup.task.fields, setup.source, setup.tokenizer, process, position
            )
        )
        writer = stack.enter_context(MetricsWriter(workdir, resume_step=step))
        progress = stack.enter_context(Progress(config.steps, start_step=step))
        must_stop = stack.enter_context(_stop_signal(saved))
        for line in _description(setup, state, frozen, evaluation):
            progress.message(line)

        def evaluate() -> dict[str, float]:
            results = evaluation.run(state.params, frozen)
            writer.write(step, {f"eval/{name}": value for name, value in results.items()})
            progress.message(f"step {step} evaluation: {_as_text(results)}")
            return results

        def evaluation_due() -> bool:
            every = config.eval.every_steps
            return evaluation is not None and (step == config.steps or _is_due(step, every))

        results: dict[str, float] = _written_evaluation(workdir, step)
        if begin and evaluation_due() and not results:
            results = evaluate()  # the run was stopped between this step and its evaluation

        throughput = Throughput()
        previous = None  # metrics of the step before, which the device has finished or soon will
        while step < config.steps:
            with throughput.waiting():
                batch = next(batches)
            state, metrics = train_step(state, frozen, sharding.put_batch(batch, mesh))
            step += 1
            if previous is None:
                jax.block_until_ready(metrics)
                throughput.reset()  # the compilation is no part of the speed
            else:
                throughput.step(config.batch_size)
                _stop_if_not_finite(previous, config, step - 1)
            previous = metrics
            progress.advance(step)

            last, stopping = step == config.steps, must_stop(step)
            if _is_due(step, config.log_every_steps) or last:
                values = {name: float(value) for name, value in metrics.items()}
                rates = throughput.read()
                writer.write(step, {**_grouped(values), **rates, **_counts(batches)})
                progress.log(step, {**values, **rates})
            evaluating = evaluation_due() and not stopping
            if evaluating:
                results = evaluate()
            if last or stopping or _is_due(step, config.checkpoint.every_steps):
                saved.save(step, state, batches.state(), results if evaluating else None)
            if evaluating:
                throughput.reset()
            if stopping:
                break

        saved.wait()
        if previous is not None:
            _stop_if_not_finite(previous, config, step)
        for line in _data_report(batches):
            progress.message(line)
        if step < config.steps:
            ending = (
                f"Stopped by SIGTERM after step {step} of {config.steps}; saved. To go on, run the "
                "same command again."
            )
        else:
            ending = f"Done: step {step} of {config.steps}; checkpoint and metrics are in {workdir}."
        progress.message(ending)
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


def _stop_if_not_finite(metrics: Mapping[str, jax.Array], config: ConfigDict, step: int) -> None:
    skipped = int(metrics["skipped_in_a_row"])
    if skipped >= config.max_skipped_in_a_row:
        raise RunStopped(
            f"The loss or its gradient was not finite in {skipped} steps in a row, the last of them "
            f"step {step}; none of these updates was applied. Lower optimizer.peak_lr, set "
            "optimizer.clip_norm, or set compute_dtype to float32."
        )


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _written_evaluation(workdir: str, step: int) -> dict[str, float]:
    """The evaluation of a step that an earlier process of this run has written; {} if none."""
    return {
        name.removeprefix("eval/"): value
        for line in read_metrics(workdir)
        if line["step"] == step
        for name, value in line.items()
        if name.startswith("eval/")
    }


def _grouped(metrics: Mapping[str, float]) -> dict[str, float]:
    """TensorBoard groups names by what stands before the slash."""
    return {n if n in _UNGROUPED else f"train/{n}": value for n, value in metrics.items()}


def _counts(batches: TrainBatches) -> dict[str, int]:
    counts = batches.skipped + batches.converted
    return {f"data/{name.replace(' ', '_')}": count for name, count in sorted(counts.items())}


def _as_text(results: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in results.items())


def _data_report(batches: TrainBatches) -> Iterator[str]:
    for what, counter in (("skipped", batches.skipped), ("converted", batches.converted)):
        if counter:
            reasons = ", ".join(f"{name} {count}" for name, count in counter.most_common())
            yield f"Examples {what}: {reasons} (of {batches.examined} examined)."


def _description(
    setup: Setup, state: TrainState, frozen: Params, evaluation: Evaluation | None
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
    if evaluation is not None:
        yield evaluation.describe()
    beginning = "Resuming at" if step else "Starting from"
    yield f"{beginning} step {step} of {config.steps} in {setup.workdir}."
