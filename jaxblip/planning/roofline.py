"""The least time that a step can take, by the peaks of the data sheets: modelled, not measured.

Computation, memory and network are each taken at their peak and as if they overlapped wholly, so
a step takes as long as the one that needs longest. Real steps take longer.
"""

from __future__ import annotations

from jax.sharding import Mesh

from jaxblip.planning import topologies
from jaxblip.planning.costs import Collective, Costs
from jaxblip.planning.topologies import Topology

RESOURCES = ("computation", "memory", "network")


def times(topology: Topology, mesh: Mesh, costs: Costs) -> dict[str, float]:
    """Resource -> seconds a step; {} for devices of which there is no data sheet."""
    chip = topology.chip or topologies.chip_at_hand()
    if chip is None:
        return {}
    seconds = {
        "computation": costs.operations / chip.peak,
        "memory": costs.memory_bytes / chip.bandwidth,
    }
    if topology.chip is not None:  # how those at hand are connected is not known
        order = topologies.places(topology, list(mesh.devices.flat))
        seconds["network"] = sum(
            _seconds(topology, each, [order[index] for index in each.group]) * each.times
            for each in costs.collectives
        )
    return seconds


def _seconds(topology: Topology, collective: Collective, places: list) -> float:
    """Of one collective: a ring over the chips, in both directions where there are two."""
    count = len(places)
    bandwidth = topologies.egress(topology, places)
    if collective.kind == "collective-permute":
        return collective.bytes / bandwidth
    share = (count - 1) / count
    if collective.kind == "all-reduce":  # a reduce-scatter, then an all-gather
        share *= 2
    elif collective.kind in ("all-to-all", "ragged-all-to-all") and topology.chip.kind == "tpu":
        share *= count / 4  # a part goes a quarter of the ring on average
    return share * collective.bytes / bandwidth
