"""One run on two processes of four devices, started by `launch/local.py`, and on one of eight."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxblip.cli import main
from jaxblip.training.checkpoints import load_params, saved_steps
from jaxblip.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
STEPS = 16
TIMED = ("images_per_s", "seconds_per_step", "data_wait_share")  # differ from run to run
# All axes: `data` runs across the processes.
FIELDS = {
    "mesh.data": 2,
    "mesh.fsdp": 2,
    "mesh.tensor": 2,
    "steps": STEPS,
    "batch_size": 16,
    "log_every_steps": 1,
    "optimizer.warmup_steps": 3,
    # Beside this eps gradients that are nothing but rounding (a key's bias) move nothing.
    "optimizer.name": "adamw",
    "optimizer.eps": 1.0,
    "optimizer.peak_lr": 0.1,
    "eval.source": "",
    "data.num_workers": 0,
    "data.image_size_px": 24,
    "data.max_text_tokens": 8,
    "model.vision.num_layers": 1,
    "model.vision.width": 16,
    "model.text.num_layers": 1,
    "model.text.width": 16,
}


def arguments(workdir):
    overrides = [f"--config.{name}={value}" for name, value in FIELDS.items()]
    return ["train", "--config=configs/demo/vision.py", f"--workdir={workdir}", *overrides]


@pytest.fixture(scope="module")
def on_two_processes(tmp_path_factory):
    """Work directory and output of a run of which SIGTERM, sent to the launcher, stopped both."""
    workdir = tmp_path_factory.mktemp("runs") / "two"
    command = [sys.executable, "-m", "jaxblip.cli", *arguments(workdir)]
    launcher = subprocess.Popen(
        ["launch/local.py", "--processes=2", "--devices-per-process=4", "--", *command],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 600
    while launcher.poll() is None and time.monotonic() < deadline:
        if (lines := read_metrics(workdir)) and lines[-1]["step"] >= 3:
            launcher.send_signal(signal.SIGTERM)
            break
        time.sleep(0.02)
    output, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, output
    return workdir, output


@pytest.fixture(scope="module")
def on_one_process(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "one"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert main(arguments(workdir)) == 0
    return workdir


def assert_same_lines(ours, theirs):
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for our, their in zip(ours, theirs, strict=True):
        assert our.keys() - set(TIMED) == their.keys() - set(TIMED)
        for name in our.keys() - set(TIMED):
            np.testing.assert_allclose(our[name], their[name], rtol=2e-4, atol=1e-5, err_msg=name)


def test_two_processes_see_the_losses_of_one(on_two_processes, on_one_process):
    workdir, output = on_two_processes
    assert "[0] Task clip" in output and "8 cpu device(s), mesh data 2 x fsdp 2" in output
    environment = json.loads((workdir / "environment.json").read_text())
    assert environment["process_count"] == 2 and len(environment["devices"]) == 8
    lines = read_metrics(workdir)
    assert 3 <= len(lines) < STEPS
    assert_same_lines(lines, read_metrics(on_one_process)[: len(lines)])


def test_sigterm_saves_the_same_step_everywhere_and_one_process_goes_on_from_it(
    on_two_processes, on_one_process, tmp_path, monkeypatch, capfd
):
    stopped, output = on_two_processes
    (step,) = saved_steps(stopped)
    assert f"Stopped by SIGTERM after step {step} of {STEPS}; saved." in output
    workdir = shutil.copytree(stopped, tmp_path / "run")
    monkeypatch.chdir(ROOT)
    assert main(arguments(workdir)) == 0
    assert re.search(rf"Resuming at step {step} of {STEPS}", capfd.readouterr().out)
    assert_same_lines(read_metrics(workdir), read_metrics(on_one_process))
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5),
        load_params(workdir),
        load_params(on_one_process),
    )


def test_two_processes_evaluate_as_one_and_count_each_example_once(
    on_one_process, tmp_path, monkeypatch
):
    settings = {"source": "shapes:heldout", "max_images": 10, "batch_size": 8}
    overrides = [f"--config.eval.{name}={value}" for name, value in settings.items()]
    for name in ("one", "two"):
        shutil.copytree(on_one_process, tmp_path / name)
    command = [sys.executable, "-m", "jaxblip.cli", "evaluate", f"--workdir={tmp_path / 'two'}"]
    done = subprocess.run(
        ["launch/local.py", "--processes=2", "--devices-per-process=4", "--", *command, *overrides],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"\[(\d)\] Written to", done.stdout) == ["0"]
    monkeypatch.chdir(ROOT)
    assert main(["evaluate", f"--workdir={tmp_path / 'one'}", *overrides]) == 0

    def read(name):
        lines = (tmp_path / name / "predictions.jsonl").read_text().splitlines()
        results = json.loads((tmp_path / name / "results.json").read_text())
        return results, list(map(json.loads, lines))

    (ours, predicted), (theirs, expected) = read("two"), read("one")
    assert len({row["image_id"] for row in predicted}) == len(predicted) == 10
    assert predicted == expected
    metrics = [name for name, value in theirs.items() if isinstance(value, float)]
    assert "i2t_r1" in metrics and ours.keys() == theirs.keys()
    for name in ours:
        expect = pytest.approx(theirs[name], rel=1e-5) if name in metrics else theirs[name]
        assert ours[name] == expect, name
    assert not list((tmp_path / "two").glob(".*.new"))
