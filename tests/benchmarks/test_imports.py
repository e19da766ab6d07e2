"""Benchmarks of models run where no library for data, checkpoints or tokenizers is installed."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ABSENT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        libraries = ("PIL", "array_record", "fsspec", "grain", "orbax", "pyarrow", "safetensors",
                     "simplejpeg", "tensorflow_datasets", "tokenizers", "transformers")
        if name.split(".")[0] in libraries:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
"""


@pytest.mark.parametrize("script", ["step_time", "generation"])
def test_a_benchmark_needs_no_library_for_data(script):
    program = f"""
import sys
sys.path[:0] = [{str(BENCHMARKS)!r}]
{ABSENT}
import {script}, workloads
for task in workloads.TASKS:
    workloads.random_batch(workloads.make_task(workloads.make_config(task, "tiny")))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
