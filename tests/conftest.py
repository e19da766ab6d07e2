"""Eight virtual CPU devices for all tests; they must exist before JAX starts."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_PLATFORMS"] = "cpu"
# No test may reach a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
