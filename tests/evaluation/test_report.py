import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from jaxblip.evaluation.report import write_report

RESULTS = {
    "i2t_r1": 0.93, "t2i_r1": 0.91, "itc_i2t_r1": 0.8, "caption_exact": 0.5, "bleu4": 61.25,
    "seconds": {"clip": 61.0, "stage_1": 200.5}, "versions": {"jax": "0.10.2"},
    "device": "cpu <2 cores>",
}  # fmt: skip


class Page(HTMLParser):
    """What a browser would load, show and link inside a page."""

    def __init__(self, html):
        super().__init__()
        self.addresses, self.ids, self.tags, self.text = [], [], [], ""
        self.feed(html)
        self.addresses += re.findall(r"url\(([^)]*)\)", html) + re.findall(r"@import\S*", html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.addresses.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_data(self, data):
        self.text += data


def picture(value):
    return np.full((6, 8, 3), value, np.uint8)


def item(predicted, *references, value=0):
    return {"image": picture(value), "predicted": predicted, "references": list(references)}


def write(tmp_path, lines=None, results=RESULTS, gallery=(), title="A run", notes=()):
    metrics = tmp_path / "metrics.jsonl"
    if lines is None:
        lines = [
            {"step": step, "train/loss": 3 / step, "train/itc": 1 / step, "learning_rate": 1e-3}
            for step in range(1, 50)
        ] + [{"step": 50, "eval/i2t_r1": 0.8}]
    metrics.write_text(
        "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
    )
    phases = [{"name": name, "metrics_jsonl": metrics} for name in ("Stage 1", "Stage 2")]
    write_report(
        tmp_path / "report.html",
        title=title, phases=phases, results=results, gallery=gallery, notes=notes,
    )  # fmt: skip
    html = (tmp_path / "report.html").read_text()
    return html, Page(html)


def curves(page):
    return [a["aria-label"] for tag, a in page.tags if tag == "svg"]


def test_the_page_loads_nothing_from_outside(tmp_path):
    _, page = write(tmp_path, gallery=[item("a", "a")])
    assert page.addresses
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert "script" not in {tag for tag, _ in page.tags}


def test_a_panel_for_every_loss_part_of_every_phase(tmp_path):
    _, page = write(tmp_path)
    assert [label.split(" by ")[0] for label in curves(page)] == [
        "train/loss", "train/itc", "eval/i2t_r1", "learning_rate",
    ] * 2  # fmt: skip
    for words in ("Stage 1", "Stage 2", "step", "loss", "recall", "train/itc"):
        assert words in page.text
    assert len(page.ids) == len(set(page.ids))
    linked = {a.removeprefix("#") for a in page.addresses if a.startswith("#")}
    assert linked and linked <= set(page.ids)


def test_the_colours_follow_light_and_dark(tmp_path):
    html, _ = write(tmp_path)
    svg = html[html.index("<svg") : html.index("</svg>")]
    assert "var(--accent)" in svg and "prefers-color-scheme:dark" in html
    assert not re.findall(r"#[0-9a-f]{6}", svg)


def test_results_seconds_versions_and_device_are_shown(tmp_path):
    _, page = write(tmp_path)
    for words in ("0.930", "0.910", "0.800", "61.25", "61.0 s", "3 min 20 s", "0.10.2", "R@1"):
        assert words in page.text
    assert "cpu <2 cores>" in page.text


def test_html_in_captions_titles_and_notes_is_text(tmp_path):
    evil = "<script>alert('x')</script>\" onload=\"y"
    html, page = write(tmp_path, gallery=[item(evil, evil)], title=evil, notes=[evil])
    assert "<script" not in html
    assert page.text.count("<script>") == 5  # title twice, note, predicted, reference
    assert not any("onload" in attributes for _, attributes in page.tags)


def test_right_is_green_wrong_is_red_and_the_image_is_whole(tmp_path):
    html, page = write(
        tmp_path, gallery=[item("a star", "a  star", "star", value=9), item("a moon", "a star")]
    )
    kinds = [a["class"] for tag, a in page.tags if tag == "article"]
    assert kinds == ["right", "wrong"]
    assert ".right p{color:var(--right)}" in html and ".wrong p{color:var(--wrong)}" in html
    assert "1 of 2 predicted captions are one" in page.text
    source = next(a["src"] for tag, a in page.tags if tag == "img")
    data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), picture(9))


@pytest.mark.parametrize(
    "num_right, num_wrong, shown_wrong", [(200, 100, 16), (200, 2, 2), (10, 100, 38), (0, 3, 3)]
)
def test_the_gallery_shows_wrong_ones_too(tmp_path, num_right, num_wrong, shown_wrong):
    right = [item(f"r{i}", f"r{i}") for i in range(num_right)]
    wrong = [item(f"w{i}", "other") for i in range(num_wrong)]
    _, page = write(tmp_path, lines=[], gallery=right + wrong)
    kinds = [a["class"] for tag, a in page.tags if tag == "article"]
    assert len(kinds) == min(48, num_right + num_wrong)
    assert kinds.count("wrong") == shown_wrong
    assert f"{shown_wrong} of the {num_wrong} wrong ones" in page.text


def test_the_same_run_gives_the_same_bytes(tmp_path):
    gallery = [item("a", "a"), item("b", "a")]
    assert write(tmp_path, gallery=gallery)[0] == write(tmp_path, gallery=gallery)[0]


def test_a_step_written_twice_counts_once_and_cut_lines_are_said(tmp_path):
    lines = [
        {"step": 10, "train/loss": 3.0},
        {"step": 20, "train/loss": 9.0},  # lost in a crash, then done again:
        {"step": 20, "train/loss": 2.5},
        {"step": 15, "train/loss": 2.7},
        '{"step": 30, "train/lo',
        "[1, 2]",
    ]
    _, page = write(tmp_path, lines)
    assert curves(page) == ["train/loss by step, last 2.5"] * 2
    assert "2 unreadable lines" in page.text


def test_values_that_are_not_finite_leave_a_gap(tmp_path):
    lines = [{"step": s, "train/loss": v} for s, v in [(1, 2.0), (2, float("nan")), (3, 1.0)]]
    lines.append({"step": 4, "train/loss": float("inf")})
    _, page = write(tmp_path, lines, results={"caption_exact": float("nan")})
    assert curves(page) == ["train/loss by step, last 1"] * 2
    assert "nan" in page.text


def test_long_runs_stay_light(tmp_path):
    noise = np.random.default_rng(0).random(20_000).tolist()
    few, _ = write(tmp_path, [{"step": s, "train/loss": v} for s, v in enumerate(noise[:300])])
    many, _ = write(tmp_path, [{"step": s, "train/loss": v} for s, v in enumerate(noise)])
    assert len(many) < 2 * len(few)


def test_missing_or_empty_metrics_are_said(tmp_path):
    write_report(
        tmp_path / "deep" / "report.html",
        title="t", phases=[{"name": "Gone", "metrics_jsonl": tmp_path / "none.jsonl"}],
        results={}, gallery=[],
    )  # fmt: skip
    page = Page((tmp_path / "deep" / "report.html").read_text())
    assert "Gone" in page.text and "none.jsonl is missing" in page.text
    _, page = write(tmp_path, [])
    assert page.text.count("No metrics were recorded") == 2
