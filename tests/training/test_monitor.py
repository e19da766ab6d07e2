"""What a run says of its input: which stage is slow, and how many workers would be enough."""

import time
from collections import Counter
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from jaxblip.config import default_config
from jaxblip.data.pipeline import Part, TrainBatches
from jaxblip.data.preprocess import Preprocess
from jaxblip.data.shapes import ShapesSource
from jaxblip.training.monitor import Monitor, bottleneck


def rates(waited, seconds_per_step):
    return {"data_wait_share": waited, "seconds_per_step": seconds_per_step, "images_per_s": 1.0}


def made(batches_made, **seconds):
    return SimpleNamespace(seconds=Counter(seconds), batches_made=batches_made)


def test_the_slowest_stage_comes_first_and_the_workers_follow_from_the_work(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16))
    # 0.6 s of work a batch, and a step of 0.1 s beside 0.1 s of waiting.
    batches = made(10, reading=1.5, images=4.2, texts=0.3)
    assert bottleneck(batches, rates(0.5, 0.2), num_workers=2) == (
        "Steps wait for data 50% of their time. Its preparation is images 70%, reading 25%, texts "
        "5%; about 6 worker processes would be enough (data.num_workers=2)."
    )
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(4))
    line = bottleneck(batches, rates(0.5, 0.2), num_workers=2)
    assert "about 6 worker processes" in line and "more than the 4 cores here" in line
    # The arithmetic may say fewer than there are, where workers shared the cores with the step.
    assert "about 9 worker" in bottleneck(batches, rates(0.5, 0.2), num_workers=8)


class SlowStorage(ShapesSource):
    def __getitem__(self, index):
        time.sleep(0.01)
        return super().__getitem__(index)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_stages_are_measured_where_the_work_is_done(num_workers):
    part = Part(SlowStorage("train", 16, size=20), Preprocess(("image", "image_id"), 16))
    with TrainBatches([part], batch_size=10, seed=0, num_workers=num_workers) as batches:
        for _ in range(3):
            next(batches)
        assert batches.batches_made == 3
        assert batches.seconds["reading"] >= 30 * 0.01
        assert 0 < batches.seconds["images"] < batches.seconds["reading"]
        assert set(batches.state()) & {"seconds", "batches_made"} == set()


def test_a_run_says_once_that_it_waits(tmp_path, capsys):
    config = default_config("clip")
    part = Part(ShapesSource("train", 16, size=20), Preprocess(("image", "image_id"), 16))
    metrics = {"loss": jnp.float32(1.0), "skipped_in_a_row": jnp.int32(0)}
    with TrainBatches([part], batch_size=10, seed=0) as batches:
        with Monitor(config, str(tmp_path), 0) as monitor:
            for step in range(1, 6):
                with monitor.waiting():
                    next(batches)
                    time.sleep(0.02)
                monitor.after_step(step, metrics)
                monitor.log(step, metrics, batches)
    printed = capsys.readouterr().out
    assert printed.count("Steps wait for data") == 1
