"""A whole evaluation set in memory."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from jaxblip.data import images
from jaxblip.data.decode import decode_image
from jaxblip.data.rows import FACTS
from jaxblip.data.samples import BadSample, Source, counts_as_text
from jaxblip.data.text import clean_caption, clean_question
from jaxblip.errors import RunStopped


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """A whole evaluation set in memory: its distinct images, and what is said about them.

    There is one entry an image, or where instructions are read, one an image and instruction, or
    one a question where questions have ids.

    Attributes:
      images: as evaluation sees them (`images.resize_square`), of several frames with an axis more
        behind the first; None where they are not read.
      captions: of each entry, cleaned, without duplicates, from every example of it.
      image_ids: of each entry, as in the source.
      rows: the image of each entry; without instructions entry i is about image i.
      instructions: of each entry, cleaned; "" where none are read.
      texts: of each entry, its captions or answers as they are written, repeats included.
      facts: of each entry, what else is known of it (`rows.FACTS`).
      skipped: reason -> number of examples left out.
      converted: conversion -> number of images.
    """

    images: UInt8[np.ndarray, "images *frames size size 3"] | None
    captions: list[list[str]]
    image_ids: Int[np.ndarray, " entries"]
    rows: Int[np.ndarray, " entries"]
    instructions: list[str]
    texts: list[list[str]]
    facts: list[dict[str, Any]]
    skipped: Counter
    converted: Counter


def iterate_eval_images(
    source: Source,
    image_size_px: int,
    max_pixels: int,
    max_words: int,
    max_images: int = 0,
    instructions: bool = False,
    resize: str = "squash",
    interpolation: str = "bicubic",
    frames: int = 1,
) -> EvalSet:
    """Reads a source once, in order; bad examples are left out and counted.

    Args:
      instructions: whether those of the examples are read.
      max_images: the first so many distinct images, with the captions met until then; 0 for all.
      resize, interpolation: of the images, as in `images.resize_square`.
      frames: of each, see `images.frame_numbers`; with more than 1 they have an axis of their own.

    Raises:
      RunStopped: no example could be used.
    """
    skipped, conversions = Counter(), Counter()
    pixels: dict[int, np.ndarray] = {}
    # By image, instruction and question; dicts, because they keep their order.
    captions: dict[tuple[int, str, Any], dict[str, None]] = {}
    texts: dict[tuple[int, str, Any], list[str]] = {}
    facts: dict[tuple[int, str, Any], dict[str, Any]] = {}

    def square(image):
        if isinstance(image, bytes):
            image = decode_image(image, max_pixels, conversions)
        return images.resize_square(image, image_size_px, resize, interpolation)

    for index in range(len(source)):
        if max_images and len(pixels) == max_images:
            break
        try:
            example = source[index]
            image_id, image = example["image_id"], example.get("image")
            cleaned = [clean_caption(caption, max_words) for caption in example["captions"]]
            cleaned = [caption for caption in cleaned if caption]
            if not cleaned:
                raise BadSample("empty caption")
            instruction = example["instruction"] if instructions else ""
            instruction = clean_question(instruction, max_words).strip()
            if instructions and not instruction:
                raise BadSample("empty instruction")
            if image_id not in pixels:
                if image is not None:
                    image = images.of_frames(square, image, frames)
                pixels[image_id] = image
        except BadSample as bad:
            skipped[bad.reason] += 1
            continue
        known = {name: example[name] for name in FACTS if name in example}
        entry = image_id, instruction, known.get("question_id")
        captions.setdefault(entry, {}).update(dict.fromkeys(cleaned))
        texts.setdefault(entry, []).extend(example["captions"])
        facts.setdefault(entry, {}).update(known)
    if not pixels:
        raise RunStopped(
            f"none of {len(source)} examples can be evaluated: {counts_as_text(skipped)}; fix them"
        )
    order = {image_id: row for row, image_id in enumerate(pixels)}
    squares = list(pixels.values())
    return EvalSet(
        images=None if squares[0] is None else np.stack(squares),
        captions=[list(cleaned) for cleaned in captions.values()],
        image_ids=np.array([image_id for image_id, *_ in captions], np.int64),
        rows=np.array([order[image_id] for image_id, *_ in captions]),
        instructions=[instruction for _, instruction, _ in captions],
        texts=list(texts.values()),
        facts=list(facts.values()),
        skipped=skipped,
        converted=conversions,
    )
