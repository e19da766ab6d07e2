"""The input pipeline: from a source to batches of NumPy arrays, at a position that is one number.

Example k of a run is a function of (source, preprocessing, seed, k) alone, its augmentation
included. So a run goes on at `start_example` with any number of workers, any number of processes
and any batch size, and sees what it would have seen.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import Int, UInt8

from jaxblip.data import images
from jaxblip.data.samples import CONVERSIONS, SKIP_REASONS, BadSample, Source, counts_as_text
from jaxblip.data.text import (
    INSTRUCTION,
    clean_caption,
    clean_question,
    fill_prompt,
    join_prompt,
)
from jaxblip.data.tokenizers import TextEncoder
from jaxblip.errors import RunStopped

FIELDS = (
    "image",
    "text_ids",
    "text_mask",
    "input_ids",
    "input_mask",
    "image_id",
    "prompt_length",
    "instruction_ids",
    "instruction_mask",
)

_COUNTED = SKIP_REASONS + CONVERSIONS
# Examples to examine before their share of bad ones says anything (or the whole set, if smaller).
_MIN_EXAMINED = 100
# Bad examples in a row after which no good one is looked for any more.
_MAX_TRIES = 100


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """One example and a generator into the arrays that a task wants; picklable.

    Attributes:
      fields: which of FIELDS to make; without "image" no image is decoded.
      image_size_px: side of the images: uint8 [size, size, 3].
      encoder: texts to ids; needed for all fields but "image" and "image_id".
      prompt: stands before every caption, and {} in it for the example's instruction.
      max_words: of a caption or an instruction, without the prompt; 0 leaves both as they are
        written.
      captions_per_text: captions of one image that follow each other in its text.
      max_input_tokens: length of "input_ids". With this field, the text is divided: the prompt is
        the input, and "text_ids" is the rest.
      prefix_lm: the input also has the first words of the captions, a random number of them; at
        least one word is left.
      instruction_encoder: the prompt (without one, the instruction by itself) to "instruction_ids".
      max_instruction_tokens: of the prompt that stands before a caption, BOS included: of a longer
        one the first tokens are left out; 0 for no limit.
      crop_scale, crop_aspect: of `random_resized_crop`; (1, 1) twice is the whole (square) image.
      interpolation: the filter of its resizing, of `images.INTERPOLATIONS`.
      flip_probability: of mirroring; must be 0 where captions speak of left and right.
      randaugment: whether to add BLIP's RandAugment.
      max_image_pixels: an image with more is a bad sample.
    """

    fields: tuple[str, ...]
    image_size_px: int = 224
    encoder: TextEncoder | None = None
    prompt: str = ""
    max_words: int = 50
    captions_per_text: int = 1
    max_input_tokens: int = 0
    prefix_lm: bool = False
    instruction_encoder: TextEncoder | None = None
    max_instruction_tokens: int = 0
    crop_scale: tuple[float, float] = (0.5, 1.0)
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bicubic"
    flip_probability: float = 0.5
    randaugment: bool = False
    max_image_pixels: int = 100_000_000

    def __post_init__(self):
        unknown = set(self.fields) - set(FIELDS)
        if unknown:
            raise ValueError(f"unknown batch fields {sorted(unknown)}; known are {FIELDS}")
        if self.encoder is None and set(self.fields) - {"image", "image_id"}:
            raise ValueError(f"fields {self.fields} need an encoder for the text")
        if self.instruction_encoder is None and self._has("instruction"):
            raise ValueError(f"fields {self.fields} need an encoder for the instruction")

    def __call__(
        self, example: dict[str, Any], rng: np.random.Generator, conversions: Counter
    ) -> dict[str, np.ndarray]:
        """Arrays of one example, without a batch axis; adds to `conversions`.

        Raises:
          BadSample: no caption has a word, or the instruction has none and is needed, or the image
            cannot be decoded.
        """
        captions = self._captions(example["captions"], rng)
        instruction = self._instruction(example)
        prompt = fill_prompt(self.prompt, instruction)
        texts, skip, arrays = [join_prompt(prompt, caption) for caption in captions], 0, {}
        if self._has("input"):
            inputs, texts = self._divided(captions, prompt, rng)
            arrays["input_ids"], arrays["input_mask"] = self._input_row(inputs)
        elif self.max_instruction_tokens and prompt:
            skip = max(0, len(self.encoder.prompt_ids(prompt)) - self.max_instruction_tokens)
        if self._has("text"):
            arrays["text_ids"], arrays["text_mask"] = self.encoder.row(texts, skip)
        if "prompt_length" in self.fields:
            arrays["prompt_length"] = np.int32(self.encoder.prompt_length(prompt, skip))
        if self._has("instruction"):
            row = self.instruction_encoder.row([prompt or instruction])
            arrays["instruction_ids"], arrays["instruction_mask"] = row
        if "image_id" in self.fields:
            arrays["image_id"] = _folded(example["image_id"])
        if "image" in self.fields:
            arrays["image"] = self._image(example["image"], rng, conversions)
        return {field: arrays[field] for field in self.fields}

    def _has(self, name: str) -> bool:
        return not {f"{name}_ids", f"{name}_mask"}.isdisjoint(self.fields)

    def _instruction(self, example: dict[str, Any]) -> str:
        """That of the example, where the prompt or a field reads it."""
        if not (INSTRUCTION in self.prompt or (self._has("instruction") and not self.prompt)):
            return ""
        if found := clean_question(example["instruction"], self.max_words).strip():
            return found
        raise BadSample("empty instruction", f"captions {list(example['captions'])}")

    def _captions(self, captions: Sequence[str], rng: np.random.Generator) -> list[str]:
        """The first `captions_per_text` that have a word, in random order, without the prompt."""
        cleaned = (
            clean_caption(captions[index], self.max_words)
            for index in rng.permutation(len(captions))
        )
        texts = itertools.islice(filter(None, cleaned), self.captions_per_text)
        if found := list(texts):
            return found
        raise BadSample("empty caption", f"captions {list(captions)}")

    def _divided(
        self, captions: Sequence[str], prompt: str, rng: np.random.Generator
    ) -> tuple[list[str], list[str]]:
        """Prompt and captions before and behind a word: the first, or a random one."""
        words = [caption.split(" ") for caption in captions]
        place = int(rng.integers(sum(map(len, words)))) if self.prefix_lm else 0
        index = 0
        while place >= len(words[index]):
            place, index = place - len(words[index]), index + 1
        texts = [join_prompt(prompt, caption) for caption in captions]
        before, behind = " ".join(words[index][:place]), " ".join(words[index][place:])
        return [*texts[:index], join_prompt(prompt, before)], [behind, *texts[index + 1 :]]

    def _input_row(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        tokens = input_tokens(self.encoder, texts, self.max_input_tokens)
        padding = self.max_input_tokens - len(tokens)
        ids = np.array(tokens + [self.encoder.pad_id] * padding, np.int32)
        return ids, np.arange(self.max_input_tokens) < len(tokens)

    def _image(
        self, image: bytes | np.ndarray, rng: np.random.Generator, conversions: Counter
    ) -> np.ndarray:
        if isinstance(image, bytes):
            image = images.decode_image(image, self.max_image_pixels, conversions)
        image = images.random_resized_crop(
            image,
            rng,
            self.image_size_px,
            self.crop_scale,
            self.crop_aspect,
            self.interpolation,
        )
        image = images.random_flip(image, rng, self.flip_probability)
        return images.randaugment(image, rng) if self.randaugment else image


def _folded(image_id: int) -> np.int32:
    """31 of its 63 bits, since devices have no more: itself where it is small."""
    return np.int32((image_id ^ image_id >> 31 ^ image_id >> 62) & 0x7FFFFFFF)


def input_tokens(encoder: TextEncoder, texts: Sequence[str], max_tokens: int) -> list[int]:
    """What a language model's encoder reads: the texts one after the other, each with an end token.

    A text without words is left out, except when there is no other: as in LAVIS, an empty prompt is
    an end token. Where there are too many tokens the first ones are cut off, because the decoder
    goes on behind the last.
    """
    texts = [text for text in texts if text.strip()] or [""]
    tokens = [token for text in texts for token in (*encoder.prompt_ids(text), encoder.stop_id)]
    return tokens[-max_tokens:]


@dataclasses.dataclass(frozen=True)
class _LoadExample:
    """Index to example; a bad one is counted, and another drawn in its place.

    The replacement is drawn from the example's own generator, not the next one of the source:
    where a whole folder is missing, that would count the rest of it each time one of its images
    comes up, and show the first image behind it again and again. Nothing about the data may raise
    here, because it would end the worker.
    """

    source: Source
    preprocess: Preprocess

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        counts = Counter()
        first_bad = ""
        for _ in range(_MAX_TRIES):
            conversions = Counter()
            try:
                arrays = self.preprocess(self.source[index], rng, conversions)
            except BadSample as bad:
                counts[bad.reason] += 1
                first_bad = first_bad or f"{bad.reason} ({bad.detail})"
                index = int(rng.integers(len(self.source)))
                continue
            return {"arrays": arrays, "counts": counts + conversions, "first_bad": first_bad}
        return {"arrays": None, "counts": counts, "first_bad": first_bad}


def _stack(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Batches what `_LoadExample` gives; `arrays` is None where no good example was found."""
    counts = sum((example["counts"] for example in examples), Counter())
    arrays = [example["arrays"] for example in examples]
    found = all(a is not None for a in arrays)
    return {
        "arrays": {k: np.stack([a[k] for a in arrays]) for k in arrays[0]} if found else None,
        "counts": np.array([counts[name] for name in _COUNTED], np.int64),
        "first_bad": next((e["first_bad"] for e in examples if e["first_bad"]), ""),
    }


