"""Metrics of a run by step, and one of them as a small curve for a page."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from jaxblip.evaluation.labels import is_share, metric_label

Points = Mapping[int, float]  # value by step

_MAX_POINTS = 400  # a curve; more cannot be seen and would make the page heavy
_SHOWN = ("train/loss", "train/", "eval/", "learning_rate", "images_per_s")  # in this order


def read_points(path: Path) -> tuple[dict[str, Points], int]:
    """Value by step for each metric that a page shows, and the number of unreadable lines.

    Where a resumed run wrote a step twice, the later line counts. A value that was not finite is
    NaN (`MetricsWriter` writes null). The total loss is left out where it is that of its one part.
    """
    found: dict[str, dict[int, float]] = {}
    damaged = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, TypeError, KeyError):
            damaged += bool(line.strip())  # the last line of a killed run may be cut
            continue
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float | None):
                found.setdefault(name, {})[step] = math.nan if value is None else float(value)

    def place(name: str) -> int:
        return next((at for at, start in enumerate(_SHOWN) if name.startswith(start)), len(_SHOWN))

    shown = sorted((name for name in found if place(name) < len(_SHOWN)), key=place)
    series = {name: dict(sorted(found[name].items())) for name in shown}
    total = series.get("train/loss")
    if any(points == total for name, points in series.items() if name != "train/loss"):
        del series["train/loss"]
    return series, damaged


def last_finite(points: Points) -> float:
    """The newest value that is a number; NaN where none is."""
    return next((value for value in reversed(points.values()) if math.isfinite(value)), math.nan)


def draw_curve(name: str, points: Points, prefix: str) -> str:
    """A metric by step as inline SVG that takes its colours and its font from the page.

    Matplotlib cannot write CSS variables, so that each role is drawn in a colour of its own that is
    replaced afterwards. `prefix` keeps the ids of several curves in one page apart.
    """
    roles = {"#010203": "var(--soft)", "#040506": "var(--rule)", "#070809": "var(--accent)"}
    ink, rule, accent = roles
    steps, values = _thinned(points)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix, "font.size": 9}):
        figure = Figure(figsize=(3.1, 1.75), layout="constrained")
        canvas = FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.plot(steps, values, color=accent, linewidth=1.6, marker="o" if len(steps) < 15 else "",
                  markersize=3.5)  # fmt: skip
        axes.set_xlabel("step", color=ink)
        axes.grid(axis="y", color=rule, linewidth=0.6)
        axes.spines[:].set_visible(False)
        axes.spines["bottom"].set(visible=True, color=rule)
        axes.tick_params(colors=ink, length=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if is_share(name):
            axes.set_ylim(0, 1.02)
        elif name in ("learning_rate", "images_per_s"):
            axes.set_ylim(bottom=0)
        buffer = io.StringIO()
        canvas.print_svg(buffer)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # the metadata holds the date, and the same run should give the same page
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\g<1>#{prefix}", svg)
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)
    # The white sheet behind the plot and the font would hide the page's own.
    svg = re.sub(r"fill: #ffffff", "fill: none", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font-size: \1; font-family: inherit", svg)
    for colour, variable in roles.items():
        svg = svg.replace(colour, variable)
    label = f"{metric_label(name)} by step, last {last_finite(points):.4g}"
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)


def _thinned(points: Points) -> tuple[np.ndarray, np.ndarray]:
    steps, values = np.array(list(points)), np.array(list(points.values()))
    size = -(-len(steps) // _MAX_POINTS)
    if size == 1:
        return steps, values
    starts = np.arange(0, len(steps), size)
    counts = np.diff([*starts, len(steps)])
    # a mean with a NaN in it is NaN, so that a gap in a long curve stays a gap
    return np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts) / counts
