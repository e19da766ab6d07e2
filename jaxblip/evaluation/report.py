"""One self-contained HTML page about a run: results, captions to see, curves, time and machine."""

from __future__ import annotations

import base64
import io
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from html import escape
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jaxblip.evaluation.captions import is_exact
from jaxblip.evaluation.curves import Points, draw_curve, last_finite, read_points
from jaxblip.evaluation.labels import is_share, metric_label, recall_of
from jaxblip.evaluation.style import STYLE

_MAX_GALLERY = 48
_MAX_UNFOLDED = 12  # of the gallery; the others are one click away
_MAX_WRONG_SHARE = 1 / 3  # of the gallery, so that it shows both kinds
_NAMED = ("jaxblip", "jax", "python")  # whose versions stand at the top, too


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    phases: Sequence[Mapping[str, object]],
    results: Mapping[str, object],
    gallery: Sequence[Mapping[str, object]],
    details: Mapping[str, Mapping[str, object]] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Writes `path` as one HTML file that loads nothing from outside.

    Args:
        path: the file; appears whole or not at all.
        title: heading of the page.
        phases: one a training run, each {"name": its heading, "metrics_jsonl": path}. Every line
            of the file is an object with "step" and numbers. Tables have the last evaluation and
            what was logged once, curves the rest (of recalls that at 1). A missing file is said,
            not an error.
        results: numbers by metric, and perhaps "seconds" by what they were spent on, "versions" by
            package, "device" (a list of names, one a device) and "cpu_count".
        gallery: held-out images, each {"image": uint8 [height, width, 3], "predicted": str,
            "references": list of str}, and perhaps "asked": what the prediction answers, and
            "right": whether it is, where that is another thing than to be one of the references.
            At most 48 are shown, up to a third of them wrong ones, both kinds evenly mixed.
        details: tables by their heading; the value of a row is a number, or numbers by column.
        notes: paragraphs of plain text under the heading.
    """
    sections = [
        "".join(f"<p>{escape(note)}</p>" for note in notes),
        _facts(results),
        _results_section(results),
        *(_detail_section(heading, rows) for heading, rows in (details or {}).items()),
        _gallery_section(gallery),
        *(_phase_section(phase, index) for index, phase in enumerate(phases)),
        _machine_section(results),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body><main><h1>{escape(title)}</h1>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)


# --- numbers --------------------------------------------------------------------------------------


def _results_section(results: Mapping[str, object]) -> str:
    numbers = {
        name: value
        for name, value in results.items()
        if isinstance(value, int | float) and name != "cpu_count"
    }
    cards = "".join(
        f'<div class="card"><b>{_number(value, name)}</b>'
        f"<span>{escape(metric_label(name))}</span></div>"
        for name, value in numbers.items()
        if _is_headline(name)
    )
    table = "" if all(map(_is_headline, numbers)) else _recall_table(numbers)
    return f'<h2>Results</h2><div class="cards">{cards}</div>{table}' if numbers else ""


def _detail_section(heading: str, rows: Mapping[str, object]) -> str:
    """Numbers of a part of the set each, such as a type of question."""
    cells = {row: x if isinstance(x, Mapping) else {"": x} for row, x in rows.items()}
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    head = "".join(f'<th scope="col">{escape(metric_label(c))}</th>' for c in columns if c)
    body = "".join(
        f'<tr><th scope="row">{escape(row)}</th>'
        + "".join(f"<td>{values[c]:.4g}</td>" if c in values else "<td>–</td>" for c in columns)
        + "</tr>"
        for row, values in cells.items()
    )
    head = f'<tr><th scope="col"></th>{head}</tr>' if head else ""
    return f'<h3>{escape(heading)}</h3><table class="wide">{head}{body}</table>'


def _is_headline(name: str) -> bool:
    """Whether a number has a card: all but recall beyond 1 and before the re-ranking."""
    return recall_of(name) is None or name in ("i2t_r1", "t2i_r1")


def _recall_table(numbers: Mapping[str, float]) -> str:
    """Those that are recall at k, a row for what is retrieved; "" where there is none."""
    rows: dict[str, dict[int, float]] = {}
    for name, value in numbers.items():
        if recall := recall_of(name):
            rows.setdefault(recall[0], {})[recall[1]] = value
    if not rows:
        return ""
    ks = sorted({k for row in rows.values() for k in row})
    head = "".join(f'<th scope="col">@{k}</th>' for k in ks)
    body = "".join(
        f'<tr><th scope="row">{what}</th>'
        + "".join(f"<td>{f'{row[k]:.3f}' if k in row else '–'}</td>" for k in ks)
        + "</tr>"
        for what, row in rows.items()
    )
    return f'<table class="wide"><tr><th scope="col">recall</th>{head}</tr>{body}</table>'


def _table(rows: Mapping[str, str]) -> str:
    """A table of two columns of text; "" without rows."""
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in rows.items()
    )
    return f"<table>{body}</table>" if rows else ""


def _number(value: float, name: str) -> str:
    if is_share(name):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


# --- time and machine -----------------------------------------------------------------------------


def _facts(results: Mapping[str, object]) -> str:
    """How long, on what, and with what, in one line."""
    versions, total = results.get("versions", {}), results.get("seconds", {}).get("total")
    facts = [f"{_duration(total)} in all"] if total is not None else []
    facts += [_devices(results)] if "device" in results else []
    facts += [f"{name} {versions[name]}" for name in _NAMED if name in versions]
    return f'<p class="facts">{escape(" · ".join(facts))}</p>' if facts else ""


def _machine_section(results: Mapping[str, object]) -> str:
    seconds = {
        metric_label(name): _duration(value) for name, value in results.get("seconds", {}).items()
    }
    machine = {"device": _devices(results)} if "device" in results else {}
    tables = {"Time": seconds, "Device and versions": machine | dict(results.get("versions", {}))}
    columns = "".join(
        f"<section><h3>{name}</h3>{_table(rows)}</section>" for name, rows in tables.items() if rows
    )
    return f'<h2>Time and machine</h2><div class="columns">{columns}</div>' if columns else ""


def _devices(results: Mapping[str, object]) -> str:
    """Such as "8 × NVIDIA H200", of names with a number behind; of CPUs also their cores."""
    kinds = Counter(re.sub(r" \d+$", "", name) for name in results["device"])
    if kinds.keys() == {"cpu"} and "cpu_count" in results:
        return f"CPU, {results['cpu_count']} cores"
    return ", ".join(f"{count} × {kind}" if count > 1 else kind for kind, count in kinds.items())


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


# --- phases ---------------------------------------------------------------------------------------


def _phase_section(phase: Mapping[str, object], index: int) -> str:
    heading, path = f"<h2>{escape(phase['name'])}</h2>", Path(phase["metrics_jsonl"])
    if not path.is_file():
        return heading + f"<p>No metrics were recorded ({escape(path.name)} is missing).</p>"
    series, damaged = read_points(path)
    if not series:
        return heading + "<p>No metrics were recorded.</p>"
    note = f"<p>{damaged} unreadable lines of the metrics were left out.</p>" if damaged else ""
    curves = "".join(
        f"<figure><figcaption>{escape(metric_label(name))} <b>{last_finite(points):.3g}</b>"
        f"</figcaption>{draw_curve(name, points, f'p{index}c{number}-')}</figure>"
        for number, (name, points) in enumerate(series.items())
        if len(points) > 1 and (recall_of(name) or ("", 1))[1] == 1
    )
    once = {name for name, points in series.items() if len(points) == 1}
    evaluated = {name: series[name] for name in series if name.startswith("eval/")}
    trained = {name: series[name] for name in series if name in once - evaluated.keys()}
    curves = curves and f'<div class="curves">{curves}</div>'
    tables = _last_values("Training", trained) + _last_values("Evaluation", evaluated)
    return f'{heading}{note}{curves}<div class="columns">{tables}</div>'


def _last_values(what: str, series: Mapping[str, Points]) -> str:
    """A table of the newest value of each metric, the recalls in one of their own."""
    if not series:
        return ""
    steps = max(step for points in series.values() for step in points)
    last = {name: points[max(points)] for name, points in series.items()}
    others = {
        metric_label(name): _number(value, name)
        for name, value in last.items()
        if recall_of(name) is None
    }
    heading = f"<h3>{what} after {steps:,} steps</h3>"
    return f"<section>{heading}{_recall_table(last)}{_table(others)}</section>"


# --- gallery --------------------------------------------------------------------------------------


def _gallery_section(gallery: Sequence[Mapping[str, object]]) -> str:
    if not gallery:
        return ""
    right = [
        item["right"] if "right" in item else is_exact(item["predicted"], item["references"])
        for item in gallery
    ]
    shown = _choose(right)
    items = [_gallery_item(gallery[index], right[index]) for index in shown]
    wrong_shown = sum(not right[index] for index in shown)
    wrong = len(right) - sum(right)
    text = f"{sum(right)} of {len(right)} predictions are one of the true captions. "
    text += f"Shown are {len(shown)}"
    text += f", among them {wrong_shown} of the {wrong} wrong ones" if wrong else ""
    text += (
        "; marked are the words in which a wrong one differs from the nearest true one."
        if wrong_shown
        else "."
    )
    html = f'<div class="gallery">{"".join(items[:_MAX_UNFOLDED])}</div>'
    if folded := items[_MAX_UNFOLDED:]:
        html += (
            f"<details><summary>Show {len(folded)} more</summary>"
            f'<div class="gallery">{"".join(folded)}</div></details>'
        )
    return f"<h2>Held-out images</h2><p>{text}</p>{html}"


def _choose(right: Sequence[bool]) -> list[int]:
    """The first right and the first wrong ones, both spread evenly."""
    wrong_indices = [index for index, is_right in enumerate(right) if not is_right]
    right_indices = [index for index, is_right in enumerate(right) if is_right]
    num_wrong = max(round(_MAX_GALLERY * _MAX_WRONG_SHARE), _MAX_GALLERY - len(right_indices))
    wrong_indices = wrong_indices[:num_wrong]
    right_indices = right_indices[: _MAX_GALLERY - len(wrong_indices)]
    placed = [
        ((place + 0.5) / len(indices), index)
        for indices in (right_indices, wrong_indices)
        for place, index in enumerate(indices)
    ]
    return [index for _, index in sorted(placed)]


def _gallery_item(item: Mapping[str, object], is_right: bool) -> str:
    predicted, references = item["predicted"], item["references"]
    asked = f"<h4>asked</h4>{escape(item['asked'])}" if item.get("asked") else ""
    kind, badge = ("right", "✓ right") if is_right else ("wrong", "✗ wrong")
    true = "".join(
        f'<li class="said">✓ {escape(caption)}</li>'
        if is_exact(predicted, [caption])
        else f"<li>{escape(caption)}</li>"
        for caption in references
    )
    return (
        f'<article class="{kind}"><span class="badge">{badge}</span>'
        f'<img alt="{escape(references[0])}" '
        f'src="data:image/png;base64,{_png(item["image"])}">'
        f"{asked}<h4>predicted</h4><p>{_marked(predicted, references)}</p>"
        f"<h4>true</h4><ul>{true}</ul></article>"
    )


def _marked(predicted: str, references: Sequence[str]) -> str:
    """A prediction as HTML, with the words marked that the nearest reference has not there."""
    words = predicted.split()
    matchers = [SequenceMatcher(None, text.split(), words, autojunk=False) for text in references]
    nearest = max(matchers, key=SequenceMatcher.ratio)
    pieces = []
    for kind, _, _, begin, end in nearest.get_opcodes():
        text = escape(" ".join(words[begin:end]))
        pieces.append(text if kind == "equal" or not text else f"<mark>{text}</mark>")
    return " ".join(filter(None, pieces)) or "<em>(empty)</em>"


def _png(image: UInt8[np.ndarray, "height width 3"]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(image, np.uint8)).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
