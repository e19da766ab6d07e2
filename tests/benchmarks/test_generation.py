"""The benchmarks of captions and of training steps, at a tiny size, beside their peers."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import jax
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """What a benchmark prints, line by line, and its figures."""
    threads, device = torch.get_num_threads(), jax.devices()[0]
    monkeypatch.setattr(jax, "devices", lambda *_: [device])  # what a user's CPU is
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(script, *arguments):
        file = tmp_path / "figures.json"
        monkeypatch.setattr(sys, "argv", [script, "--size=tiny", f"--json={file}", *arguments])
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
        return capsys.readouterr().out.splitlines(), json.loads(file.read_text())

    yield run
    torch.set_num_threads(threads)


CAPTIONS = ("--batch-size=2", "--new-tokens=3", "--rounds=1")


def test_captions_alone(run):
    lines, figures = run("generation.py", *CAPTIONS, "--num-beams", "1", "--dtype=float32")
    assert lines[0].startswith("generation tiny, batch 2, 3 tokens behind an image and 8, float32")
    assert [line.split()[:2] for line in lines[2:-1]] == [["greedy", "jaxblip"]]
    ours = figures["decodings"]["greedy"]["jaxblip"]
    assert ours["batch_s"] == pytest.approx(6 / ours["tokens_per_s"]) and ours["image_s"] > 0
    assert figures["ratio"] == {"greedy": {}} and figures["compile_s"] > 0


def test_captions_beside_transformers(run):
    lines, figures = run("generation.py", *CAPTIONS, "--num-beams", "1", "3", "--peer")
    assert list(figures["decodings"]) == ["greedy", "beam 3"]
    peers = ["torch"] if torch.cuda.is_available() else ["torch", "torch, bf16"]
    for decoding, rows in figures["decodings"].items():
        assert list(rows) == ["jaxblip", *peers]
        ratio = rows["jaxblip"]["tokens_per_s"] / rows["torch"]["tokens_per_s"]
        assert figures["ratio"][decoding]["torch"] == pytest.approx(ratio)
        assert any(line.startswith(f"{decoding}: jaxblip makes {ratio:.2f}") for line in lines)


def test_training_steps_beside_transformers(run):
    arguments = ("--task=stage1", "--batch-size=8", "--rounds=1", "--steps=1")
    lines, figures = run("step_time.py", *arguments, "--peer")
    assert lines[0].startswith("stage1 tiny, batch 8, bfloat16")
    ratio = figures["seconds"]["jaxblip"] / figures["seconds"]["torch"]
    assert figures["ratio"] == pytest.approx(ratio)
    assert f"jaxblip takes {ratio:.2f} of the time of torch" in lines
    assert figures["operations"] > 1e6


@pytest.mark.parametrize("python", ["", "nowhere/python"])
def test_without_lavis_it_says_how_to_make_its_environment(run, monkeypatch, python):
    monkeypatch.setitem(os.environ, "LAVIS_PYTHON", python)
    with pytest.raises(SystemExit, match="pip install --no-deps salesforce-lavis==1.0.2") as error:
        run("step_time.py", "--peer=lavis")
    assert python in str(error.value)
