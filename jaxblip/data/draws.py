"""What an example is drawn with: a generator of its own, whose state follows from its position."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np


class Draw:
    """What an example of a part follows from: its index, and the state of its own generator.

    Args:
      number: of the part.
      seed: of the part.
    """

    def __init__(self, number: int, seed: int):
        self._number = number
        # The states that Grain's `random_map` has given its generators from the first run on, which
        # it would set in one generator, to be read from there and set in another.
        [entropy] = np.random.SeedSequence([seed, 2]).generate_state(1)
        self._key = np.random.SeedSequence(entropy).generate_state(2, np.uint64)

    def __call__(self, position: int, index: int) -> tuple[int, int, dict[str, Any]]:
        counter = np.array([0, 0, 0, position], np.uint64)
        return self._number, index, _FRESH | {"state": {"counter": counter, "key": self._key}}


# The state of a Philox generator that has drawn nothing, without key and counter.
_FRESH = {
    "bit_generator": "Philox",
    "buffer": np.zeros(4, np.uint64),
    "buffer_pos": 4,
    "has_uint32": 0,
    "uinteger": 0,
}


_SPARE = deque()  # generators that no row has: to make one takes ten times as long as to set it


def generator(state: dict[str, Any]) -> np.random.Generator:
    """One in that state."""
    try:
        rng = _SPARE.pop()
    except IndexError:
        # Without a key it would make itself one, slowly.
        rng = np.random.Generator(np.random.Philox(key=0))
    rng.bit_generator.state = state
    return rng


def give_back(generators: Iterable[np.random.Generator]) -> None:
    """They are used no more, and may be set anew."""
    _SPARE.extend(generators)
