"""Between two lines of metrics the loop hands steps to the device and asks it for nothing."""

import contextlib
import re
from collections import Counter
from types import SimpleNamespace

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


def train(workdir):
    overrides = [f"--config.{name}={value}" for name, value in FIELDS.items()]
    return main(["train", "--config=configs/demo/vision.py", f"--workdir={workdir}", *overrides])


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory):
    """A user's cache folder, of which JAX knows nothing yet."""
    before = jax.config.jax_compilation_cache_dir
    folder = tmp_path_factory.mktemp("cache")
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def record(patch, owner, name, events, describe):
    """Adds `describe(*args)` to the events whenever this method, function or property is used."""
    original = getattr(owner, name)
    called = original.fget if isinstance(original, property) else original

    def recorded(*args, **kwargs):
        events.append(describe(*args))
        return called(*args, **kwargs)

    recorded = property(recorded) if isinstance(original, property) else recorded
    patch.setattr(owner, name, recorded)


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache_folder):
    """A run whose steps may move nothing unasked, and all that it waited for or fetched."""
    workdir, events, steps, batches = tmp_path_factory.mktemp("runs") / "first", [], [], []
    guard = contextlib.ExitStack()
    put_batch, save = sharding.put_batch, loop.Checkpoints.save

    def step(monitor, number, metrics):
        steps.append(metrics)
        return "step"

    def wait(waited_for):
        behind = [i for i, metrics in enumerate(reversed(steps)) if metrics is waited_for]
        return f"wait-{behind[0]}-behind" if behind else "wait"

    def guarded_from_here_on(batch, mesh):
        if not batches:
            guard.enter_context(jax.transfer_guard("disallow"))
        batches.append(batch)
        return put_batch(batch, mesh)

    def unguarded_save(*args):  # behind the steps
        guard.close()
        return save(*args)

    with pytest.MonkeyPatch.context() as patch, guard:
        record(patch, Monitor, "after_step", events, step)
        record(patch, Monitor, "log", events, lambda *_: "log")
        record(patch, jax, "block_until_ready", events, wait)
        record(patch, ArrayImpl, "block_until_ready", events, wait)
        # Every way to a value on the host (`int`, `float`, `np.asarray`, `device_get`, `print`)
        # goes through one of these.
        record(patch, ArrayImpl, "_value", events, lambda *_: "fetch")
        record(patch, jax, "device_get", events, lambda *_: "fetch")
        patch.setattr(loop.sharding, "put_batch", guarded_from_here_on)
        patch.setattr(loop.Checkpoints, "save", unguarded_save)
        assert train(workdir) == 0
    return SimpleNamespace(workdir=workdir, events=events, batches=batches)


def test_between_logs_nothing_is_fetched_and_the_device_has_its_next_step(run):
    first = run.events.index("step")
    last = len(run.events) - run.events[::-1].index("log")
    in_loop = " ".join(run.events[first:last])
    log = r"log ((fetch|wait) )+"
    # The first step is waited for, since its compilation is no part of the speed.
    assert re.fullmatch(
        rf"step wait-0-behind step step wait-2-behind {log}"
        rf"(step wait-2-behind ){{3}}{log}step wait-2-behind log",
        in_loop,
    ), in_loop


def test_a_step_moves_nothing_but_its_batch_and_that_explicitly(run):
    """Whatever moves without being asked for, such as a number given to a step, is an error."""
    assert len(run.batches) == 7
    assert [line["step"] for line in read_metrics(run.workdir)] == [3, 6, 7]
    add, one = jax.jit(lambda x, y: x + y), jax.device_put(np.float32(1))
    with jax.transfer_guard("disallow"), pytest.raises(jax.errors.JaxRuntimeError, match="isallow"):
        add(one, 2.0)


def test_what_one_run_compiled_the_next_one_finds(run, cache_folder, tmp_path):
    assert list((cache_folder / "jaxblip" / "compilations").glob("jit_step-*"))
    events = []
    jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
    assert train(tmp_path / "second") == 0
    counts = Counter(events)
    assert counts["/jax/compilation_cache/cache_hits"] > 0
    assert counts["/jax/compilation_cache/cache_misses"] == 0
    lines = [read_metrics(workdir) for workdir in (run.workdir, tmp_path / "second")]
    assert [line["train/loss"] for line in lines[0]] == [line["train/loss"] for line in lines[1]]
    assert not list((tmp_path / "second").rglob("*-cache"))
