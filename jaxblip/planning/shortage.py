"""What a run says whose step does not fit the memory of its devices."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict

from jaxblip.errors import UserError


@contextlib.contextmanager
def explained_shortage(config: ConfigDict) -> Iterator[None]:
    """In place of an allocator's error: what needs the memory, and the nearest that fits.

    Args:
      config: of the run, with its vocabularies.

    Raises:
      UserError: the devices had not enough memory for what was done inside.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError("\n".join(shortage(config))) from error


def shortage(config: ConfigDict, tries: int = 3) -> Iterator[str]:
    """The planner's breakdown for the devices at hand, and what it found to fit."""
    from jaxblip.planning import report, topologies
    from jaxblip.planning.plan import plan

    yield (
        f"The training step does not fit the memory of the {len(jax.devices())} device(s) at "
        f"batch_size={config.batch_size}:"
    )
    try:
        found = plan(config, topologies.parse(topologies.LOCAL), tries=tries)
    except jax.errors.JaxRuntimeError:  # not even memory to compile is left
        yield "compile it elsewhere with `jaxblip plan`, or lower batch_size."
        return
    yield report.memory_breakdown(found.asked.memory)
    if found.asked.fits:
        yield "That would fit if nothing else used these devices: look what does."
    elif found.best is not None:
        yield f"This fits: {report.options(found, found.best)}"
    smaller = found.asked.largest_batch(config.optimizer.accumulation_steps)
    if smaller:
        yield f"So should --config.batch_size={smaller}, estimated: the rest grows with the batch."
    elif found.best is None:
        yield "Parameters alone fill the devices: split them with --config.mesh.fsdp, or use more."
