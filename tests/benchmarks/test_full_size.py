"""The benchmark of full-size checkpoints, at a tiny size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_all_phases(dtype, tmp_path):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    output = subprocess.run(
        [
            sys.executable,
            ROOT / "benchmarks" / "full_size.py",
            "--size=tiny",
            f"--dtype={dtype}",
            f"--folder={tmp_path}",
        ],
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "113 tensors are the same, bit for bit." in output
    table = [line for line in output.splitlines() if line.startswith("|")][2:]
    phases, seconds, peaks, sizes = zip(
        *(map(str.strip, line.strip("|").split("|")) for line in table), strict=True
    )
    assert phases == ("write", "import", "caption", "export", "compare")
    # Every phase is a process of its own, of which the parent saw the peak.
    assert all(0.1 < float(peak) < 4 for peak in peaks)
    assert not list(tmp_path.iterdir())
