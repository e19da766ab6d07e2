"""The benchmark of the input pipeline: its peers do the same work."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FILE = Path(__file__).parents[2] / "benchmarks" / "input_pipeline.py"


@pytest.fixture(scope="module")
def benchmark():
    pytest.importorskip("psutil")
    spec = importlib.util.spec_from_file_location("input_pipeline", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(benchmark, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    benchmark.write_images(folder, 40, size=(60, 80))
    return folder


def test_photographs_are_of_the_size_that_is_measured(benchmark):
    rng = np.random.default_rng(0)
    fields = [benchmark.random_field(rng, 480, 640) for _ in range(3)]
    sizes = [len(benchmark.photo(rng, fields)) for _ in range(6)]
    assert 60_000 < np.mean(sizes) < 80_000
    assert Image.open(io.BytesIO(benchmark.photo(rng, fields))).size == (640, 480)


def test_peers_make_the_same_batches(benchmark, folder):
    torch = pytest.importorskip("torch")
    with benchmark.jaxblip_batches(folder, workers=0, batch_size=8) as batches:
        ours = next(batches)
    pairs = benchmark.TorchPairs(folder)
    assert len(pairs) == 40
    images, texts = benchmark.TorchCollate(folder)([pairs[i] for i in range(40)])
    assert ours["image"].shape[1:] == (224, 224, 3) and images.shape[1:] == (3, 224, 224)
    # The same brightness, once the normalisation is undone, and every row of ours is one of theirs.
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (benchmark.MEAN, benchmark.STD))
    grey = 255 * (images * std + mean)
    assert abs(ours["image"].mean() - grey.mean()) < 15 and 0 <= grey.min() and grey.max() <= 255.01
    theirs = {tuple(ids) for ids in texts["input_ids"].tolist()}
    assert {tuple(ids) for ids in ours["text_ids"].tolist()} <= theirs


def test_memory_over_examples(benchmark, folder, monkeypatch):
    monkeypatch.setattr(benchmark, "MEMORY_STEP", 500)
    figures = benchmark.memory_over_examples(folder, workers=0, examples=1000)
    (first, some), (last, more) = figures["memory_mib_over_examples"]
    assert (first, last) == (500, 1000) and 50 < some < 5000 and more < some + 100
    json.dumps(figures)


def test_ratios_are_those_of_neighbours_and_other_load_is_said(benchmark, monkeypatch, capsys):
    """A machine that is half as fast in one round changes no ratio."""
    order, begun = [], []

    class Pipeline:
        def __init__(self, name, folder, workers):
            self.name = name
            begun.append(name)

        def turn(self, seconds):
            slow = 2 if len(order) // len(begun) == 1 else 1
            order.append(self.name)
            speed = {"jaxblip": 900, "jaxblip_threads": 1000, "bare": 1200}.get(self.name, 300)
            return {
                "images_per_second": speed / slow,
                "cpu_ms_per_image": 2000 * slow / speed,
                "memory_mib": 100 * slow,
                "others": 0.5,
            }

        def close(self):
            begun.remove(self.name)

    monkeypatch.setattr(benchmark, "Pipeline", Pipeline)
    monkeypatch.setattr(benchmark, "PEERS", dict.fromkeys(benchmark.PEERS, ""))
    figures = benchmark.take_turns(Path(), workers=2, rounds=3, seconds=1)
    names = ["jaxblip", *benchmark.PEERS]
    assert order == names + names[::-1] + names and not begun
    assert figures["images_per_second"] == 900 and figures["peers"]["pytorch"] == 300
    assert figures["ratio_torch"] == figures["ratio_torch_cpu"] == 3
    assert figures["ratio_bare"] == figures["ratio_bare_cpu"] == 0.75
    assert figures["ratio_torch_threads"] == 3.333 and figures["others"] == 0.5
    assert figures["peak_memory_mib"]["bare"] == 200
    assert "Other processes took 50% of the cores" in capsys.readouterr().out
    json.dumps(figures)


def test_time_of_all_cores_goes_on(benchmark):
    before = benchmark._busy_s()
    sum(range(3_000_000))
    assert 0.01 <= benchmark._busy_s() - before < 100
