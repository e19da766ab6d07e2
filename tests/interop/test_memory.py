"""Conversion streams: the peak of a process whose checkpoint is far larger than its bound."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxblip.interop import entries as e
from jaxblip.interop.save import save_params

STACKS, LAYERS, SHAPE = 2, 12, (1024, 2048)
LAYER_MIB = 8
ALL_MIB = STACKS * LAYERS * LAYER_MIB
SLACK_MIB = 48  # chunks of a transposed tensor, small compilations, the allocator

LAYOUT = e.Layout(
    tuple(
        entry
        for stack in range(STACKS)
        for i in range(LAYERS)
        for entry in e.linear(f"layers.{i}.{stack}", f"stack_{stack}/up", i, bias=False)
    )
)

# Prints the peak of each step above what the process had before it, in MiB.
SCRIPT = """
import gc, json, sys
import jax, numpy as np
from test_memory import LAYOUT, LAYERS, SHAPE, STACKS
from jaxblip.interop.files import open_weights
from jaxblip.interop import load
from jaxblip.interop.load import load_params, stored_params
from jaxblip.interop.save import save_params

load.LARGE_BYTES = 16 << 20  # every stack is large
source, out = sys.argv[1:]

def status(field):
    with open("/proc/self/status") as file:
        return next(int(l.split()[1]) for l in file if l.startswith(field + ":")) / 1024

def peak(function):
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak so far is forgotten
    before = status("VmRSS")
    result = function()
    return result, status("VmHWM") - before

leaf = jax.ShapeDtypeStruct((LAYERS, *SHAPE), np.float32)
shapes = {f"stack_{i}": {"up": {"kernel": leaf}} for i in range(STACKS)}
place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
shardings = jax.tree.map(lambda _: place, shapes)
weights = open_weights(source)
peaks = {}
_, peaks["copy"] = peak(
    lambda: save_params(stored_params(weights, LAYOUT, shapes), LAYOUT, out + "/copy", {})
)
one = {"stack_0": shapes["stack_0"]}  # compiling costs memory once
load_params(weights, LAYOUT, one, {"stack_0": shardings["stack_0"]})
params, peaks["load"] = peak(lambda: load_params(weights, LAYOUT, shapes, shardings))
_, peaks["save"] = peak(lambda: save_params(params, LAYOUT, out + "/save", {}))
print(json.dumps(peaks))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc")
def test_peaks(tmp_path):
    rng = np.random.default_rng(0)
    params = {
        f"stack_{i}": {"up": {"kernel": rng.random((LAYERS, *SHAPE), np.float32)}}
        for i in range(STACKS)
    }
    source = tmp_path / "source"
    save_params(params, LAYOUT, source, {})
    files = {"source": (source / "model.safetensors")}
    assert files["source"].stat().st_size >= ALL_MIB << 20
    output = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(source), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    ).stdout
    peaks = json.loads(output)
    print(peaks)
    assert peaks["copy"] < LAYER_MIB + SLACK_MIB, peaks
    # The parameters themselves lie in the host's memory here; beside them, one layer at a time.
    # That they are seen shows that peaks are measured; the kernel's counts lag by some pages
    # (proc(5): "inaccurate"), which one layer outweighs.
    assert ALL_MIB - LAYER_MIB < peaks["load"] < ALL_MIB + LAYER_MIB + SLACK_MIB, peaks
    assert peaks["save"] < LAYER_MIB + SLACK_MIB, peaks
    expected = files["source"].read_bytes()
    for name in ("copy", "save"):
        assert (tmp_path / name / "model.safetensors").read_bytes() == expected
