"""Devices to plan for: TPU slices and GPU hosts that need not be there, and those at hand."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import jax

from jaxblip.errors import UserError
from jaxblip.planning.hardware import CHIPS, Chip, by_device_kind, target_config

LOCAL = "local"
INSTALL = {
    "tpu": "pip install 'jaxblip[plan]'",
    # Without what they depend on: NVIDIA's libraries are of no use without a GPU.
    "gpu": "pip install --no-deps jax-cuda12-plugin=={0} jax-cuda12-pjrt=={0}",
}
# GPUs of one host that NVLink joins: 8, and 16 in the machine that the BLIP-2 paper used.
MOST_GPUS_A_HOST = 16


@dataclasses.dataclass(frozen=True)
class Topology:
    """`v5e:16x16`, `h100:4x8` (hosts x GPUs) or `local`."""

    name: str
    chip: Chip | None  # None: the devices at hand
    sizes: tuple[int, ...] = ()

    @property
    def num_chips(self) -> int:
        return math.prod(self.sizes) if self.chip else len(jax.devices())

    @property
    def platform(self) -> str:
        """As JAX calls it."""
        if self.chip is None:
            return jax.default_backend()
        return {"tpu": "tpu", "gpu": "cuda"}[self.chip.kind]


def parse(name: str) -> Topology:
    """The topology of a name.

    Raises:
      UserError: it is none that is known.
    """
    if name == LOCAL:
        return Topology(name, None)
    chip = CHIPS.get(name.partition(":")[0].lower())
    shape = name.partition(":")[2].lower()
    if chip is None:
        raise UserError(f"There is no topology {name!r}: {known()}")
    if chip.kind == "tpu" and shape not in chip.slices:
        raise UserError(
            f"There is no topology {name!r}: slices of {chip.name} are {', '.join(chip.slices)}."
        )
    if chip.kind == "gpu" and not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape):
        raise UserError(f"--topology={name} needs hosts x GPUs: {chip.name}:4x8, for example.")
    sizes = tuple(map(int, shape.split("x")))
    if chip.kind == "gpu" and sizes[1] > MOST_GPUS_A_HOST:
        raise UserError(
            f"--topology={name} has {sizes[1]} GPUs in a host, and no host has more than "
            f"{MOST_GPUS_A_HOST}: the first number is that of the hosts."
        )
    return Topology(f"{chip.name}:{shape}", chip, sizes)


def known() -> str:
    """One sentence with all that `parse` takes."""
    tpus = "; ".join(
        f"{chip.name}:{'|'.join(chip.slices)}" for chip in CHIPS.values() if chip.kind == "tpu"
    )
    gpus = ", ".join(chip.name for chip in CHIPS.values() if chip.kind == "gpu")
    return (
        f"known are TPU slices ({tpus}), GPUs as hosts x GPUs ({gpus}, such as h100:4x8), and "
        f"{LOCAL!r} for the devices at hand."
    )


def environment(topology: Topology) -> dict[str, str]:
    """Variables for the process that compiles; they must be set before JAX starts."""
    if topology.chip is None:
        return {}
    variables = {"JAX_PLATFORMS": "cpu"}
    if topology.chip.kind == "tpu":
        # No machine of this kind answers: libtpu need not ask, nor keep others out.
        return variables | {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": "v5litepod-16",
            "TPU_WORKER_ID": "0",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_MIN_LOG_LEVEL": "3",
            "XLA_FLAGS": "",  # libtpu ends the process at one that it does not know
        }
    # Triton's matrix products are chosen by running them.
    return variables | {"XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false"}


def check_installed(topology: Topology) -> None:
    """Raises UserError, with the command to install it, where the compiler is missing."""
    if topology.chip is None:
        return
    package = {"tpu": "libtpu", "gpu": "jax_plugins.xla_cuda12"}[topology.chip.kind]
    with contextlib.suppress(ModuleNotFoundError):  # of the parent of a submodule
        if importlib.util.find_spec(package) is not None:
            return
    command = INSTALL[topology.chip.kind].format(jax.__version__)
    what = {"tpu": "libtpu", "gpu": "JAX's CUDA plugin"}[topology.chip.kind]
    raise UserError(
        f"Planning for {topology.name} compiles with {what}, which is missing: {command}"
    )


def devices(topology: Topology) -> Sequence[jax.Device]:
    """The devices to compile for, in the order of the network."""
    if topology.chip is None:
        return jax.devices()
    from jax.experimental import topologies

    if topology.chip.kind == "gpu":
        described = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            target_config=target_config(topology.chip),
            topology="1x{}x{}".format(*topology.sizes),  # slices x hosts x GPUs
        )
    else:
        megacore = {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **megacore
        )
    return described.devices


def chip_at_hand() -> Chip | None:
    """What the data sheets say of the devices at hand; None for CPUs and what is not known."""
    return by_device_kind(jax.devices()[0].device_kind)


def capacity(topology: Topology) -> int:
    """Bytes of memory that a program may use on a chip; 0 where that is not known, as of a CPU."""
    if topology.chip is not None:
        return topology.chip.capacity
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)


# The network


def egress(topology: Topology, places: Sequence[Sequence[int]]) -> float:
    """Bytes a second that a chip sends in a ring over chips at these places.

    Args:
      places: of a TPU its coordinates, of a GPU (host, index).
    """
    chip = topology.chip
    if chip.kind == "gpu":
        hosts = {host for host, _ in places}
        if len(hosts) == 1:
            return chip.link
        # Each host passes a ring on through the adapters of all its GPUs in the group.
        return min(chip.link, chip.network * len(places) / len(hosts))
    total = 0.0
    for axis, size in enumerate(topology.sizes):
        if len({place[axis] for place in places}) > 1:
            is_ring = size % chip.ring == 0 and len({place[axis] for place in places}) == size
            total += chip.link * (2 if is_ring else 1)
    return total or chip.link


def places(topology: Topology, order: Sequence[jax.Device]) -> list[tuple[int, ...]]:
    """Where each device of a mesh is, as `egress` wants it."""
    if topology.chip.kind == "gpu":
        return [divmod(device.id, topology.sizes[1]) for device in order]
    return [tuple(device.coords) for device in order]


def sizes_shown(sizes: Mapping[str, int]) -> str:
    """`data=16, fsdp=16`: the axes of a mesh that split something."""
    shown = [f"{axis}={size}" for axis, size in sizes.items() if size != 1]
    return ", ".join(shown) or "one device"


def names(text: str) -> Iterator[Topology]:
    """The topologies of a list with commas; UserError where one is unknown."""
    for name in filter(None, text.split(",")):
        yield parse(name.strip())
