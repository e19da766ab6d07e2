"""One example of a source into the arrays that a task wants."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import BFloat16

from jaxblip.data import images
from jaxblip.data.samples import BadSample
from jaxblip.data.text import (
    INSTRUCTION,
    clean_caption,
    clean_question,
    fill_prompt,
    join_prompt,
)
from jaxblip.data.tokenizers import TextEncoder, padded_row

Image = bytes | np.ndarray
OF_IMAGES = ("image", "image_features")
FIELDS = (
    *OF_IMAGES,
    "text_ids",
    "text_mask",
    "segment_ids",
    "input_ids",
    "input_mask",
    "image_id",
    "prompt_length",
    "instruction_ids",
    "instruction_mask",
)


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """One example and a generator into the arrays that a task wants; picklable.

    Attributes:
      fields: which of FIELDS to make; without "image" no image is decoded.
      image_size_px: side of the images: uint8 [size, size, 3].
      encoder: texts to ids; needed for all fields but "image" and "image_id".
      prompt: stands before every caption, and {} in it for the example's instruction.
      templates: prompts, of which one is drawn each time in the place of `prompt`; () for none.
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
      frames: images of an example; with more than 1 they have an axis in front.
      crop_scale, crop_aspect: of `random_resized_crop`; (1, 1) twice is the whole (square) image.
      interpolation: the filter of its resizing, of `choices.INTERPOLATIONS`.
      flip_probability: of mirroring; must be 0 where captions speak of left and right.
      randaugment: whether to add BLIP's RandAugment.
      max_image_pixels: an image with more is a bad sample.
    """

    fields: tuple[str, ...]
    image_size_px: int = 224
    encoder: TextEncoder | None = None
    prompt: str = ""
    templates: tuple[str, ...] = ()
    max_words: int = 50
    captions_per_text: int = 1
    max_input_tokens: int = 0
    prefix_lm: bool = False
    instruction_encoder: TextEncoder | None = None
    max_instruction_tokens: int = 0
    frames: int = 1
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
        if self.encoder is None and set(self.fields) - {*OF_IMAGES, "image_id"}:
            raise ValueError(f"fields {self.fields} need an encoder for the text")
        if self.instruction_encoder is None and self._has("instruction"):
            raise ValueError(f"fields {self.fields} need an encoder for the instruction")

    def __call__(
        self, example: dict[str, Any], rng: np.random.Generator, conversions: Counter
    ) -> dict[str, np.ndarray]:
        """Arrays of one example, without a batch axis.

        Raises:
          BadSample: as `texts` and `image` do.
        """
        arrays = self.texts(example, rng)
        if "image" in self.fields:
            arrays["image"] = self.image(example["image"], rng, conversions)
        if "image_features" in self.fields:
            arrays["image_features"] = self.image_features(example["image_features"], rng)
        return arrays

    def texts(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The arrays of all fields but those of the image.

        Raises:
          BadSample: no caption has a word, or the instruction has none and is needed.
        """
        captions = self._captions(example["captions"], rng)
        prompts, instruction = self.prompts(example)
        prompt = prompts[int(rng.integers(len(prompts)))] if len(prompts) > 1 else prompts[0]
        texts, skip, arrays = [join_prompt(prompt, caption) for caption in captions], 0, {}
        if self._has("input"):
            inputs, texts = self._divided(captions, prompt, rng)
            arrays["input_ids"], arrays["input_mask"] = self._input_row(inputs)
        elif self.max_instruction_tokens and prompt:
            skip = max(0, len(self.encoder.prompt_ids(prompt)) - self.max_instruction_tokens)
        if self._has("text"):
            arrays["text_ids"], arrays["text_mask"] = self.encoder.row(texts, skip)
            # One text; `packing` puts several in a row. 0 is padding.
            arrays["segment_ids"] = arrays["text_mask"].astype(np.int32)
        if "prompt_length" in self.fields:
            arrays["prompt_length"] = np.int32(self.encoder.prompt_length(prompt, skip))
        if self._has("instruction"):
            row = self.instruction_encoder.row([prompt or instruction])
            arrays["instruction_ids"], arrays["instruction_mask"] = row
        if "image_id" in self.fields:
            arrays["image_id"] = _folded(example["image_id"])
        return {field: arrays[field] for field in self.fields if field not in OF_IMAGES}

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Of "image", without a batch axis."""
        square = self.image_size_px, self.image_size_px, 3
        return square if self.frames == 1 else (self.frames, *square)

    def image(
        self, image: Image | list[Image], rng: np.random.Generator, conversions: Counter
    ) -> np.ndarray:
        """What training sees of an image, uint8; what was converted is added to `conversions`.

        Raises:
          BadSample: the image cannot be decoded.
        """
        return self.open_image(image, rng, conversions)()

    def open_image(
        self, image: Image | list[Image], rng: np.random.Generator, conversions: Counter
    ) -> Callable[[], np.ndarray]:
        """`image` in two parts, see `images.open_view`; both raise.

        All frames of a video are cropped, mirrored and changed alike.
        """
        if self.frames == 1:
            return self._open_view(image, rng, conversions)
        state = rng.bit_generator.state

        def view(frame: Image) -> np.ndarray:
            rng.bit_generator.state = state
            return self._open_view(frame, rng, conversions)()

        return lambda: images.of_frames(view, image, self.frames)

    def _open_view(
        self, image: Image, rng: np.random.Generator, conversions: Counter
    ) -> Callable[[], np.ndarray]:
        view = images.open_view(
            image,
            rng,
            self.image_size_px,
            self.crop_scale,
            self.crop_aspect,
            self.interpolation,
            self.flip_probability,
            self.max_image_pixels,
            conversions,
        )
        return (lambda: images.randaugment(view(), rng)) if self.randaugment else view

    def image_features(
        self, views: Sequence[np.ndarray], rng: np.random.Generator
    ) -> BFloat16[np.ndarray, "tokens width"]:
        """Those of one of an image's views.

        Raises:
          BadSample: it has none.
        """
        return views[int(rng.integers(len(views)))]

    def prompts(self, example: dict[str, Any]) -> tuple[list[str], str]:
        """What may stand before its captions, and the instruction, where either reads that.

        Raises:
          BadSample: an instruction is read and has no word.
        """
        prompts, instruction = self.templates or (self.prompt,), ""
        by_itself = self._has("instruction") and not all(prompts)
        if by_itself or any(INSTRUCTION in prompt for prompt in prompts):
            instruction = clean_question(example["instruction"], self.max_words).strip()
            if not instruction:
                raise BadSample("empty instruction", f"captions {list(example['captions'])}")
        return [fill_prompt(prompt, instruction) for prompt in prompts], instruction

    def _has(self, name: str) -> bool:
        return not {f"{name}_ids", f"{name}_mask"}.isdisjoint(self.fields)

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
        return padded_row(tokens, self.max_input_tokens, self.encoder.pad_id)


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
