"""The schedule of a run whose config leaves it to the size of the data."""

from __future__ import annotations

import math

from ml_collections import ConfigDict

from jaxblip.errors import UserError
from jaxblip.overrides import copied

OPEN = -1  # of a number of steps: it follows from the length of the run
_MAX_WARMUP_STEPS = 1000  # that of all fine-tuning in BLIP-2's appendix (tables 7 to 9)
_WARMUP_SHARE = 0.1  # of a run that is too short for so many
_STOPS = 10  # evaluations and checkpoints of a run


def with_schedule(config: ConfigDict, examples: int) -> tuple[ConfigDict, list[str]]:
    """The config with numbers in the place of open fields, and a line that names them.

    Args:
      examples: that an epoch has, of all sources together.

    Raises:
      UserError: both config.steps and config.epochs say how long the run is, or neither does.
    """
    if (config.steps > 0) == (config.epochs > 0):
        both = "both say" if config.steps > 0 else "do not say"
        raise UserError(
            f"config.steps={config.steps} and config.epochs={config.epochs:g} {both} how long the "
            "run is: set one of them to 0 and the other to what you want."
        )
    config = copied(config)
    found = {}
    if not config.steps:
        config.steps = max(1, math.ceil(config.epochs * examples / config.batch_size))
        found["steps"] = config.steps
        config.epochs = 0.0
    steps = config.steps
    if config.optimizer.warmup_steps == OPEN:
        config.optimizer.warmup_steps = min(_MAX_WARMUP_STEPS, int(steps * _WARMUP_SHARE))
        found["optimizer.warmup_steps"] = config.optimizer.warmup_steps
    for section in ("eval", "checkpoint"):
        if config[section].every_steps == OPEN:
            config[section].every_steps = math.ceil(steps / _STOPS)
            found[f"{section}.every_steps"] = config[section].every_steps
    if not found:
        return config, []
    named = ", ".join(f"{field} {value:,}" for field, value in found.items())
    return config, [f"From {examples:,} examples, {config.batch_size} a step: {named}."]
