"""What accelerators have, by their makers' data sheets: memory, peaks, and links between chips.

TPUs: cloud.google.com/tpu/docs/v4, …/v5e, …/v5p and …/v6e ("System architecture"); their capacity
is what libtpu gives a program. GPUs: NVIDIA's data sheets of the A100, H100, H200 and DGX B200 (the
peaks without sparsity), and of the DGX systems for the network; what the compiler wants to know
besides (`target_config`) is from the same and from the CUDA programming guide, table "Technical
specifications per compute capability".
"""

from __future__ import annotations

import dataclasses

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU chip or GPU, and how many of them a machine may have.

    Attributes:
      capacity: bytes of main memory that a program may use.
      peak: bfloat16 operations a second, dense.
      bandwidth: bytes a second of main memory.
      link: bytes a second and direction: of a TPU one of its links, of which it has two a dimension
        of its torus; of a GPU all of NVLink together.
      network: bytes a second and direction between hosts, a GPU.
      slices: TPU: the shapes of slices that exist.
      ring: TPU: a dimension whose size divides by this closes to a ring.
      core_count, compute_capability, memory: GPU, for the compiler.
    """

    name: str
    kind: str  # tpu or gpu
    capacity: int
    peak: float
    bandwidth: float
    link: float
    device_kind: str  # how JAX names it on a machine that has it
    network: float = 0.0
    slices: tuple[str, ...] = ()
    ring: int = 0
    core_count: int = 0
    compute_capability: int = 0
    memory: int = 0


_FLAT = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16".split()
_CUBES = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16".split()
# JAX can be told to take this share of a GPU's memory (XLA_PYTHON_CLIENT_MEM_FRACTION); by itself
# it takes three quarters.
GPU_SHARE = 0.95


def _tpu(name, capacity_gib, peak, bandwidth, link, slices, ring, device_kind) -> Chip:
    capacity = int(capacity_gib * GIB)
    return Chip(
        name, "tpu", capacity, peak, bandwidth, link, device_kind, slices=tuple(slices), ring=ring
    )


def _gpu(name, memory, peak, bandwidth, link, network, cores, capability, device_kind) -> Chip:
    return Chip(
        name, "gpu", int(memory * GPU_SHARE), peak, bandwidth, link, device_kind, network=network,
        core_count=cores, compute_capability=capability, memory=memory,
    )  # fmt: skip


CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v4", 30.75, 275e12, 1228e9, 50e9, _CUBES, 4, "TPU v4"),
        _tpu("v5e", 15.75, 197e12, 819e9, 50e9, _FLAT, 16, "TPU v5 lite"),
        _tpu("v5p", 95.73, 459e12, 2765e9, 100e9, _CUBES, 4, "TPU v5"),
        _tpu("v6e", 31.24, 918e12, 1638e9, 100e9, _FLAT, 16, "TPU v6 lite"),
        # InfiniBand: a DGX A100 has a 200 Gb/s adapter a GPU, the later ones 400 Gb/s.
        _gpu("a100", 85_100_068_864, 312e12, 2039e9, 300e9, 25e9, 108, 8, "NVIDIA A100-SXM4-80GB"),
        _gpu(
            "a100-40g", 42_331_013_120, 312e12, 1555e9, 300e9, 25e9, 108, 8, "NVIDIA A100-SXM4-40GB"
        ),
        _gpu("h100", 84_978_434_048, 989e12, 3352e9, 450e9, 50e9, 132, 9, "NVIDIA H100 80GB HBM3"),
        _gpu("h200", 151_397_597_184, 989e12, 4800e9, 450e9, 50e9, 132, 9, "NVIDIA H200"),
        _gpu("b200", 191_514_411_008, 2250e12, 7700e9, 900e9, 50e9, 148, 10, "NVIDIA B200"),
    )
}


def by_device_kind(kind: str) -> Chip | None:
    """The chip that JAX calls so."""
    return next((chip for chip in CHIPS.values() if chip.device_kind == kind), None)


# By compute capability: shared memory of a multiprocessor, of that at most a block, level 2 cache,
# threads' arithmetic units of a multiprocessor, clock in GHz.
_GENERATIONS = {
    8: (164, 163, 40, 64, 1.41),
    9: (228, 227, 50, 128, 1.98),
    10: (228, 227, 126, 128, 1.965),
}


def target_config(chip: Chip) -> str:
    """The GPU as XLA's compiler wants it described, a `GpuTargetConfigProto` in text form."""
    shared, of_block, cache, units, clock = _GENERATIONS[chip.compute_capability]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared * 1024}
  shared_memory_per_block_optin: {of_block * 1024}
  l2_cache_size: {cache << 20}
  core_count: {chip.core_count}
  fpus_per_core: {units}
  clock_rate_ghz: {clock}
  memory_bandwidth: {int(chip.bandwidth)}
  device_memory_size: {chip.memory}
  cuda_compute_capability {{ major: {chip.compute_capability} }}
}}
runtime_version {{ major: 12 minor: 8 }}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{chip.device_kind}"
"""
