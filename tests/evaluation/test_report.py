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
    "heldout_images": 1500, "seconds": {"Stage 1": 41.04, "total": 200.5},
    "versions": {"jax": "0.10.2", "flax": "0.12.8"}, "device": ["Fast <chip> 0", "Fast <chip> 1"],
}  # fmt: skip


class Page(HTMLParser):
    """What a browser would load, show and link inside a page."""

    def __init__(self, html):
        super().__init__()
        self.addresses, self.ids, self.tags, self.text = [], [], [], ""
        self.tables, self.inside = [], None
        self.feed(html)
        self.addresses += re.findall(r"url\(([^)]*)\)", html) + re.findall(r"@import\S*", html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self.inside = tag
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.addresses.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_data(self, data):
        self.text += data
        if self.inside in ("td", "th"):
            self.tables[-1][-1][-1] += data

    def handle_endtag(self, tag):
        self.inside = None


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


def test_a_curve_for_every_loss_part_of_every_phase(tmp_path):
    _, page = write(tmp_path)
    assert [label.split(" by ")[0] for label in curves(page)] == [
        "loss", "ITC loss", "learning rate",
    ] * 2  # fmt: skip
    for words in ("Stage 1", "Stage 2", "step", "ITC loss"):
        assert words in page.text
    assert len(page.ids) == len(set(page.ids))
    linked = {a.removeprefix("#") for a in page.addresses if a.startswith("#")}
    assert linked and linked <= set(page.ids)


LOGGED_ONCE = [
    {"step": 1200, "train/loss": 0.25, "train/token_accuracy": 0.5},
    {
        "step": 1200, "eval/itc_i2t_r1": 0.5, "eval/itc_i2t_r5": 1.0, "eval/i2t_r1": 0.75,
        "eval/t2i_r1": 0.7, "eval/caption_exact": 0.125, "eval/bleu4": 81.256,
    },
]  # fmt: skip


def test_what_was_logged_once_is_in_a_table(tmp_path):
    _, page = write(tmp_path, LOGGED_ONCE, results={})
    assert curves(page) == []
    trained, recalls, others = page.tables[:3]
    assert trained == [["loss", "0.25"], ["token accuracy", "0.500"]]
    assert recalls == [
        ["recall", "@1", "@5"],
        ["image to text by ITC alone", "0.500", "1.000"],
        ["image to text", "0.750", "–"],
        ["text to image", "0.700", "–"],
    ]
    assert others == [["captions equal to a true one", "0.125"], ["BLEU-4, of 100", "81.26"]]
    assert page.text.count("Evaluation after 1,200 steps") == 2


def test_several_evaluations_are_curves_and_the_last_is_in_the_table(tmp_path):
    lines = [
        {"step": step, "eval/i2t_r1": step / 8, "eval/i2t_r5": 1.0, "eval/bleu4": 2.0 * step}
        for step in (2, 4)
    ]
    _, page = write(tmp_path, lines, results={})
    assert curves(page) == [
        "image to text, recall@1 by step, last 0.5", "BLEU-4, of 100 by step, last 8",
    ] * 2  # fmt: skip
    assert page.tables[:2] == [
        [["recall", "@1", "@5"], ["image to text", "0.500", "1.000"]],
        [["BLEU-4, of 100", "8"]],
    ]


def test_no_raw_identifier_is_shown(tmp_path):
    _, page = write(tmp_path, LOGGED_ONCE, gallery=[item("a", "a")])
    assert not re.findall(r"\w+_\w+|\w+/\w+", page.text.partition("}")[2].rpartition("}")[2])


def test_the_colours_follow_light_and_dark(tmp_path):
    html, _ = write(tmp_path)
    svg = html[html.index("<svg") : html.index("</svg>")]
    assert "var(--accent)" in svg and "prefers-color-scheme:dark" in html
    assert not re.findall(r"#[0-9a-f]{6}", svg)


def test_results_seconds_versions_and_device_are_shown(tmp_path):
    html, page = write(tmp_path)
    for words in ("0.930", "0.910", "61.25", "1,500held-out images"):
        assert words in page.text
    assert page.tables[0] == [
        ["recall", "@1"],
        ["image to text", "0.930"],
        ["text to image", "0.910"],
        ["image to text by ITC alone", "0.800"],
    ]
    assert page.tables[-2:] == [
        [["Stage 1", "41.0 s"], ["in all", "3 min 20 s"]],
        [["device", "2 × Fast <chip>"], ["jax", "0.10.2"], ["flax", "0.12.8"]],
    ]
    # The most important of them stand at the top.
    assert "3 min 20 s in all · 2 × Fast <chip> · jax 0.10.2" in page.text
    assert html.index("in all") < html.index("<h2>")


@pytest.mark.parametrize(
    "device, cpu_count, shown",
    [
        (["cpu 0"], 2, "CPU, 2 cores"),
        (["cpu 0", "cpu 1"], 16, "CPU, 16 cores"),
        (["NVIDIA H200 0"], 16, "NVIDIA H200"),
        (["TPU v5 lite 0", "TPU v5 lite 1"], 16, "2 × TPU v5 lite"),
    ],
)
def test_devices_are_counted(tmp_path, device, cpu_count, shown):
    results = {"device": device, "cpu_count": cpu_count}
    assert write(tmp_path, [], results)[1].tables == [[["device", shown]]]


def test_results_without_recall_have_no_table(tmp_path):
    _, page = write(tmp_path, [], {"loss": 0.5, "perplexity": 1.6487, "token_accuracy": 0.75})
    assert page.tables == []
    for words in ("0.5loss", "1.649perplexity", "0.750token accuracy"):
        assert words in page.text


def test_html_in_captions_titles_and_notes_is_text(tmp_path):
    evil = "<script>alert('x')</script>\" onload=\"y"
    html, page = write(tmp_path, gallery=[item(evil, evil)], title=evil, notes=[evil])
    assert "<script" not in html
    assert page.text.count("<script>") == 5  # title twice, note, predicted, true
    assert not any("onload" in attributes for _, attributes in page.tags)


def cards(html):
    return re.findall(r"<article.*?</article>", html, re.DOTALL)


def test_a_card_says_right_or_wrong_and_marks_the_difference(tmp_path):
    html, page = write(
        tmp_path,
        gallery=[
            item("a red  star", "a star", "a red star", value=9),
            item("a blue moon left of a cat", "a cat right of a moon", "a red moon left of a cat"),
            item("", "a star"),
        ],
    )
    wrong, right, empty = cards(html)
    assert right.startswith('<article class="right"><span class="badge">✓ right</span>')
    assert "<p>a red star</p>" in right and "<mark>" not in right
    assert '<ul><li>a star</li><li class="said">✓ a red star</li></ul>' in right
    assert wrong.startswith('<article class="wrong"><span class="badge">✗ wrong</span>')
    assert "<p>a <mark>blue</mark> moon left of a cat</p>" in wrong
    assert "<ul><li>a cat right of a moon</li><li>a red moon left of a cat</li></ul>" in wrong
    assert "<p><em>(empty)</em></p>" in empty
    assert ".right p{color:var(--right)}" in html and ".wrong .badge{background:var(--" in html
    assert "1 of 3 predictions are one of the true captions" in page.text
    data = base64.b64decode(re.search(r"base64,([^\"]+)", right)[1])
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), picture(9))


