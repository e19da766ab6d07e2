"""What the terminal shows while a run goes on, and the clock behind its rates."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import jax
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

_COMPILING = Text("compiling the step")  # below the bar until a step is done
# In metrics.jsonl and TensorBoard, but too much for one line.
NOT_SHOWN = ("grad_norm", "skipped_in_a_row", "skipped_total", "seconds_per_step")


class Throughput:
    """Rates between two reads: images a second, and the share of time spent waiting for data.

    Call `reset` when the first step is done, so that its compilation does not count, and after
    pauses such as evaluations. Steps run in the background of Python: read the metrics of the last
    step before `read`, or the clock runs ahead of the device.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        """Begins a new interval, forgetting the current one."""
        self._begin = self._clock()
        self._steps = self._images = 0
        self._waited_s = 0.0

    @contextmanager
    def waiting(self, counts: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """The time inside counts as waiting for data, where `counts` says so at its end."""
        begin = self._clock()
        try:
            yield
        finally:
            if counts():
                self._waited_s += self._clock() - begin

    def step(self, images: int) -> None:
        """Counts a step over a global batch of so many images (or texts)."""
        self._steps += 1
        self._images += images

    def read(self) -> dict[str, float]:
        """`images_per_s`, `data_wait_share` in [0, 1], `seconds_per_step`; begins a new interval.

        Empty where no step was counted, as in the interval of the compilation.
        """
        seconds = self._clock() - self._begin
        rates = {}
        if self._steps and seconds > 0:
            rates = {
                "images_per_s": self._images / seconds,
                "data_wait_share": self._waited_s / seconds,
                "seconds_per_step": seconds / self._steps,
            }
        self.reset()
        return rates


class Progress:
    """A live bar in a terminal; elsewhere one plain line for each `log`.

    Used as a context manager. Nothing here waits for the device.
    """

    def __init__(self, total_steps: int, start_step: int = 0, console: Console | None = None):
        """Prepares the bar; processes other than 0 show nothing.

        Args:
          total_steps: steps of the whole run.
          start_step: steps done already, in a run that resumes.
          console: where to print, by default stdout.
        """
        self._total = total_steps
        self._console = console or Console(highlight=False, quiet=jax.process_index() != 0)
        self._status = _COMPILING
        self._bar = Bar(
            TextColumn("training"), BarColumn(bar_width=None), MofNCompleteColumn(), expand=True
        )
        self._task = self._bar.add_task("", total=total_steps, completed=start_step)
        self._live = (
            Live(get_renderable=self._render, console=self._console, refresh_per_second=4)
            if self._console.is_terminal
            else None
        )

    def advance(self, step: int) -> None:
        """Moves the bar to `step` steps done."""
        if self._status is _COMPILING:
            self._status = Text()
        self._bar.update(self._task, completed=step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows metrics, of which `images_per_s`, `data_wait_share` and `seconds_per_step` come
        from `Throughput`, after `step` steps done.
        """
        line = status_line(metrics, self._total - step)
        if self._live:
            self.advance(step)
            self._status = Text(line)
        else:
            width = len(str(self._total))
            self.message(f"step {step:>{width}}/{self._total}  {line}")

    def message(self, text: str) -> None:
        """Prints a line of its own, above the bar."""
        # soft_wrap keeps the line whole where there is no terminal that has a width.
        self._console.print(Text(text), soft_wrap=True)

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *unused: object) -> None:
        if self._live:
            self._live.stop()

    def _render(self) -> Group:
        return Group(self._bar, self._status)


def status_line(metrics: Mapping[str, float], steps_left: int) -> str:
    """Metrics as one line of columns that stay in their places from log to log.

    Example: `loss 2.3134  itc 1.2031  lr 9.8e-05   412.3 images/s  data  3%  left 0:02:31`.
    """
    parts = []
    known = ("learning_rate", "images_per_s", "data_wait_share", *NOT_SHOWN)
    names = sorted((name for name in metrics if name not in known), key=lambda n: n != "loss")
    for name in names:
        parts.append(f"{name} {_short(metrics[name])}")
    if "learning_rate" in metrics:
        parts.append(f"lr {metrics['learning_rate']:.1e}")
    if metrics.get("skipped_total"):
        parts.append(f"skipped {int(metrics['skipped_total'])}")
    if "images_per_s" in metrics:
        parts.append(f"{metrics['images_per_s']:7.1f} images/s")
        parts.append(f"data {metrics['data_wait_share']:>4.0%}")
        left_s = round(metrics["seconds_per_step"] * steps_left)
        parts.append(f"left {timedelta(seconds=left_s)}")
    return "  ".join(parts)


def _short(value: float) -> str:
    value = float(value)
    if not math.isfinite(value):
        return f"{value:>6}"
    return f"{value:6.4f}" if abs(value) < 10 else f"{value:6.5g}"
