"""Times whole training steps: forward, backward, update.

    python benchmarks/step_time.py --task=stage1 --size=small --peer

prints a table of our step and, in turns with it, that of PyTorch with transformers' modules. Needs
jax, flax, optax, ml_collections and jaxtyping; the peer also torch and transformers.

We compute as configs do by default, in bfloat16. The peer computes as its users do: under bf16
autocast on a GPU, in float32 on a CPU, where a third line shows it under autocast as well.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from workloads import (  # noqa: E402
    SIZES,
    TASKS,
    OurStep,
    from_features,
    make_config,
    random_batch,
)

from jaxblip.tasks import FROM_FEATURES  # noqa: E402

DTYPES = ("bfloat16", "float32")
PEERS = ("torch", "lavis")
# Dense bf16 operations a second, from the data sheets; of a CPU a product is timed.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--task", choices=TASKS, default="stage1")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch-size", type=int, default=0, help="by default that of the size")
    parser.add_argument(
        "--peer", nargs="?", const="torch", choices=PEERS,
        help="PyTorch, in turns with ours; lavis: beside it salesforce-lavis, where there is one",
    )  # fmt: skip
    parser.add_argument(
        "--features", action="store_true", help="the step from image features too, in turns with it"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="that we compute in")
    parser.add_argument("--rounds", type=int, default=5, help="in each, one measurement of either")
    parser.add_argument("--steps", type=int, default=2, help="steps of a measurement")
    parser.add_argument("--json", metavar="FILE", help="where to write the figures")
    options = parser.parse_args()
    if options.features and options.task not in FROM_FEATURES:
        parser.error(f"--features: the task {options.task} does not train from image features")
    if options.peer == "lavis":
        from peers.lavis_step import LavisStep, lavis_python

        lavis_python()  # before anything takes time
    device = jax.devices()[0]
    config = make_config(options.task, options.size, options.batch_size, options.dtype)
    ours = OurStep(config)
    steps = {"jaxblip": ours}
    if options.features:
        steps["features"] = OurStep(from_features(config))
    if options.peer:
        from peers.torch_step import TorchStep

        on_cpu, batch = device.platform == "cpu", random_batch(ours.task)
        steps["torch"] = TorchStep(config, batch, bfloat16=not on_cpu)
        if on_cpu:
            steps["torch, bf16"] = TorchStep(config, batch, bfloat16=True)
    if options.peer == "lavis":
        steps["lavis"] = LavisStep(config, batch)
    seconds = interleaved(steps, options.rounds, options.steps)
    operations = dict.fromkeys(steps, ours.operations)
    if options.features:
        operations["features"] = steps["features"].operations
    figures = {
        "machine": f"{device.device_kind}, {os.cpu_count()} cores, {jax.device_count()} device(s)",
        "task": options.task,
        "size": options.size,
        "batch_size": config.batch_size,
        "dtype": options.dtype,
        "seconds": seconds,
        "images_per_s": {name: config.batch_size / s for name, s in seconds.items()},
        "operations": ours.operations,
        "tflops_per_s": {name: operations[name] / s / 1e12 for name, s in seconds.items()},
        "peak_tflops_per_s": peak(device, options.dtype) * jax.device_count() / 1e12,
        "memory_gib": ours.memory_bytes / 2**30,
        "compile_s": ours.compile_s,
    }
    if "features" in seconds:
        figures["features_ratio"] = seconds["features"] / seconds["jaxblip"]
    if "torch" in seconds:
        figures["ratio"] = seconds["jaxblip"] / seconds["torch"]
        figures["ratios"] = {
            name: seconds["jaxblip"] / s
            for name, s in seconds.items()
            if name not in ("jaxblip", "features")
        }
    print("\n".join(table(figures)))
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n")


def interleaved(steps, rounds: int, count: int) -> dict[str, float]:
    """Median seconds of a step of each, measured in turns; the first step of each is left out."""
    for step in steps.values():
        step()
    measured = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            begin = time.perf_counter()
            for _ in range(count):
                step()
            measured[name].append((time.perf_counter() - begin) / count)
    return {name: statistics.median(times) for name, times in measured.items()}


def peak(device: jax.Device, dtype: str) -> float:
    """Operations a second that a device can do in matrix products."""
    for name, operations in PEAKS.items():
        if name in device.device_kind:
            return operations
    side = 2048
    product = jax.jit(partial(jnp.matmul, preferred_element_type=jnp.float32))
    matrix = jnp.ones((side, side), dtype)
    product(matrix, matrix).block_until_ready()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        times.append(time.perf_counter() - begin)
    return 2 * side**3 / min(times)


def table(figures: dict) -> list[str]:
    peak_tflops = figures["peak_tflops_per_s"]
    lines = [
        f"{figures['task']} {figures['size']}, batch {figures['batch_size']}, {figures['dtype']}, "
        f"{figures['machine']}; {figures['operations'] / 1e12:.3f} TFLOP a step, peak "
        f"{peak_tflops:.2f} TFLOP/s",
        f"{'':12}{'s/step':>10}{'images/s':>10}{'TFLOP/s':>10}{'of peak':>10}",
    ]
    for name, seconds in figures["seconds"].items():
        tflops = figures["tflops_per_s"][name]
        lines.append(
            f"{name:12}{seconds:>10.4g}{figures['images_per_s'][name]:>10.4g}{tflops:>10.4g}"
            f"{tflops / peak_tflops:>10.1%}"
        )
    if "features_ratio" in figures:
        ratio = figures["features_ratio"]
        lines.append(f"from image features a step takes {ratio:.2f} of the time")
    for name, ratio in figures.get("ratios", {}).items():
        lines.append(f"jaxblip takes {ratio:.2f} of the time of {name}")
    lines.append(
        f"jaxblip: {figures['memory_gib']:.2f} GiB as planned by the compiler, "
        f"{figures['compile_s']:.1f} s to compile"
    )
    return lines


if __name__ == "__main__":
    main()
