"""Processors of Hugging Face: how a checkpoint wants images, and the ids of BLIP-2's prompts."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8
from PIL import Image
from tokenizers import AddedToken, Tokenizer

from jaxblip.data import images
from jaxblip.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Where transformers has the settings: version 5 within the processor's file, before beside it.
FILES = ("processor_config.json", "preprocessor_config.json")
IMAGE_TOKEN = "<image>"

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)
_COMMON = {
    "do_resize": True,
    "do_center_crop": False,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "resample": int(Image.Resampling.BICUBIC),
    "crop_size": None,
}
# What a file leaves out, by its class; a size that is one number means the side that is named here.
DEFAULTS: dict[str, dict[str, Any]] = {
    "BlipImageProcessor": _COMMON
    | {"size": {"height": 384, "width": 384}, "image_mean": _CLIP_MEAN, "image_std": _CLIP_STD},
    "CLIPImageProcessor": _COMMON
    | {
        "size": {"shortest_edge": 224},
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "image_mean": _CLIP_MEAN,
        "image_std": _CLIP_STD,
    },
    "SiglipImageProcessor": _COMMON
    | {"size": {"height": 224, "width": 224}, "image_mean": _HALF, "image_std": _HALF},
}


@dataclasses.dataclass(frozen=True)
class ImageProcessing:
    """From an image to the pixels that an encoder was trained on.

    Attributes:
      size_px: a side of the image after resizing.
      resize: "square" makes all sides `size_px`, "shortest_edge" the shorter one; that keeps the
        aspect.
      crop_px: side of the central square that is kept after resizing, black where the image does
        not reach; None keeps everything.
      resample: the filter, of `PIL.Image.Resampling`; antialiased.
      mean: of red, green and blue, from 0 to 1.
      std: likewise; normalized pixels are `(pixel / 255 - mean) / std`.
    """

    size_px: int
    resize: Literal["square", "shortest_edge"] = "square"
    crop_px: int | None = None
    resample: int = int(Image.Resampling.BICUBIC)
    mean: tuple[float, float, float] = _CLIP_MEAN
    std: tuple[float, float, float] = _CLIP_STD

    def __call__(self, image: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
        """Resized and cropped, not normalized: that is for the device.

        Transparent parts become white. 16-bit images are divided by 257, where transformers cuts
        them off at 255.

        Raises:
          jaxblip.data.samples.BadSample: the pixels are of a type that is no picture.
        """
        rgb = images.to_rgb(image, Counter())
        width, height = size = rgb.size
        if self.resize == "square":
            size = (self.size_px, self.size_px)
        else:
            longer = int(self.size_px * max(size) / min(size))  # rounded as in torchvision
            size = (self.size_px, longer) if width <= height else (longer, self.size_px)
        pixels = np.asarray(rgb.resize(size, Image.Resampling(self.resample)))
        return pixels if self.crop_px is None else _central(pixels, self.crop_px)

    def normalize(
        self, pixels: UInt8[np.ndarray, "*batch height width 3"]
    ) -> Float32[np.ndarray, "*batch height width 3"]:
        """What the encoder takes, computed on the host."""
        mean, std = np.float32(self.mean), np.float32(self.std)
        return (pixels.astype(np.float32) / np.float32(255) - mean) / std

    def to_hf(self) -> dict[str, Any]:
        """The preprocessor_config.json of which `image_processing` makes this again."""
        square = self.resize == "square"
        size = dict.fromkeys(("height", "width"), self.size_px)
        fields = {
            "image_processor_type": "BlipImageProcessor" if square else "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": size if square else {"shortest_edge": self.size_px},
            "resample": self.resample,
            "do_center_crop": self.crop_px is not None,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        if self.crop_px is not None:
            # Only CLIP's class has always cropped.
            fields["image_processor_type"] = "CLIPImageProcessor"
            fields["crop_size"] = dict.fromkeys(("height", "width"), self.crop_px)
        return fields


def load_image_processing(folder: str | os.PathLike) -> ImageProcessing:
    """The settings that lie beside the weights in `folder`.

    Raises:
      UserError: there are none, or as `image_processing`.
    """
    found = find_image_processing(folder)
    if found is None:
        raise UserError(
            f"{os.fspath(folder)!r} has no {FILES[1]}, and no {FILES[0]} with settings of images: "
            "fetch them, or give ImageProcessing yourself."
        )
    return found


def find_image_processing(folder: str | os.PathLike) -> ImageProcessing | None:
    """As `load_image_processing`, but None where there are no settings."""
    for file in (Path(folder) / name for name in FILES):
        if not file.is_file():
            continue
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{file} is no JSON: {error}. Fetch it again.") from error
        if isinstance(fields.get("image_processor"), Mapping) or file.name != FILES[0]:
            return image_processing(fields)
    return None


def image_processing(hf: Mapping[str, Any]) -> ImageProcessing:
    """What the settings of a BLIP, CLIP or SigLIP image processor of transformers mean.

    Args:
      hf: a preprocessor_config.json, or a processor_config.json with an `image_processor`, of any
        version. What it leaves out has the default of its class.

    Raises:
      UserError: the class, or the field and the value, that `ImageProcessing` does not cover.
    """
    given = hf["image_processor"] if isinstance(hf.get("image_processor"), Mapping) else hf
    name = given.get("image_processor_type") or given.get("feature_extractor_type") or ""
    kind = name.removesuffix("Fast").removesuffix("Pil")
    kind = kind.replace("FeatureExtractor", "ImageProcessor")  # until 2022
    if kind not in DEFAULTS:
        raise UserError(
            f"The image processor's class {name!r} is not covered: it must be one of "
            f"{', '.join(DEFAULTS)}."
        )
    fields = DEFAULTS[kind] | {key: value for key, value in given.items() if value is not None}
    if not fields["do_resize"]:
        _refuse(fields, "do_resize", "images must come out in one size")
    if not fields["do_rescale"] or abs(fields["rescale_factor"] * 255 - 1) > 1e-6:
        field = "rescale_factor" if fields["do_rescale"] else "do_rescale"
        _refuse(fields, field, "encoders of these families take pixels from 0 to 1, normalized")
    size = fields["size"]
    if isinstance(size, int):
        size = {"shortest_edge": size} if kind == "CLIPImageProcessor" else _square(size)
    if set(size) == {"shortest_edge"}:
        resize, size_px = "shortest_edge", size["shortest_edge"]
    elif set(size) == {"height", "width"} and size["height"] == size["width"]:
        resize, size_px = "square", size["height"]
    else:
        _refuse(fields, "size", "it must be a square or a shortest_edge")
    crop_px = None
    if fields["do_center_crop"]:
        crop = fields["crop_size"] or size_px
        crop = _square(crop) if isinstance(crop, int) else crop
        if set(crop) != {"height", "width"} or crop["height"] != crop["width"]:
            _refuse(fields, "crop_size", "it must be a square")
        crop_px = crop["height"]
    mean, std = (0.0,) * 3, (1.0,) * 3
    if fields["do_normalize"]:
        mean, std = tuple(fields["image_mean"]), tuple(fields["image_std"])
    return ImageProcessing(size_px, resize, crop_px, int(fields["resample"]), mean, std)


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def _refuse(fields: Mapping[str, Any], name: str, reason: str) -> NoReturn:
    raise UserError(
        f"The image processor has {name}={fields[name]!r}, which is not covered: {reason}."
    )


def _central(
    pixels: UInt8[np.ndarray, "height width 3"], side: int
) -> UInt8[np.ndarray, "side side 3"]:
    lacking = [max(0, side - length) for length in pixels.shape[:2]]
    before = [(number + 1) // 2 for number in lacking]
    after = [number // 2 for number in lacking]
    pixels = np.pad(pixels, [*zip(before, after, strict=True), (0, 0)])
    top, left = ((length - side) // 2 for length in pixels.shape[:2])
    return pixels[top : top + side, left : left + side]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as transformers' BLIP-2 takes it: placeholders for the image, then the text.

    Attributes:
      ids: of placeholders and text, special tokens included.
      is_image: where a placeholder stands.
    """

    ids: Int32[np.ndarray, " tokens"]
    is_image: Bool[np.ndarray, " tokens"]

    @property
    def text_ids(self) -> Int32[np.ndarray, " text"]:
        """Without the placeholders: what follows the visual tokens in `Blip2Stage2`."""
        return self.ids[~self.is_image]


