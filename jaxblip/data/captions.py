"""A source in which every caption of every image is an example."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from jaxblip.data.samples import BadSample, Source


class EachCaption:
    """A `samples.Source` that shows an image as often as it has captions, each time with one.

    So an epoch has every pair of image and caption once, as in LAVIS, where one of COCO's captions
    has 566,747 examples. Repeats of a caption, such as equal answers, are examples too. Pairs of
    one image have its `image_id`.

    Args:
      source: whose texts are all read once, to count them. An example that cannot be read counts as
        one, so that it is met and skipped in training.

    Attributes:
      examples: that source.
    """

    def __init__(self, source: Source):
        self.examples = source
        self.has_instructions = getattr(source, "has_instructions", False)
        self.problems = getattr(source, "problems", [])
        texts = source.without_images() if hasattr(source, "without_images") else source
        counts = (_num_captions(texts, index) for index in range(len(texts)))
        # Behind the last pair of each image.
        self._ends = np.cumsum(np.fromiter(counts, np.int64, len(texts)))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} pairs of image and caption")
        image, number = self._image_and_caption(index)
        example = self.examples[image]
        # A slice, because an example that could not be read before may be good now, and shorter.
        return example | {"captions": example["captions"][number : number + 1]}

    def place(self, index: int) -> str:
        """Where the example stands that the pair is of."""
        image, _ = self._image_and_caption(index)
        return self.examples.place(image) if hasattr(self.examples, "place") else f"example {image}"

    def without_images(self) -> EachCaption:
        texts = copy.copy(self)
        if hasattr(self.examples, "without_images"):
            texts.examples = self.examples.without_images()
        return texts

    def _image_and_caption(self, index: int) -> tuple[int, int]:
        """Index of the example, and number of its caption."""
        image = int(np.searchsorted(self._ends, index, side="right"))
        return image, index - int(self._ends[image - 1] if image else 0)


def _num_captions(source: Source, index: int) -> int:
    try:
        return max(1, len(source[index]["captions"]))
    except BadSample:
        return 1
