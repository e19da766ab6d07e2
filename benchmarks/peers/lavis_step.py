"""A training step of salesforce-lavis, BLIP-2's own code, in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

WORKER = Path(__file__).with_name("lavis_worker.py")
ENVIRONMENT = """\
--peer=lavis runs salesforce-lavis 1.0.2, which needs old releases of its dependencies, in an
environment of its own. Make it once, with Python 3.8 to 3.11, and say where it is:
    python3.11 -m venv lavis
    lavis/bin/pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu
    lavis/bin/pip install --no-deps salesforce-lavis==1.0.2 timm==0.4.12 pycocoevalcap
    lavis/bin/pip install transformers==4.26.1 'numpy<2' 'opencv-python-headless<4.12' \\
        omegaconf iopath ftfy einops pandas pycocotools scikit-image contexttimer python-magic \\
        wheel setuptools
    lavis/bin/pip install --no-build-isolation fairscale==0.4.4
    export LAVIS_PYTHON=$PWD/lavis/bin/python"""


class LavisStep:
    """The same work as `workloads.OurStep`, but for what LAVIS does its own way, in float32.

    It keeps the dropout of the frozen OPT, and its negatives may be those of the same image.
    """

    def __init__(self, config: ConfigDict, batch: dict):
        python = lavis_python()
        self._folder = tempfile.TemporaryDirectory()
        files = [str(Path(self._folder.name) / name) for name in ("sizes.json", "batch.npz")]
        Path(files[0]).write_text(json.dumps(_sizes(config)))
        np.savez(files[1], **{name: batch[name] for name in ("image", "text_ids", "text_mask")})
        environment = {**os.environ, "PYTHONPATH": ""}
        self._log = Path(self._folder.name) / "log"
        with self._log.open("w") as log:
            self._worker = subprocess.Popen(
                [python, "-W", "ignore", WORKER, *files],
                env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                text=True,
            )  # fmt: skip

    def __call__(self) -> float:
        """One step, finished; its loss."""
        try:
            self._worker.stdin.write("step\n")
            self._worker.stdin.flush()
            loss = self._worker.stdout.readline()
        except BrokenPipeError:
            loss = ""
        if not loss:
            last = self._log.read_text().strip().splitlines()[-1:]
            raise SystemExit(f"salesforce-lavis ended: {' '.join(last)}\n\n{ENVIRONMENT}")
        return float(loss)

    def close(self) -> None:
        """Ends the process."""
        self._worker.stdin.close()
        self._worker.wait()
        self._folder.cleanup()


def lavis_python() -> str:
    """The Python that the user has made for LAVIS; ends the program where there is none."""
    python = os.environ.get("LAVIS_PYTHON", "")
    if not Path(python).is_file():
        missing = f"LAVIS_PYTHON={python} is no file. " if python else ""
        raise SystemExit(missing + ENVIRONMENT)
    return python


def _sizes(config: ConfigDict) -> dict:
    """What `lavis_worker.py` reads."""
    v, q, optimizer = config.model.vision, config.model.qformer, config.optimizer
    sizes = {
        "task": config.task,
        "image_size": config.data.image_size_px,
        "num_queries": q.num_query_tokens,
        "vision": _bert_sizes(v) | {"patch_size": v.patch_size_px},
        "qformer": _bert_sizes(q),
        "optimizer": {
            "lr": optimizer.peak_lr,
            "betas": (optimizer.b1, optimizer.b2),
            "weight_decay": optimizer.weight_decay,
        },
    }
    if config.task == "stage2":
        lm = config.model.language_model
        if lm.architecture != "opt":
            raise SystemExit(f"--peer=lavis: stage 2 runs with opt, not {lm.architecture}.")
        sizes["language_model"] = dict(
            vocab_size=lm.vocab_size, hidden_size=lm.width, word_embed_proj_dim=lm.width,
            num_hidden_layers=lm.num_layers, num_attention_heads=lm.num_heads, ffn_dim=lm.mlp_width,
        )  # fmt: skip
    elif config.task != "stage1":
        raise SystemExit(f"--peer=lavis: LAVIS trains stage1 and stage2, not {config.task}.")
    return sizes


def _bert_sizes(part: ConfigDict) -> dict:
    return dict(
        hidden_size=part.width, num_hidden_layers=part.num_layers,
        num_attention_heads=part.num_heads, intermediate_size=part.mlp_width,
    )  # fmt: skip
