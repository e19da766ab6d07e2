"""What `jaxblip demo` makes of its runs, with runs that take no time."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from jaxblip import demo
from jaxblip.evaluation.labels import TASK_TITLES

METRICS = {"i2t_r1": 0.75, "t2i_r1": 0.5, "caption_exact": 1.0, "bleu4": 97.5}
IMAGE = np.zeros((4, 4, 3), np.uint8)
GALLERY = [{"image": IMAGE, "asked": "", "predicted": "a star", "references": ["a star"]}]


def quick_train(config, workdir):
    """Leaves the metrics of a run that was logged twice and evaluated once."""
    lines = [{"step": step, "train/loss": 1 / step} for step in (1, 2)]
    lines.append({"step": 2, "eval/bleu4": 50.0})
    Path(workdir).mkdir(parents=True)
    (Path(workdir) / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return METRICS


def test_the_page_says_what_was_run_in_the_fields_words(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setattr(demo, "train", quick_train)
    monkeypatch.setattr(demo, "saved_steps", lambda run: [10**6] if Path(run).exists() else [])
    monkeypatch.setattr(demo, "_gallery", lambda run: GALLERY)
    report = demo.run_demo(str(tmp_path))
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert report | METRICS == report and report["heldout_images"] == 1
    assert report["seconds"].keys() == {*demo.PHASES, "gallery", "total"}

    html = (tmp_path / "report.html").read_text()
    titles = [TASK_TITLES[task] for task in ("clip", "language_model", "stage1", "stage2")]
    assert re.findall("<h2>(.*?)</h2>", html) == [
        "Results", "Held-out images", *titles, "Time and machine",
    ]  # fmt: skip
    for title in (*titles, "captions for this page", "in all"):
        assert f'<th scope="row">{title}</th><td>0.0 s</td>' in html
    assert "in all · CPU, " in html and f"<td>{report['versions']['jax']}</td>" in html
    assert html.count("<svg") == 4 and html.count("Evaluation after 2 steps") == 4
    assert not re.findall(r"language_model|stage1|[it]2[it]|heldout|held out", html)
