"""Between two lines of metrics the loop hands steps to the device and asks it for nothing."""

import contextlib
import re
import subprocess
import sys
from collections import Counter

import jax
import numpy as np
import pytest
from jax._src.array import ArrayImpl

from jaxblip import sharding
from jaxblip.cli import main
from jaxblip.training import loop
from jaxblip.training.metrics import read_metrics
from jaxblip.training.monitor import Monitor

FIELDS = {
    "steps": 7,
    "batch_size": 8,
    "log_every_steps": 3,
    "checkpoint.every_steps": 100,
    "optimizer.warmup_steps": 3,
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


class Events(list):
    """What happens in the loop, in its order: "step", "log", and each way to wait or to fetch."""

    def record(self, monkeypatch, owner, name, event):
        original = getattr(owner, name)
        as_property = isinstance(original, property)

        def recorded(*args, **kwargs):
            self.append(event)
            return (original.fget if as_property else original)(*args, **kwargs)

        monkeypatch.setattr(owner, name, property(recorded) if as_property else recorded)


def test_nothing_is_fetched_and_nothing_waited_for_between_logs(tmp_path, monkeypatch):
    events = Events()
    events.record(monkeypatch, Monitor, "after_step", "step")
    events.record(monkeypatch, Monitor, "log", "log")
    # Every way to a value on the host (`int`, `float`, `np.asarray`, `device_get`, `print`) goes
    # through one of these.
    events.record(monkeypatch, ArrayImpl, "_value", "fetch")
    events.record(monkeypatch, jax, "device_get", "fetch")
    events.record(monkeypatch, jax, "block_until_ready", "wait")
    events.record(monkeypatch, ArrayImpl, "block_until_ready", "wait")
    assert main(arguments(tmp_path / "run")) == 0

    of_step = " ".join(events[events.index("step") :])
    assert Counter(events)["step"] == 7 and Counter(events)["log"] == 3
    log = r"log( fetch)+"
    # The first step alone is waited for: its compilation is no part of the speed.
    end_of_run = r"( (fetch|wait))*"  # the checkpoint
    assert re.fullmatch(
        rf"step wait step step {log} step step step {log} step {log}{end_of_run}", of_step
    ), of_step


def test_a_step_moves_nothing_but_its_batch_and_that_explicitly(tmp_path, monkeypatch):
    """Whatever moves without being asked for, such as a number that a step is given, is an error."""
    guard = contextlib.ExitStack()
    guarded = []

    def put_batch(batch, mesh):
        if not guarded:
            guard.enter_context(jax.transfer_guard("disallow"))
        guarded.append(len(batch))
        return original(batch, mesh)

    original = sharding.put_batch
    monkeypatch.setattr(loop.sharding, "put_batch", put_batch)
    monkeypatch.setattr(loop.Checkpoints, "save", lambda *args: guard.close())  # behind the steps
    with guard:
        assert main(arguments(tmp_path / "run")) == 0
        assert len(guarded) == 7
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [3, 6, 7]


def test_the_guard_sees_what_it_should():
    add = jax.jit(lambda x, y: x + y)
    one = jax.device_put(np.float32(1))
    with jax.transfer_guard("disallow"), pytest.raises(jax.errors.JaxRuntimeError, match="isallow"):
        add(one, 2.0)


STEP = """
import jax, time
from jaxblip.runtime import keep_compilations

keep_compilations()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
jax.jit(lambda x: jax.numpy.tanh(x) @ x)(jax.numpy.ones((64, 64))).block_until_ready()
print(jax.config.jax_compilation_cache_dir, hits.count("/jax/compilation_cache/cache_hits"))
"""


def test_what_one_process_compiled_the_next_one_finds(tmp_path, monkeypatch):
    def run(**variables):
        environment = {**variables, "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path / "home")}
        command = [sys.executable, "-c", STEP]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        folder, hits = done.stdout.split()
        return folder, int(hits)

    folder = str(tmp_path / "cache" / "jaxblip" / "compilations")
    assert run(XDG_CACHE_HOME=str(tmp_path / "cache")) == (folder, 0)
    found, hits = run(XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert found == folder and hits > 0
