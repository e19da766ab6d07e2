"""What is said of losses that are where guessing leaves them."""

from __future__ import annotations

import math

import pytest

from jaxblip.config import default_config
from jaxblip.training.chance import at_chance, chance_levels


def config(task="stage1", **settings):
    made = default_config(task)
    made.batch_size = 64
    made.loss.update(settings)
    return made


def test_chance_is_one_of_the_batch_and_the_share_of_matches():
    levels = chance_levels(config())
    assert levels["itc"] == pytest.approx(math.log(64))
    # of cross-entropy over pairs of which a third match, the best constant guess
    share = [i / 1000 for i in range(1, 1000)]
    best = min(-(math.log(p) + 2 * math.log(1 - p)) / 3 for p in share)
    assert levels["itm"] == pytest.approx(best, abs=1e-5)
    accumulated = config()
    accumulated.optimizer.accumulation_steps = 4
    assert chance_levels(accumulated)["itc"] == pytest.approx(math.log(16))
    assert "itm" not in chance_levels(config(itm_weight=0.0))


def test_only_losses_at_chance_are_named():
    (line,) = at_chance(config(), 1000, {"itc": 4.15, "itm": 0.5})
    assert line.startswith("ITC is 4.150 after 1000 steps, where guessing gives 4.159")
    (line,) = at_chance(config(), 1000, {"itc": 3.9, "itm": 0.637})
    assert line.startswith("ITM is 0.637")
    assert not at_chance(config(), 1000, {"itc": 2.0, "itm": 0.4})
