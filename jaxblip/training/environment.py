"""What a run ran on: package versions and devices, saved beside its results."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path

import jax

import jaxblip

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "tokenizers",
    "ml_collections", "numpy", "pillow", "array_record", "libtpu", "jax-cuda12-plugin",
    "jax-cuda13-plugin",
)  # fmt: skip
ENVIRONMENT_FILE = "environment.json"


def describe_environment() -> dict[str, object]:
    """Versions of Python and of the installed packages, and the devices of this run."""
    versions = {"python": platform.python_version(), "jaxblip": jaxblip.__version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    devices = jax.devices()
    return {
        "versions": versions,
        "devices": [f"{device.device_kind} {device.id}" for device in devices],
        "platform": devices[0].platform,
        "process_count": jax.process_count(),
        "cpu_count": os.cpu_count(),
    }


def save_environment(workdir: str | os.PathLike) -> None:
    """Writes `environment.json`."""
    text = json.dumps(describe_environment(), indent=2)
    (Path(workdir) / ENVIRONMENT_FILE).write_text(text + "\n")
