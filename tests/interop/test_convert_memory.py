"""`jaxblip convert` streams, both ways: the peak of a process that converts 400 MiB."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from published_folders import tokenizer_of
from tiny_checkpoints import VOCAB, same_bits

from jaxblip.config import default_config
from jaxblip.interop.families.opt import hf_opt_config, opt_layout
from jaxblip.interop.save import save_params
from jaxblip.models.opt import OptConfig
from jaxblip.tasks import make_task

CONFIG = OptConfig(
    vocab_size=VOCAB, width=1024, num_layers=8, num_heads=8, mlp_width=4096, max_positions=32
)
ALL_MIB = 8 * 48  # a layer: 4 kernels of 4 MiB and 2 of 16
SLACK_MIB = 240  # a tensor and its transpose, Orbax's buffers, the tracing of the model

SCRIPT = """
import gc, json, sys
from pathlib import Path
from jaxblip.interop.convert import convert

source, tiny, out = sys.argv[1:]

def status(field):
    with open("/proc/self/status") as file:
        return next(int(l.split()[1]) for l in file if l.startswith(field + ":")) / 1024

def peak(*arguments):
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak so far is forgotten
    before = status("VmRSS")
    convert(*arguments)
    return status("VmHWM") - before

convert(tiny, out + "/tiny_run")  # imports and compilations cost memory once
convert(out + "/tiny_run", out + "/tiny_again")
print(json.dumps([peak(source, out + "/run"), peak(out + "/run", out + "/again")]))
"""


def publish(folder: Path, config: OptConfig) -> None:
    """Zeros would be compressed away, so all values are random."""
    experiment = default_config("language_model")
    section = experiment.model.language_model
    section.update({name: getattr(config, name) for name in section if name != "architecture"})
    experiment.data.max_text_tokens = 8
    task = make_task(experiment.lock())
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), shapes)
    save_params(params, opt_layout(config, "language_model/"), folder, hf_opt_config(config))
    tokenizer_of("opt").save_pretrained(folder)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc")
def test_peaks(tmp_path):
    publish(tmp_path / "large", CONFIG)
    publish(tmp_path / "tiny", OptConfig(VOCAB, 16, 2, 2, 24, 32))
    output = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "large", tmp_path / "tiny", tmp_path],
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    ).stdout
    peaks = json.loads(output.splitlines()[-1])
    print(peaks)
    assert (tmp_path / "large/model.safetensors").stat().st_size >= ALL_MIB << 20
    assert max(peaks) < SLACK_MIB < ALL_MIB, peaks
    same_bits(tmp_path / "again", tmp_path / "large")