def _end_with_parent(worker_index: int, worker_count: int) -> None:
    """Ends this worker when the process that started it dies, be it by SIGKILL.

    Grain's workers would wait for it for ever, and hold its terminal and its memory.
    """
    del worker_index, worker_count

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _shuffled(size: int, block: int, seed: int) -> grain.MapDataset:
    """Indices of `size` examples, shuffled anew each epoch by blocks of `block` neighbours."""
    # Every block's j-th example in one order of the blocks, the same for all j, then interleaved.
    return grain.MapDataset.mix(
        [grain.MapDataset.range(j, size, block).shuffle(seed=seed) for j in range(block)]
    )


class TrainBatches(Iterator[dict[str, np.ndarray]]):
    """Endless shuffled batches of this process, `{field: [batch_size / process_count, ...]}`.

    Every epoch has an order of its own. Of each global batch, process p of P takes every P-th
    example from p on. Bad samples are replaced and counted. Use as a context manager, or call
    `close()`: workers and threads end with it.

    Args:
      source: examples, see `samples.Source`.
      preprocess: what to make of each.
      batch_size: over all processes; a multiple of `process_count`.
      seed: of order and augmentation.
      shuffle_block: this many consecutive examples of the source keep together when it is
        shuffled, so that they are hard negatives of each other; a divisor of their number.
      process_index, process_count: this process among those that train together.
      start_example: global number of examples consumed before; where to go on.
      num_workers: worker processes; 0 for threads in this one.
      max_bad_share: bad among examined examples, above which the run stops.
      prefetch: batches made ahead (by each worker).
      counters: `state()` of the run that goes on, so that its counts do too.

    Raises:
      RunStopped: from `next`, when too many examples are bad.
    """

    def __init__(
        self,
        source: Source,
        preprocess: Preprocess,
        *,
        batch_size: int,
        seed: int,
        shuffle_block: int = 1,
        process_index: int = 0,
        process_count: int = 1,
        start_example: int = 0,
        num_workers: int = 0,
        max_bad_share: float = 0.05,
        prefetch: int = 2,
        counters: dict[str, Any] | None = None,
    ):
        if batch_size % process_count:
            raise ValueError(f"{process_count} processes do not divide batch_size={batch_size}")
        counters = counters or {}
        self.examples_seen = start_example
        self.examined = int(counters.get("examined", 0))
        self.skipped = Counter(counters.get("skipped", {}))
        self.converted = Counter(counters.get("converted", {}))
        self._first_bad = ""
        self._batch_size = batch_size
        self._rows = batch_size // process_count
        self._max_bad_share = max_bad_share
        self._min_examined = min(_MIN_EXAMINED, len(source))
        if "image" not in preprocess.fields and hasattr(source, "without_images"):
            source = source.without_images()
        dataset = (
            _shuffled(len(source), shuffle_block, seed)
            .seed(seed)
            .repeat()
            # Before any slice: the generator of an example follows from its global index.
            .random_map(_LoadExample(source, preprocess))[start_example:]
        )
        dataset = (
            dataset[process_index::process_count]
            .batch(self._rows, drop_remainder=True, batch_fn=_stack)
            .to_iter_dataset(
                grain.ReadOptions(num_threads=min(2, prefetch), prefetch_buffer_size=prefetch)
            )
        )
        if num_workers:
            # Grain's workers read absl flags, which only absl's own `app.run` parses.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=num_workers, per_worker_buffer_size=prefetch
                ),
                worker_init_fn=_end_with_parent,
            )
        self._iterator = iter(dataset)

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._iterator)
        counts = dict(zip(_COUNTED, batch["counts"].tolist()))
        self.skipped.update({name: counts[name] for name in SKIP_REASONS if counts[name]})
        self.converted.update({name: counts[name] for name in CONVERSIONS if counts[name]})
        self.examined += self._rows + sum(counts[name] for name in SKIP_REASONS)
        self._stop_if_too_many_are_bad(batch)
        self.examples_seen += self._batch_size
        # Plain arrays, since those of workers lie in shared memory that Grain frees late.
        return {field: np.array(rows) for field, rows in batch["arrays"].items()}

    def state(self) -> dict[str, Any]:
        """JSON-able: `start_example=state["examples_seen"], counters=state` goes on from here.

        `examples_seen` is global, the counters are of this process.
        """
        return {
            "examples_seen": self.examples_seen,
            "examined": self.examined,
            "skipped": dict(self.skipped),
            "converted": dict(self.converted),
        }

    def close(self) -> None:
        self._iterator.close()

    def __enter__(self) -> TrainBatches:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def _stop_if_too_many_are_bad(self, batch: dict[str, Any]) -> None:
        bad = self.skipped.total()
        none_found = batch["arrays"] is None
        self._first_bad = self._first_bad or batch["first_bad"]
        judged = self.examined >= self._min_examined and bad > self._max_bad_share * self.examined
        if not (none_found or judged):
            return
        reasons = counts_as_text(self.skipped)
        first = f"; one of them: {self._first_bad}" if self._first_bad else ""
        what = (
            f"none of {_MAX_TRIES} in a row could be used"
            if none_found
            else f"above data.max_bad_share={self._max_bad_share:g}"
        )
        raise RunStopped(
            f"{bad} of {self.examined} examples ({bad / self.examined:.1%}) were bad: {reasons}, "
            f"{what}{first}; fix the data or raise data.max_bad_share"
        )


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """A whole evaluation set in memory: its distinct images, and what is said about them.

    There is one entry an image, or where instructions are read, one an image and instruction.

    Attributes:
      images: as evaluation sees them (`images.resize_square`).
      captions: of each entry, cleaned, without duplicates, from every example of it.
      image_ids: of each entry, as in the source.
      rows: the image of each entry; without instructions entry i is about image i.
      instructions: of each entry, cleaned; "" where none are read.
      skipped: reason -> number of examples left out.
      converted: conversion -> number of images.
    """

    images: UInt8[np.ndarray, "images size size 3"]
    captions: list[list[str]]
    image_ids: Int[np.ndarray, " entries"]
    rows: Int[np.ndarray, " entries"]
    instructions: list[str]
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
) -> EvalSet:
    """Reads a source once, in order; bad examples are left out and counted.

    Args:
      instructions: whether those of the examples are read.
      max_images: the first so many distinct images, with the captions met until then; 0 for all.
      resize, interpolation: of the images, as in `images.resize_square`.

    Raises:
      RunStopped: no example could be used.
    """
    skipped, conversions = Counter(), Counter()
    pixels: dict[int, np.ndarray] = {}
    # By image and instruction; dicts, because they keep their order.
    captions: dict[tuple[int, str], dict[str, None]] = {}
    for index in range(len(source)):
        if max_images and len(pixels) == max_images:
            break
        try:
            example = source[index]
            image_id, image = example["image_id"], example["image"]
            cleaned = [clean_caption(caption, max_words) for caption in example["captions"]]
            cleaned = [caption for caption in cleaned if caption]
            if not cleaned:
                raise BadSample("empty caption")
            instruction = example["instruction"] if instructions else ""
            instruction = clean_question(instruction, max_words).strip()
            if instructions and not instruction:
                raise BadSample("empty instruction")
            if image_id not in pixels:
                if isinstance(image, bytes):
                    image = images.decode_image(image, max_pixels, conversions)
                pixels[image_id] = images.resize_square(
                    image, image_size_px, resize, interpolation
                )
        except BadSample as bad:
            skipped[bad.reason] += 1
            continue
        captions.setdefault((image_id, instruction), {}).update(dict.fromkeys(cleaned))
    if not pixels:
        raise RunStopped(
            f"none of {len(source)} examples can be evaluated: {counts_as_text(skipped)}; fix them"
        )
    order = {image_id: row for row, image_id in enumerate(pixels)}
    return EvalSet(
        images=np.stack(list(pixels.values())),
        captions=[list(texts) for texts in captions.values()],
        image_ids=np.array([image_id for image_id, _ in captions], np.int64),
        rows=np.array([order[image_id] for image_id, _ in captions]),
        instructions=[instruction for _, instruction in captions],
        skipped=skipped,
        converted=conversions,
    )
