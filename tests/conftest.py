"""Eight virtual CPU devices for all tests, and quick compilation; both before JAX starts."""

import os
import tempfile
from importlib.metadata import version

# Tiny models compile for far longer than they run, so the compiler is told to hurry.
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if version("jaxlib").startswith("0.10."):  # later ones do not know it, and refuse to start
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *FLAGS))
os.environ["JAX_PLATFORMS"] = "cpu"
# Nothing is compiled twice: workers, and processes that tests start, inherit the folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compilations = tempfile.TemporaryDirectory(prefix="jaxblip-compilations-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compilations.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# No test may reach a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"

# Files that take longest go first: else one process would wait for another at the end.
LONGEST = (
    "test_sharded_tasks.py", "test_bad_input.py", "test_losses.py", "test_launch.py",
    "test_lora_run.py", "test_resume.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)
