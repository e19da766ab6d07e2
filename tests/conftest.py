"""Eight virtual CPU devices for all tests, and quick compilation; both before JAX starts."""

import os

# Tiny models compile for far longer than they run, so the compiler is told to hurry.
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *FLAGS))
os.environ["JAX_PLATFORMS"] = "cpu"
# No test may reach a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
