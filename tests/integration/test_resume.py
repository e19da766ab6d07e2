"""A run that is stopped, killed and started again ends with the bits of one that never was."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxblip.cli import main
from jaxblip.training.checkpoints import load_params
from jaxblip.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
STEPS = 24
TIMED = ("images_per_s", "seconds_per_step", "data_wait_share")  # differ from run to run


def command(workdir, *overrides):
    tiny = {
        "steps": STEPS,
        "batch_size": 16,
        "log_every_steps": 1,
        "checkpoint.every_steps": 5,
        "optimizer.warmup_steps": 3,
        "init.vision": "random",
        "eval.source": "",
        "data.image_size_px": 24,
        "data.crop_scale": "0.5,1.0",  # random, so that its position must be resumed too
        "model.vision.num_layers": 1,
        "model.vision.width": 32,
        "model.qformer.num_layers": 2,
        "model.qformer.width": 32,
        "model.qformer.hidden_dropout": 0.1,
    }
    return [
        sys.executable, "-m", "jaxblip.cli", "train", "--config=configs/demo/stage1.py",
        f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in tiny.items()), *overrides,
    ]  # fmt: skip


def environment():
    # One device each: eight virtual ones would only slow these processes down.
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}


def run(workdir, *overrides):
    return subprocess.run(
        command(workdir, *overrides), cwd=ROOT, env=environment(), capture_output=True, text=True
    )


def run_and_signal(workdir, after_step, which, *overrides):
    """Starts a run and sends it a signal as soon as it has logged a step."""
    process = subprocess.Popen(
        command(workdir, *overrides), cwd=ROOT, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        lines = read_metrics(workdir)
        if lines and lines[-1]["step"] >= after_step:
            break
        time.sleep(0.01)
    process.send_signal(which)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def deterministic(workdir):
    return [
        {name: value for name, value in line.items() if name not in TIMED}
        for line in read_metrics(workdir)
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    done = run(workdir)
    assert done.returncode == 0, done.stdout + done.stderr
    return workdir


def test_terminated_and_killed_twice_equals_never_interrupted(uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    status, output = run_and_signal(workdir, 3, signal.SIGTERM)
    assert status == 0, output
    assert re.search(r"Stopped by SIGTERM after step \d+ of 24; saved. To go on", output)
    stopped_at = read_metrics(workdir)[-1]["step"]

    status, output = run_and_signal(workdir, stopped_at + 4, signal.SIGKILL)
    assert status == -signal.SIGKILL, output
    # On another number of workers; `communicate` would wait for one that survived.
    status, output = run_and_signal(
        workdir, stopped_at + 9, signal.SIGKILL, "--config.data.num_workers=1"
    )
    assert status == -signal.SIGKILL, output
    assert read_metrics(workdir)[-1]["step"] < STEPS

    done = run(workdir)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Resuming at step [1-9]\d*", done.stdout)

    expected, resumed = load_params(uninterrupted), load_params(workdir)
    jax.tree.map(np.testing.assert_array_equal, resumed, expected)
    assert deterministic(workdir) == deterministic(uninterrupted)


def test_a_finished_run_started_again_changes_nothing(uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    done = run(uninterrupted)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_the_work_directory_says_what_the_run_was(uninterrupted):
    config = json.loads((uninterrupted / "config.json").read_text())
    assert config["task"] == "stage1" and config["model"]["qformer"]["vocab_size"] > 0
    environment = json.loads((uninterrupted / "environment.json").read_text())
    assert environment["versions"]["jax"] and environment["devices"]
    assert list((uninterrupted / "tensorboard").iterdir())
    assert (uninterrupted / "tokenizer" / "tokenizer.json").is_file()


def test_another_config_in_the_same_work_directory_is_refused(uninterrupted, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(command(uninterrupted, "--config.optimizer.peak_lr=0.5")[3:]) == 2
    printed = capsys.readouterr().err
    assert re.search(r"optimizer.peak_lr was [0-9.]+, is now 0.5", printed)
