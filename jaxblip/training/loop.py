"""`jaxblip train`: from a config to a finished run, top to bottom."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import jax
from ml_collections import ConfigDict

from jaxblip import sharding
from jaxblip.config import MAY_CHANGE_ON_RESUME
from jaxblip.data import inputs
from jaxblip.data.tokenizers import save_tokenizer
from jaxblip.errors import RunStopped, UserError
from jaxblip.evaluation.evaluate import Evaluation
from jaxblip.tasks import make_task
from jaxblip.training import checkpoints, environment
from jaxblip.training.initialize import abstract_params, frozen_params, initial_trainable
from jaxblip.training.metrics import MetricsWriter
from jaxblip.training.optimizer import learning_rate, make_optimizer
from jaxblip.training.progress import Progress, Throughput
from jaxblip.training.state import TrainState
from jaxblip.training.step import jit_step, make_train_step


def train(config: ConfigDict, workdir: str) -> dict[str, float]:
    """Trains, or goes on training, in a work directory; returns the metrics of the last evaluation.

    A run that was killed and is started again with the same arguments ends with the same bits as
    one that was not.

    Raises:
      UserError: config, data or work directory cannot be used; raised before anything compiles.
      RunStopped: too many bad samples, or too many updates in a row that were not finite.
    """
    # What can be wrong is looked at first, the cheapest first.
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch_size(config.batch_size, mesh, config.optimizer.accumulation_steps)
    schedule = learning_rate(config)
    source = inputs.open_train_source(config)
    tokenizer = inputs.run_tokenizer(config, workdir, source)
    config = inputs.with_vocabulary(config, tokenizer)
    checkpoints.check_same_config(workdir, config.to_dict(), ignore=MAY_CHANGE_ON_RESUME)
    task = make_task(config)
    evaluation = Evaluation(task, tokenizer, mesh) if config.eval.source else None
    frozen, references = frozen_params(task, mesh)

    if jax.process_index() == 0:
        checkpoints.save_config(workdir, config.to_dict())
        environment.save_environment(workdir)
        save_tokenizer(tokenizer, Path(workdir) / inputs.TOKENIZER_FOLDER)

    with contextlib.ExitStack() as stack:
        saved = stack.enter_context(_open_checkpoints(workdir, config, references))
        optimizer = make_optimizer(config)
        state, position = _begin_or_resume(task, optimizer, mesh, saved)
        step = int(state.step)
        state_shardings = sharding.tree_shardings(state, mesh)
        train_step = jit_step(
            make_train_step(task, optimizer, schedule, config.optimizer.accumulation_steps),
            state_shardings,
            sharding.tree_shardings(frozen, mesh),
            sharding.batch_sharding(mesh),
        )
        process = sharding.process_shard(mesh)
        batches = stack.enter_context(
            inputs.train_batches(config, task.fields, source, tokenizer, process, position)
        )
        writer = stack.enter_context(MetricsWriter(workdir, resume_step=step))
        progress = stack.enter_context(Progress(config.steps, start_step=step))
        stop_requested = stack.enter_context(_sigterm_as_flag())
        _announce(progress, config, workdir, task, state, frozen, mesh, step)

        results: dict[str, float] = {}
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

            last = step == config.steps
            preempted = stop_requested() or saved.reached_preemption(step)
            if step % config.log_every_steps == 0 or last:
                values = {name: float(value) for name, value in metrics.items()}
                rates = throughput.read()
                writer.write(step, {**_train_names(values), **rates, **_counts(batches)})
                progress.log(step, {**values, **rates})
            evaluated = evaluation and (last or _is_due(step, config.eval.every_steps))
            if evaluated and not preempted:
                results = evaluation.run(state.params, frozen)
                writer.write(step, {f"eval/{name}": value for name, value in results.items()})
                progress.message(f"step {step} evaluation: {_as_text(results)}")
            if last or preempted or _is_due(step, config.checkpoint.every_steps):
                saved.save(step, state, batches.state(), results if evaluated else None)
            if evaluated or preempted:
                throughput.reset()
            if preempted and not last:
                saved.wait()
                progress.message(
                    f"Stopped by SIGTERM after step {step} of {config.steps}; saved. To go on, run "
                    "the same command again."
                )
                return results
        if previous is not None:
            _stop_if_not_finite(previous, config, step)
        saved.wait()
        _report_data(progress, batches)
        progress.message(f"Done: {config.steps} steps; checkpoint and metrics are in {workdir}.")
    return results


def _open_checkpoints(workdir, config, references) -> checkpoints.Checkpoints:
    return checkpoints.Checkpoints(
        workdir,
        keep_last=config.checkpoint.keep_last,
        best_metric=config.checkpoint.best_metric,
        best_mode=config.checkpoint.best_mode,
        keep_best=config.checkpoint.keep_best,
        frozen=references,
    )


def _begin_or_resume(task, optimizer, mesh, saved):
    """The state on the mesh, and the position of the data (None at the beginning)."""

    def create(params):
        return TrainState.create(params, optimizer, jax.random.key(task.config.seed))

    if saved.latest_step() is None:
        params = initial_trainable(task, mesh)
        shardings = sharding.tree_shardings(jax.eval_shape(create, params), mesh)
        return jax.jit(create, out_shardings=shardings, donate_argnums=0)(params), None
    shapes = jax.eval_shape(create, abstract_params(task)[0])
    shardings = sharding.tree_shardings(shapes, mesh)
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        shardings,
    )
    return saved.restore(abstract)


@contextlib.contextmanager
def _sigterm_as_flag() -> Iterator:
    """A function that says whether SIGTERM has come; the step that is running ends first."""
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop_if_not_finite(metrics, config, step):
    skipped = int(metrics["skipped_in_a_row"])
    if skipped >= config.max_skipped_in_a_row:
        raise RunStopped(
            f"The loss or its gradient was not finite in {skipped} steps in a row, the last of them "
            f"step {step}; the parameters are those from before. Lower optimizer.peak_lr, set "
            "optimizer.clip_norm, or set compute_dtype to float32; the last checkpoint is intact."
        )


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _train_names(metrics):
    plain = ("learning_rate", "grad_norm", "skipped_total", "skipped_in_a_row")
    return {name if name in plain else f"train/{name}": v for name, v in metrics.items()}


def _counts(batches):
    counts = batches.skipped + batches.converted
    return {f"data/{name.replace(' ', '_')}": count for name, count in sorted(counts.items())}


def _as_text(results):
    return "  ".join(f"{name} {value:.4g}" for name, value in results.items())


def _report_data(progress, batches):
    for what, counter in (("skipped", batches.skipped), ("converted", batches.converted)):
        if counter:
            reasons = ", ".join(f"{name} {count}" for name, count in counter.most_common())
            progress.message(f"Examples {what}: {reasons} (of {batches.examined} examined).")


def _announce(progress, config, workdir, task, state, frozen, mesh, step):
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    progress.message(
        f"Task {config.task}: {count(state.params):,} parameters train, {count(frozen):,} are "
        f"frozen. {mesh.size} {mesh.devices.flat[0].platform} device(s): {axes}. "
        f"{'Resuming at' if step else 'Starting from'} step {step} of {config.steps} in {workdir}."
    )
    for line in sharding.replicated_report(state.params, mesh):
        progress.message(line)
