"""Image processors of Hugging Face: how a checkpoint wants images."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from jaxblip.data.choices import INTERPOLATIONS
from jaxblip.errors import UserError

# Where transformers has the settings: version 5 within the processor's file, before beside it.
FILES = ("processor_config.json", "preprocessor_config.json")

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)
_COMMON = {
    "do_resize": True,
    "do_center_crop": False,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "resample": INTERPOLATIONS["bicubic"],
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
    """From an image to the pixels that an encoder was trained on, by fields of `config.data`.

    Attributes:
      size_px: side of the square that comes out.
      resize: how the image becomes a square, of `choices.RESIZES`.
      interpolation: the filter, of `choices.INTERPOLATIONS`.
      mean: of red, green and blue, from 0 to 1.
      std: likewise; normalized pixels are `(pixel / 255 - mean) / std`.
    """

    size_px: int
    resize: str = "squash"
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = _CLIP_MEAN
    std: tuple[float, float, float] = _CLIP_STD

    def data_fields(self) -> dict[str, Any]:
        """What `config.data` says of it, but for the size, which the encoder decides."""
        return {
            "resize": self.resize,
            "interpolation": self.interpolation,
            "pixel_mean": tuple(map(float, self.mean)),
            "pixel_std": tuple(map(float, self.std)),
        }

    @classmethod
    def of_run(cls, data: Mapping[str, Any]) -> ImageProcessing:
        """That of a run, from its `config.data`."""
        return cls(
            data["image_size_px"],
            data["resize"],
            data["interpolation"],
            tuple(data["pixel_mean"]),
            tuple(data["pixel_std"]),
        )

    def to_hf(self) -> dict[str, Any]:
        """The preprocessor_config.json of which `image_processing` makes this again."""
        crops = self.resize == "shortest_edge"  # only CLIP's class has always cropped
        square = dict.fromkeys(("height", "width"), self.size_px)
        return {
            "image_processor_type": "CLIPImageProcessor" if crops else "BlipImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": self.size_px} if crops else square,
            "resample": INTERPOLATIONS[self.interpolation],
            "do_center_crop": crops,
            **({"crop_size": square} if crops else {}),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }


def find_image_processing(folder: str | os.PathLike) -> ImageProcessing | None:
    """The settings that lie beside the weights in `folder`; None where there are none.

    Raises:
      UserError: as `image_processing`.
    """
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
    sides = set(size.values())
    if len(sides) != 1 or size.keys() not in ({"shortest_edge"}, {"height", "width"}):
        _refuse(fields, "size", "it must be a square or a shortest_edge")
    (size_px,) = sides
    is_square = "height" in size
    if not is_square and not fields["do_center_crop"]:
        _refuse(fields, "do_center_crop", "images must come out square")
    crop = fields["crop_size"] or size_px
    if fields["do_center_crop"] and crop not in (size_px, _square(size_px)):
        _refuse(fields, "crop_size", f"images must keep the {size_px} px of their resizing")
    filters = {code: name for name, code in INTERPOLATIONS.items()}
    if fields["resample"] not in filters:
        _refuse(fields, "resample", f"it must be one of {filters}")
    mean, std = (0.0,) * 3, (1.0,) * 3
    if fields["do_normalize"]:
        mean, std = tuple(fields["image_mean"]), tuple(fields["image_std"])
    resize = "squash" if is_square else "shortest_edge"
    return ImageProcessing(size_px, resize, filters[fields["resample"]], mean, std)


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def _refuse(fields: Mapping[str, Any], name: str, reason: str) -> NoReturn:
    raise UserError(
        f"The image processor has {name}={fields[name]!r}, which is not covered: {reason}."
    )
