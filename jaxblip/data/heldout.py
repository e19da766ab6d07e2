"""The last examples of a training source, kept from training for evaluation."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from jaxblip.errors import UserError

if TYPE_CHECKING:  # a config needs no library for data
    from jaxblip.data.samples import Source


class Stretch:
    """Consecutive examples of a source."""

    def __init__(self, source: Source, begin: int, end: int):
        self._source, self._begin, self._end = source, begin, end

    def __len__(self) -> int:
        return self._end - self._begin

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return self._source[self._begin + index]

    @property
    def has_instructions(self) -> bool:
        return getattr(self._source, "has_instructions", False)

    @property
    def problems(self) -> list[str]:
        return getattr(self._source, "problems", [])

    def place(self, index: int) -> str:
        """Where an example stands."""
        place = getattr(self._source, "place", "example {}".format)
        return place(self._begin + index)

    def without_images(self) -> Stretch:
        """The same without images, where the source can do without."""
        texts = copy.copy(self)
        if hasattr(self._source, "without_images"):
            texts._source = self._source.without_images()
        return texts


def heldout_count(config: ConfigDict) -> int:
    """Examples of config.data.train.source that are evaluated, since no other source is named."""
    settings = config.eval
    return 0 if settings.source or settings.set else settings.heldout_examples


def trained_part(config: ConfigDict, source: Source) -> Source:
    """What is left of a source for training.

    Raises:
      UserError: nothing is, or the run has several sources.
    """
    count = heldout_count(config)
    if not count:
        return source
    if config.data.mixture:
        raise UserError(
            f"eval.heldout_examples={count} is about the one source of a run, and this one mixes "
            "several: name a source of its own in --config.eval.source."
        )
    if not 0 < count < len(source):
        raise UserError(
            f"eval.heldout_examples={count} leaves nothing of the {len(source)} examples of "
            f"{config.data.train.source} to train on: hold out fewer."
        )
    return Stretch(source, 0, len(source) - count)


def heldout_part(config: ConfigDict, source: Source) -> Source:
    """What `trained_part` leaves out."""
    return Stretch(source, len(source) - heldout_count(config), len(source))