def test_what_was_asked_is_on_the_card(tmp_path):
    html, _ = write(tmp_path, gallery=[{**item("a", "a"), "asked": "What <is> it?"}])
    assert "<h4>asked</h4>What &lt;is&gt; it?<h4>predicted</h4>" in html


def test_right_and_wrong_ones_are_mixed_and_the_first_twelve_are_open(tmp_path):
    gallery = [item(f"r{i}", f"r{i}") for i in range(200)] + [item("w", "x") for _ in range(20)]
    html, page = write(tmp_path, gallery=gallery)
    kinds = [a["class"] for tag, a in page.tags if tag == "article"]
    assert [kinds[i : i + 12].count("wrong") for i in (0, 12, 24, 36)] == [4, 4, 4, 4]
    assert len(cards(html.partition("<details>")[0])) == 12 and "Show 36 more" in page.text


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
    assert curves(page) == ["loss by step, last 2.5"] * 2
    assert "2 unreadable lines" in page.text


def test_values_that_are_not_finite_are_said(tmp_path):
    lines = [{"step": s, "train/loss": v} for s, v in [(1, 2.0), (2, None), (3, 1.0), (4, None)]]
    _, page = write(tmp_path, lines, results={"caption_exact": float("nan")})
    assert curves(page) == ["loss by step, last 1"] * 2
    assert "nancaptions equal to a true one" in page.text


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
