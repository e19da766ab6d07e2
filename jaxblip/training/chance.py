"""Losses that are still where guessing would leave them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ml_collections import ConfigDict

_MARGIN = {"itc": 0.02, "itm": 0.01}  # share of the chance level that counts as above it
_MATCHED = 1 / 3  # of ITM's pairs: each with a hard image and a hard text beside it


def chance_levels(config: ConfigDict) -> dict[str, float]:
    """What the losses are that a model has which guesses, by their name in the metrics.

    ITC chooses one of the batch (of a micro-batch, where gradients are accumulated), and ITM knows
    how many pairs match.
    """
    batch = config.batch_size // config.optimizer.accumulation_steps
    rest = 1 - _MATCHED
    entropy = -_MATCHED * math.log(_MATCHED) - rest * math.log(rest)
    levels = {"itc": math.log(batch), "itm": entropy}
    return {
        name: level for name, level in levels.items() if config.loss.get(f"{name}_weight", 1.0)
    }


def at_chance(config: ConfigDict, step: int, metrics: Mapping[str, float]) -> list[str]:
    """A sentence for each loss that sits at its chance level after all these steps."""
    found = []
    for name, level in chance_levels(config).items():
        loss = metrics.get(name, 0.0)
        if loss > level * (1 - _MARGIN[name]):
            found.append(
                f"{name.upper()} is {loss:.3f} after {step} steps, where guessing gives "
                f"{level:.3f}: nothing is learned from it yet. Look at the data "
                "(`jaxblip data inspect`), at what config.init names, and at "
                f"optimizer.peak_lr={config.optimizer.peak_lr:g}; see docs/expected.md."
            )
    return found
