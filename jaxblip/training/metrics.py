"""Metrics on disk: one JSON object a line, and TensorBoard event files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import jax
from tensorboardX import SummaryWriter

METRICS_FILE = "metrics.jsonl"
EVENTS_FOLDER = "tensorboard"


class MetricsWriter:
    """Appends scalars to `metrics.jsonl` and to TensorBoard files; only process 0 writes.

    A line is on its way to disk when `write` returns, so that it survives the death of the process.
    Write a step's metrics before saving its checkpoint: a run that resumes at the checkpoint then
    has the lines up to there, and drops the later ones, which it will write again.
    """

    def __init__(self, workdir: str | os.PathLike, resume_step: int = 0):
        """Opens the files.

        Args:
          workdir: the run's directory.
          resume_step: the checkpoint's step; later lines are dropped. 0 begins anew.
        """
        self._lines = self._events = None
        if jax.process_index() != 0:
            return
        folder = Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_FILE
        _keep_until(path, resume_step)
        self._lines = path.open("a", encoding="utf-8")
        # TensorBoard hides events from `purge_step` on that an earlier process wrote. The suffix
        # keeps that process's file, whose name otherwise tells only the second and the host.
        self._events = SummaryWriter(
            str(folder / EVENTS_FOLDER),
            purge_step=resume_step + 1,
            flush_secs=10,
            filename_suffix=f".from{resume_step}",
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes scalars under their names; numbers that are not finite become `null` in the JSON.

        Args:
          step: number of steps done.
          metrics: Python or numpy scalars, or arrays that hold one.
        """
        if self._lines is None:
            return
        values = {name: _number(value) for name, value in metrics.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._lines.write(json.dumps({"step": int(step), **finite}, allow_nan=False) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, int(step))

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._lines is not None:
            self._lines.close()
            self._events.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, float | None]]:
    """All complete lines of a work directory's `metrics.jsonl`, in their order."""
    path = Path(workdir) / METRICS_FILE
    return [json.loads(line) for line in _complete_lines(path)]


def _number(value: float) -> int | float:
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, int) else float(value)


def _complete_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    # A process that was killed while writing leaves a last line without its end.
    return [line for line in path.read_text("utf-8").splitlines(True) if line.endswith("\n")]


def _keep_until(path: Path, step: int) -> None:
    """Drops the lines of later steps, in one move."""
    kept = [line for line in _complete_lines(path) if json.loads(line)["step"] <= step]
    new = path.with_name(f".{path.name}.new")
    with new.open("w", encoding="utf-8") as file:
        file.writelines(kept if step else [])
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
