"""What a run says of itself: the terminal, the metrics files, and the stop at broken losses."""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Iterator, Mapping

import jax
from ml_collections import ConfigDict

from jaxblip.data.pipeline import TrainBatches
from jaxblip.data.samples import counts_as_text
from jaxblip.errors import RunStopped
from jaxblip.machine import available_cores
from jaxblip.training.chance import at_chance
from jaxblip.training.metrics import MetricsWriter, read_metrics
from jaxblip.training.progress import Progress, Throughput

# Share of its time that a step waits for data, above which the log says why.
_MUCH_WAITING = 0.1
# Steps that wait in the device's queue, so that it always has the next one. With more of them their
# batches fill its memory, and a run that must stop now has to compute them all before it can save.
_STEPS_AHEAD = 2
_UNGROUPED = ("learning_rate", "grad_norm", "skipped_total", "skipped_in_a_row")


class Monitor(contextlib.ExitStack):
    """Progress bar, `metrics.jsonl` and TensorBoard of one run; a context manager."""

    def __init__(self, config: ConfigDict, workdir: str, step: int):
        """Opens the files of `workdir` for a run that goes on from `step`."""
        super().__init__()
        self._config, self._workdir = config, workdir
        self._writer = self.enter_context(MetricsWriter(workdir, resume_step=step))
        self._progress = self.enter_context(Progress(config.steps, start_step=step))
        self._throughput = Throughput()
        self._said_slow = False
        # A run that goes on behind that step has said it.
        self._said_chance = step >= config.get("warn_at_chance_steps", 0)
        # The metrics of the steps that were handed to the device last.
        self._newest: collections.deque[Mapping[str, jax.Array]] = collections.deque()

    def message(self, text: str) -> None:
        """Prints a line."""
        self._progress.message(text)

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """The time inside counts as waiting for data, unless the device is busy to its end."""
        return self._throughput.waiting(self._device_is_idle)

    def _device_is_idle(self) -> bool:
        """Asked without waiting."""
        newest = self._newest[-1] if self._newest else {}
        return all(metric.is_ready() for metric in newest.values())

    def after_step(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Counts a step that was handed to the device, which need not have begun with it."""
        if not self._newest:
            jax.block_until_ready(metrics)
            self._throughput.reset()  # the compilation is no part of the speed
        else:
            self._throughput.step(self._config.batch_size)
        self._newest.append(metrics)
        if len(self._newest) > _STEPS_AHEAD:
            jax.block_until_ready(self._newest.popleft())
        self._progress.advance(step)

    def log(self, step: int, metrics: Mapping[str, jax.Array], batches: TrainBatches) -> None:
        """Shows and writes the metrics of a step; waits for the device.

        Raises:
          RunStopped: too many updates in a row were not finite.
        """
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        rates = self._throughput.read()
        self._writer.write(step, {**_grouped(values), **rates, **_data_counts(batches)})
        self._progress.log(step, {**values, **rates})
        self._check_finite(step, int(values["skipped_in_a_row"]))
        self._warn_at_chance(step, values)
        if not self._said_slow and rates.get("data_wait_share", 0.0) > _MUCH_WAITING:
            self._said_slow = True
            self.message(bottleneck(batches, rates, self._config.data.num_workers))

    def _check_finite(self, step: int, skipped: int) -> None:
        if skipped >= self._config.max_skipped_in_a_row:
            raise RunStopped(
                f"The loss or its gradient was not finite in {skipped} steps in a row, the last "
                f"of them step {step}; none of these updates was applied. Lower "
                "optimizer.peak_lr, set optimizer.clip_norm, or set compute_dtype to float32."
            )

    def _warn_at_chance(self, step: int, values: Mapping[str, float]) -> None:
        """Says once which losses sit at chance level, after `config.warn_at_chance_steps`."""
        after = self._config.get("warn_at_chance_steps", 0)
        if after and step >= after and not self._said_chance:
            self._said_chance = True
            for line in at_chance(self._config, step, values):
                self.message(line)

    def log_evaluation(self, step: int, results: Mapping[str, float]) -> None:
        """Shows and writes the results of an evaluation, whose time is no part of the speed."""
        self._writer.write(step, {f"eval/{name}": value for name, value in results.items()})
        text = "  ".join(f"{name} {value:.4g}" for name, value in results.items())
        self.message(f"step {step} evaluation: {text}")
        self._throughput.reset()

    def written_evaluation(self, step: int) -> dict[str, float]:
        """The evaluation of a step that an earlier process of this run has written; {} if none."""
        return {
            name.removeprefix("eval/"): value
            for line in read_metrics(self._workdir)
            if line["step"] == step
            for name, value in line.items()
            if name.startswith("eval/")
        }

    def end(self, step: int, batches: TrainBatches) -> None:
        """Says what the data was like and how the run ended."""
        for line in _data_report(batches):
            self.message(line)
        steps = self._config.steps
        if step < steps:
            self.message(
                f"Stopped by SIGTERM after step {step} of {steps}; saved. To go on, run the same "
                "command again."
            )
        else:
            self.message(
                f"Done: step {step} of {steps}; checkpoint and metrics are in {self._workdir}."
            )


def _grouped(metrics: Mapping[str, float]) -> dict[str, float]:
    """TensorBoard groups names by what stands before the slash."""
    return {n if n in _UNGROUPED else f"train/{n}": value for n, value in metrics.items()}


def bottleneck(batches: TrainBatches, rates: Mapping[str, float], num_workers: int) -> str:
    """Why steps wait for data, and how many workers would be enough.

    Args:
      rates: `data_wait_share` and `seconds_per_step`, as of `Throughput.read`.
    """
    work_s, waited = batches.seconds.total(), rates["data_wait_share"]
    stages = ", ".join(
        f"{stage} {seconds / work_s:.0%}" for stage, seconds in batches.seconds.most_common()
    )
    work_per_step_s = work_s / batches.batches_made
    step_s = rates["seconds_per_step"] * (1 - waited)
    enough = max(num_workers + 1, math.ceil(work_per_step_s / max(step_s, 1e-9)))
    cores = available_cores()
    line = (
        f"Steps wait for data {waited:.0%} of their time. Its preparation is {stages}; about "
        f"{enough} worker processes would be enough (data.num_workers={num_workers})"
    )
    if enough <= cores:
        return f"{line}."
    return (
        f"{line}, more than the {cores} cores here: smaller images on disk help "
        "(`jaxblip data prepare --resize`)."
    )


def _data_counts(batches: TrainBatches) -> dict[str, float]:
    counts = batches.skipped + batches.converted
    counted = {f"data/{name.replace(' ', '_')}": count for name, count in sorted(counts.items())}
    if batches.restarts:
        counted["data/worker_restarts"] = batches.restarts
    return counted | {f"data/share/{name}": share for name, share in batches.shares().items()}


def _data_report(batches: TrainBatches) -> Iterator[str]:
    for what, counter in (("skipped", batches.skipped), ("converted", batches.converted)):
        if counter:
            examined = batches.examined.total()
            yield f"Examples {what}: {counts_as_text(counter)} (of {examined} examined)."
    if shares := batches.shares():
        yield "Examples by source: " + ", ".join(f"{n} {share:.2%}" for n, share in shares.items())
    if batches.restarts:
        yield f"Worker processes that died and were replaced: {batches.restarts}."
