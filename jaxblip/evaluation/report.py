"""One self-contained HTML page about a run: loss curves by phase, results, and captions to see."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import UInt8
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from PIL import Image

from jaxblip.evaluation.captions import is_exact

_MAX_POINTS = 400  # a curve; more cannot be seen and would make the page heavy
_MAX_GALLERY = 48
_MAX_WRONG_SHARE = 1 / 3  # of the gallery, so that it shows both kinds
_OWN_SECTIONS = ("seconds", "versions", "device")
_RECALL = re.compile(r"((?:itc_)?(?:i2t|t2i))_r(\d+)")
_RECALL_KINDS = {
    "i2t": "image to text",
    "t2i": "text to image",
    "itc_i2t": "image to text, ITC only",
    "itc_t2i": "text to image, ITC only",
}
_LABELS = {
    "i2t_r1": "image to text, recall@1",
    "t2i_r1": "text to image, recall@1",
    "caption_exact": "captions equal to a reference",
    "bleu4": "BLEU-4 (0–100)",
    "learning_rate": "learning rate",
    "images_per_s": "images per second",
    "data_wait_share": "share of time waiting for data",
}


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    phases: Sequence[Mapping[str, object]],
    results: Mapping[str, object],
    gallery: Sequence[Mapping[str, object]],
    notes: Sequence[str] = (),
) -> None:
    """Writes `path` as one HTML file that loads nothing from outside.

    Args:
        path: the file; appears whole or not at all.
        title: heading of the page.
        phases: one a training run, each {"name": str, "metrics_jsonl": path}. Every line of the
            file is an object with "step" and numbers; "train/..." and "eval/..." are drawn, one
            panel each, and so are the learning rate and the throughput. Where a resumed run wrote
            a step twice, the later line counts. A missing file is said, not an error.
        results: what `report.json` holds: numbers for the table, and "seconds" by phase,
            "versions" by package and "device" for tables of their own.
        gallery: held-out images, each {"image": uint8 [height, width, 3], "predicted": str,
            "references": list of str}, and perhaps "asked": what the prediction answers. At most 48 are shown, in the given order, up to a third of
            them wrong ones.
        notes: paragraphs of plain text under the heading.
    """
    sections = [
        "".join(f"<p>{escape(note)}</p>" for note in notes),
        _results_section(results),
        *(_phase_section(phase, index) for index, phase in enumerate(phases)),
        _gallery_section(gallery),
        _machine_section(results),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body><main><h1>{escape(title)}</h1>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)


# --- tables ---------------------------------------------------------------------------------------


def _results_section(results: Mapping[str, object]) -> str:
    scalars = {
        name: value
        for name, value in results.items()
        if name not in _OWN_SECTIONS and not isinstance(value, Mapping | list | tuple)
    }
    if not scalars:
        return ""
    cards = "".join(
        f'<div class="card"><b>{_share(scalars[name])}</b>'
        f"<span>{escape(_label(name))}</span></div>"
        for name in ("i2t_r1", "t2i_r1", "caption_exact")
        if name in scalars
    )
    recalls = {name: _RECALL.fullmatch(name) for name in scalars}
    ks = sorted({int(match[2]) for match in recalls.values() if match})
    table = ""
    if ks:
        head = "".join(f'<th scope="col">R@{k}</th>' for k in ks)
        kinds = dict.fromkeys(match[1] for match in recalls.values() if match)
        body = "".join(
            f'<tr><th scope="row">{escape(_RECALL_KINDS[kind])}</th>'
            + "".join(f"<td>{_share(scalars.get(f'{kind}_r{k}'))}</td>" for k in ks)
            + "</tr>"
            for kind in kinds
        )
        table = f'<table class="wide"><tr><th scope="col">recall at k</th>{head}</tr>{body}</table>'
    rows = {_label(name): _number(scalars[name]) for name, match in recalls.items() if not match}
    return f'<h2>Results</h2><div class="cards">{cards}</div>{table}{_table(rows) if rows else ""}'


def _machine_section(results: Mapping[str, object]) -> str:
    html = []
    seconds = results.get("seconds")
    if isinstance(seconds, Mapping):
        rows = {_label(name): _duration(value) for name, value in seconds.items()}
        html.append(f"<section><h3>Time by phase</h3>{_table(rows)}</section>")
    machine = {}
    if "device" in results:
        device = results["device"]
        machine["device"] = escape(device if isinstance(device, str) else json.dumps(device))
    versions = results.get("versions")
    if isinstance(versions, Mapping):
        machine |= {str(name): escape(str(version)) for name, version in versions.items()}
    if machine:
        html.append(f"<section><h3>Device and versions</h3>{_table(machine)}</section>")
    return f'<h2>Machine</h2><div class="columns">{"".join(html)}</div>' if html else ""


def _table(rows: Mapping[str, str]) -> str:
    """A table of two columns; the values are HTML already, the names are not."""
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{value}</td></tr>'
        for name, value in rows.items()
    )
    return f"<table>{body}</table>"


def _label(name: str) -> str:
    return _LABELS.get(name, name.replace("_", " "))


def _share(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) and math.isfinite(value) else _number(value)


def _number(value: object) -> str:
    if isinstance(value, float | np.floating):
        return f"{value:.4g}" if math.isfinite(value) else f"<em>{value}</em>"
    return escape(str(value))


def _duration(value: object) -> str:
    if not isinstance(value, int | float):
        return escape(str(value))
    if value < 90:
        return f"{value:.1f} s"
    return f"{int(value) // 60} min {value % 60:02.0f} s"


# --- curves ---------------------------------------------------------------------------------------


def _phase_section(phase: Mapping[str, object], index: int) -> str:
    name, path = str(phase["name"]), Path(str(phase["metrics_jsonl"]))
    heading = f"<h2>{escape(name)}</h2>"
    if not path.is_file():
        return heading + f"<p>No metrics were recorded ({escape(path.name)} is missing).</p>"
    series, damaged = _read_metrics(path)
    panels = "".join(
        f"<figure>{_curve(metric, points, f'p{index}c{number}-')}</figure>"
        for number, (metric, points) in enumerate(series.items())
    )
    if not panels:
        panels = "<p>No metrics were recorded.</p>"
    note = f"<p>{damaged} unreadable lines of the metrics were left out.</p>" if damaged else ""
    return f'{heading}{note}<div class="curves">{panels}</div>'


def _read_metrics(path: Path) -> tuple[dict[str, dict[int, float]], int]:
    """Returns value by step for each metric that is drawn, and the number of unreadable lines."""
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
            if name != "step" and isinstance(value, int | float):
                found.setdefault(name, {})[step] = float(value)
    order = ("train/loss", "train/", "eval/", "learning_rate", "images_per_s")

    def place(name: str) -> int:
        return next((at for at, start in enumerate(order) if name.startswith(start)), len(order))

    drawn = sorted((name for name in found if place(name) < len(order)), key=place)
    return {name: dict(sorted(found[name].items())) for name in drawn}, damaged


def _thinned(points: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray]:
    steps, values = np.array(list(points)), np.array(list(points.values()))
    size = -(-len(steps) // _MAX_POINTS)
    if size == 1:
        return steps, values
    starts = np.arange(0, len(steps), size)
    counts = np.diff([*starts, len(steps)])
    # a mean with a NaN in it is NaN, so that a gap in a long curve stays a gap
    return np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts) / counts


def _curve(name: str, points: Mapping[int, float], prefix: str) -> str:
    """One panel as inline SVG that takes its colours and its font from the page.

    Matplotlib cannot write CSS variables, so that each role is drawn in a colour of its own that is
    replaced afterwards. `prefix` keeps the ids of several panels in one page apart.
    """
    roles = {"#010203": "var(--ink)", "#040506": "var(--rule)", "#070809": "var(--accent)"}
    ink, rule, accent = roles
    steps, values = _thinned(points)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix, "font.size": 9}):
        figure = Figure(figsize=(3.6, 2.3), layout="constrained")
        canvas = FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.plot(steps, values, color=accent, linewidth=1.6, marker="o" if len(steps) < 15 else "",
                  markersize=3.5)  # fmt: skip
        axes.set_title(name, color=ink, fontsize=10, loc="left")
        axes.set_xlabel("step", color=ink)
        axes.set_ylabel(_unit(name), color=ink)
        axes.grid(axis="y", color=rule, linewidth=0.6)
        axes.spines[:].set_visible(False)
        axes.spines["bottom"].set(visible=True, color=rule)
        axes.tick_params(colors=ink, length=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        if _unit(name) in ("recall", "share"):
            axes.set_ylim(0, 1.02)
        elif name in ("learning_rate", "images_per_s"):
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
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
    last = next((value for value in reversed(list(points.values())) if math.isfinite(value)), None)
    label = f"{name} by step" + ("" if last is None else f", last {last:.4g}")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)


def _unit(name: str) -> str:
    if name.startswith("train/"):
        short = name.removeprefix("train/")
        losses = ("loss", "itc", "itm", "itg", "lm", "contrastive")
        return "loss" if short in losses or "loss" in short else short.replace("_", " ")
    if name.startswith("eval/"):
        if re.search(r"_r\d+$", name):
            return "recall"
        return "share" if name.endswith("caption_exact") else "score"
    return _LABELS.get(name, name)


# --- gallery --------------------------------------------------------------------------------------


def _gallery_section(gallery: Sequence[Mapping[str, object]]) -> str:
    if not gallery:
        return ""
    right = [is_exact(item["predicted"], item["references"]) for item in gallery]
    shown = _choose(right)
    items = "".join(_gallery_item(gallery[index], right[index]) for index in shown)
    wrong_shown = sum(not right[index] for index in shown)
    wrong = len(right) - sum(right)
    count = (
        f"{sum(right)} of {len(right)} predicted captions are one of the true ones. "
        f"Shown are {len(shown)}"
    )
    count += f", among them {wrong_shown} of the {wrong} wrong ones." if wrong else "."
    count += " Under each picture stand the predicted caption and the true ones."
    return f'<h2>Held-out images</h2><p>{count}</p><div class="gallery">{items}</div>'


def _choose(right: Sequence[bool]) -> list[int]:
    """The first right and the first wrong ones, in the given order."""
    wrong_indices = [index for index, is_right in enumerate(right) if not is_right]
    right_indices = [index for index, is_right in enumerate(right) if is_right]
    num_wrong = max(round(_MAX_GALLERY * _MAX_WRONG_SHARE), _MAX_GALLERY - len(right_indices))
    wrong_indices = wrong_indices[:num_wrong]
    return sorted(wrong_indices + right_indices[: _MAX_GALLERY - len(wrong_indices)])


def _gallery_item(item: Mapping[str, object], is_right: bool) -> str:
    references = "".join(f"<li>{escape(str(caption))}</li>" for caption in item["references"])
    predicted = escape(str(item["predicted"])) or "<em>(empty)</em>"
    asked = f"<small>{escape(str(item['asked']))}</small>" if item.get("asked") else ""
    kind, mark = ("right", "✓") if is_right else ("wrong", "✗")
    return (
        f'<article class="{kind}"><img alt="{escape(str(item["references"][0]))}" '
        f'src="data:image/png;base64,{_png(item["image"])}">'
        f'{asked}<p><span class="mark" title="{kind}">{mark}</span> {predicted}</p>'
        f"<ul>{references}</ul></article>"
    )


def _png(image: UInt8[np.ndarray, "height width 3"]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(image, np.uint8)).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


_STYLE = """
:root{--paper:#fbfbfa;--sheet:#fff;--ink:#1d2125;--soft:#667079;--rule:#dfe2e5;--accent:#3563e9;
--right:#1a7f45;--wrong:#c52f38}
@media(prefers-color-scheme:dark){:root{--paper:#14171a;--sheet:#1d2125;--ink:#e8eaec;
--soft:#9aa4ad;--rule:#343b42;--accent:#86a5ff;--right:#56c98a;--wrong:#ff7d80}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
main{max-width:72rem;margin:0 auto;padding:2rem clamp(1rem,4vw,3rem) 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:.5rem 0 1.25rem;letter-spacing:-.015em}
h2{font-size:1.3rem;margin:2.75rem 0 .9rem;letter-spacing:-.01em}
h3{font-size:1rem;margin:0 0 .5rem}
p{max-width:44rem;margin:.6rem 0}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:.75rem;
margin-bottom:1rem}
.card{background:var(--sheet);border:1px solid var(--rule);border-radius:12px;padding:1rem 1.1rem}
.card b{display:block;font-size:2rem;line-height:1.15;font-variant-numeric:tabular-nums}
.card span{color:var(--soft);font-size:.9rem}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));
gap:1.5rem 2.5rem}
table{border-collapse:collapse;width:100%;max-width:40rem;font-size:.94rem}
th,td{padding:.42rem 0;border-bottom:1px solid var(--rule);vertical-align:top}
th{font-weight:400;text-align:left;color:var(--soft);padding-right:1rem}
.wide{margin-bottom:1rem}
.wide th[scope=col]:not(:first-child){text-align:right;padding-right:0}
.wide td,.wide th[scope=col]{padding-left:1rem}
.wide tr>:first-child{padding-left:0}
td{text-align:right;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.curves{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,17rem),1fr));gap:.75rem}
figure{margin:0;background:var(--sheet);border:1px solid var(--rule);border-radius:12px;
padding:.5rem}
figure svg{display:block;width:100%;height:auto;fill:var(--ink);font-family:inherit}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(46%,11.5rem),1fr));
gap:.75rem}
article{background:var(--sheet);border:1px solid var(--rule);border-top:4px solid;
border-radius:12px;padding:.7rem;overflow-wrap:anywhere}
article.right{border-top-color:var(--right)}
article.wrong{border-top-color:var(--wrong)}
article img{display:block;width:100%;aspect-ratio:1;object-fit:contain;border-radius:6px;
image-rendering:auto;background:#fff}
article p{margin:.6rem 0 .35rem;font-size:.92rem;line-height:1.35;font-weight:600}
.right p{color:var(--right)}
.wrong p{color:var(--wrong)}
article ul{margin:0;padding:0;list-style:none;color:var(--soft);font-size:.82rem;line-height:1.35}
article li+li{margin-top:.25rem;padding-top:.25rem;border-top:1px solid var(--rule)}
"""
