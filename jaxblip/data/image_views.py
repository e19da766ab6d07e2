"""The distinct images of a source, in its order, in batches of what training may see of them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from jaxblip.data.features import OF_PREPROCESS
from jaxblip.data.pipeline import is_death, made_ahead
from jaxblip.data.preprocess import Preprocess
from jaxblip.data.samples import BadSample, Source
from jaxblip.errors import RunStopped


def distinct_images(source: Source) -> Int[np.ndarray, "2 images"]:
    """The id of each image, and its first example; those that cannot be read are of no image."""
    texts = source.without_images() if hasattr(source, "without_images") else source
    ids = np.fromiter((_image_id(texts, index) for index in range(len(texts))), np.int64)
    found, firsts = np.unique(ids, return_index=True)
    images = np.stack([found, firsts])[:, found >= 0]
    return images[:, np.argsort(images[1])]


def _image_id(source: Source, index: int) -> int:
    try:
        return source[index]["image_id"]
    except BadSample:
        return -1


@dataclasses.dataclass(frozen=True)
class ViewBatches:
    """From rows, of which each image has as many as views, to what the encoder reads; picklable.

    A view follows from the seed, the image's id and the number of the view alone.

    Attributes:
      source: of the examples.
      images: from `distinct_images`.
      preprocess: makes a view.
      views: of each image.
      seed: of what is random about them.
      batch_size: rows of a batch, which is filled up with black images.
    """

    source: Source
    images: np.ndarray
    preprocess: Preprocess
    views: int
    seed: int
    batch_size: int

    def __call__(self, rows: tuple[int, int]) -> dict[str, Any]:
        """The images of the rows from the first number to the second one, that one left out.

        Returns:
          "image", uint8 [batch_size, size, size, 3]; "bad", (place in it, stage, reason, detail) of
          each that is none, the stage being 0 where it cannot be read and 1 where it is no image;
          "converted", by name, the first views that were.
        """
        size = self.preprocess.image_size_px
        pixels = np.zeros((self.batch_size, size, size, 3), np.uint8)
        bad, converted, example = [], Counter(), {}
        for place, row in enumerate(range(*rows)):
            image, view = divmod(row, self.views)
            image_id, first = self.images[:, image].tolist()
            stage, counts = 0, Counter()
            try:
                if example.get("image_id") != image_id:
                    example = self.source[first]
                stage = 1
                rng = np.random.default_rng((self.seed, image_id, view))
                pixels[place] = self.preprocess.image(example["image"], rng, counts)
            except BadSample as error:
                bad.append((place, stage, error.reason, error.detail))
            else:
                converted.update(counts if view == 0 else ())
        return {"image": pixels, "bad": bad, "converted": dict(converted)}


def view_batches(
    config: ConfigDict,
    source: Source,
    images: Int[np.ndarray, "2 images"],
    views: int,
    batch_size: int,
    rows: Sequence[tuple[int, int]],
) -> Iterator[dict[str, Any]]:
    """What `ViewBatches` makes of each of `rows`, with the preprocessing of a config.

    Raises:
      RunStopped: a worker process died.
    """
    preprocess = Preprocess(("image",), **{name: config.data[name] for name in OF_PREPROCESS})
    make = ViewBatches(source, images, preprocess, views, config.seed, batch_size)
    batches = made_ahead(grain.MapDataset.source(rows).map(make), config.data.num_workers)
    try:
        for _ in rows:
            yield next(batches)
    except RuntimeError as error:
        if not is_death(error):
            raise
        raise RunStopped(
            "A worker process was killed, perhaps for lack of memory: run the same command again, "
            "what is finished stays, perhaps with a smaller data.num_workers."
        ) from error
    finally:
        batches.close()
