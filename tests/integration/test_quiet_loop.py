"""Between two lines of metrics the loop hands steps to the device and asks it for nothing."""

import contextlib
import re
from collections import Counter

import jax
import numpy as np
import pytest
from jax._src.array import ArrayImpl
from jax.experimental.compilation_cache import compilation_cache

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


def record(monkeypatch, owner, name, events, describe):
    """Adds `describe(*args)` to the events whenever this method, function or property is used."""
    original = getattr(owner, name)
    called = original.fget if isinstance(original, property) else original

    def recorded(*args, **kwargs):
        events.append(describe(*args))
        return called(*args, **kwargs)

    recorded = property(recorded) if isinstance(original, property) else recorded
    monkeypatch.setattr(owner, name, recorded)


def test_between_logs_nothing_is_fetched_and_the_device_has_its_next_step(tmp_path, monkeypatch):
    events, steps = [], []

    def step(monitor, number, metrics):
        steps.append(metrics)
        return "step"

    def wait(waited_for):
        behind = [i for i, metrics in enumerate(reversed(steps)) if metrics is waited_for]
        return f"wait-{behind[0]}-behind" if behind else "wait"

    record(monkeypatch, Monitor, "after_step", events, step)
    record(monkeypatch, Monitor, "log", events, lambda *_: "log")
    record(monkeypatch, jax, "block_until_ready", events, wait)
    record(monkeypatch, ArrayImpl, "block_until_ready", events, wait)
    # Every way to a value on the host (`int`, `float`, `np.asarray`, `device_get`, `print`) goes
    # through one of these.
    record(monkeypatch, ArrayImpl, "_value", events, lambda *_: "fetch")
    record(monkeypatch, jax, "device_get", events, lambda *_: "fetch")
    assert main(arguments(tmp_path / "run")) == 0

    first = events.index("step")
    last = len(events) - events[::-1].index("log")
    in_loop = " ".join(events[first:last])
    log = r"log ((fetch|wait) )+"
    # The first step is waited for, since its compilation is no part of the speed.
    assert re.fullmatch(
        rf"step wait-0-behind step step wait-2-behind {log}"
        rf"(step wait-2-behind ){{3}}{log}step wait-2-behind log",
        in_loop,
    ), in_loop


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


def test_what_one_run_compiled_the_next_one_finds(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    events = []
    jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
    try:
        assert main(arguments(tmp_path / "first")) == 0
        assert list((tmp_path / "cache" / "jaxblip" / "compilations").glob("jit_step-*"))
        of_first = len(events)
        assert main(arguments(tmp_path / "second")) == 0
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()
    counts = Counter(events[of_first:])
    assert counts["/jax/compilation_cache/cache_hits"] > 0
    assert counts["/jax/compilation_cache/cache_misses"] == 0
    lines = [read_metrics(tmp_path / name) for name in ("first", "second")]
    assert [line["train/loss"] for line in lines[0]] == [line["train/loss"] for line in lines[1]]
    assert not list((tmp_path / "second").rglob("*-cache"))