class PromptEncoder:
    """Prompts into the ids of transformers' `Blip2Processor`.

    Args:
      tokenizer: of the language model: with or without an entry for the placeholder, which then is
        added behind its last one, as transformers does.
      num_query_tokens: placeholders in front of each prompt, as many as the Q-Former has queries.

    Raises:
      UserError: the tokenizer has no fast version.

    Attributes:
      image_token_id: of the placeholder; `image_token_index` in the config.json.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, num_query_tokens: int = 32):
        if not tokenizer.is_fast:
            raise UserError(
                f"tokenizer {tokenizer.name_or_path!r} has no fast version; save it with a "
                "tokenizer.json, which save_pretrained of a fast one writes."
            )
        self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        token = AddedToken(IMAGE_TOKEN, normalized=False, special=True)
        self._tokenizer.add_special_tokens([token])
        self.image_token_id = self._tokenizer.token_to_id(IMAGE_TOKEN)
        self.num_query_tokens = num_query_tokens

    def __call__(self, text: str) -> Prompt:
        """One prompt.

        Raises:
          UserError: the text spells the placeholder out, so that an image would be read twice.
        """
        text_ids = np.array(self._tokenizer.encode(text).ids, np.int32)
        if (text_ids == self.image_token_id).any():
            raise UserError(
                f"The prompt {text!r} contains {IMAGE_TOKEN!r}, which stands for the image and is "
                "put in front of the text: leave it out."
            )
        image = np.full(self.num_query_tokens, self.image_token_id, np.int32)
        is_image = np.arange(len(image) + len(text_ids)) < len(image)
        return Prompt(np.concatenate([image, text_ids]), is_image)
