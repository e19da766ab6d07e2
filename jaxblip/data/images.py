"""Images as squares: as evaluation sees them, and with the augmentations of BLIP and BLIP-2.

Everything random takes a NumPy generator, so that an example's crop depends on its index alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from jaxblip.data.choices import INTERPOLATIONS
from jaxblip.data.decode import (
    Pixels,
    decode_jpeg,
    is_plain_jpeg,
    load_image,
    open_image,
    plain_jpeg_size,
)
from jaxblip.data.resample import resample

_RIBBON = 100  # times as long as wide
# A JPEG may be decoded at a reduced size if its crop is still so many times as large as it will be.
# Then 99.9 % of the values are within 2/255 of those from the full size; at 2 times within 4/255.
_MIN_REDUCTION = 2.5


def frame_numbers(count: int, wanted: int) -> list[int]:
    """Which of `count` frames stand for a video: the middle ones of `wanted` equal stretches.

    Where there are fewer, they follow each other more than once, in their order.
    """
    return [(2 * number + 1) * count // (2 * wanted) for number in range(wanted)]


def is_video(image: Any) -> bool:
    """Whether it is a list of frames."""
    return isinstance(image, list | tuple) or getattr(image, "ndim", 0) == 4


def of_frames(function: Callable[[Any], np.ndarray], image: Any, frames: int) -> np.ndarray:
    """`function` of an image; with `frames` > 1 of so many of a video's, with an axis in front.

    An image by itself is a video of one.
    """
    if frames == 1:
        return function(image)
    video = list(image) if is_video(image) else [image]
    numbers = frame_numbers(len(video), frames)
    made = {number: function(video[number]) for number in dict.fromkeys(numbers)}
    return np.stack([made[number] for number in numbers])


def resize_square(
    pixels: Pixels, size_px: int, resize: str = "squash", interpolation: str = "bicubic"
) -> Pixels:
    """The image without augmentation, antialiased.

    Args:
      resize: "squash" stretches it to the square, as BLIP and SigLIP do; "shortest_edge" resizes it
        by its shorter side and takes the central square, as CLIP does.
      interpolation: the filter, of `INTERPOLATIONS`.
    """
    if resize == "squash":
        return _resize(pixels, _whole(pixels), (size_px, size_px), interpolation)
    shorter = min(pixels.shape[:2])
    # Of a ribbon the middle will do: the whole of it, resized, might not fit into memory.
    pixels = _central(pixels, *(min(side, _RIBBON * shorter) for side in pixels.shape[:2]))
    longer = int(size_px * max(pixels.shape[:2]) / shorter)  # rounded as in torchvision
    is_tall = pixels.shape[0] >= pixels.shape[1]
    size = (size_px, longer) if is_tall else (longer, size_px)
    return _central(_resize(pixels, _whole(pixels), size, interpolation), size_px, size_px)


def random_view(
    image: bytes | Pixels,
    rng: np.random.Generator,
    size_px: int,
    scale: tuple[float, float] = (0.5, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bicubic",
    flip_probability: float = 0.5,
    max_pixels: int = 100_000_000,
    conversions: Counter | None = None,
) -> Pixels:
    """`decode_image`, `random_resized_crop` and `random_flip`: what training sees of an image.

    Of most JPEGs it is made by `decode_jpeg` and `resample`, in half of the time: the draws are the
    same, the pixels within 1/255 on average and 2/255 for 99.9 %. Of all else it is the same.

    Raises:
      BadSample: as `decode_image` does; nothing is drawn then.
    """
    return open_view(
        image, rng, size_px, scale, aspect, interpolation, flip_probability, max_pixels, conversions
    )()


def open_view(
    image: bytes | Pixels,
    rng: np.random.Generator,
    size_px: int,
    scale: tuple[float, float] = (0.5, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bicubic",
    flip_probability: float = 0.5,
    max_pixels: int = 100_000_000,
    conversions: Counter | None = None,
) -> Callable[[], Pixels]:
    """`random_view` in two parts: what the header says and, mostly, the draws; then the rest.

    The second part is nearly all of the work; the first one is Python, which is several times
    slower right behind a decoder, and may be done for many images before.
    """

    def by_pillow(pixels: Pixels) -> Pixels:
        crop = random_resized_crop(pixels, rng, size_px, scale, aspect, interpolation)
        return random_flip(crop, rng, flip_probability)

    if not isinstance(image, bytes):
        return lambda: by_pillow(image)
    height, width = plain_jpeg_size(image) or (0, 0)
    if not 0 < height * width <= max_pixels:
        opened = open_image(image, max_pixels)
        if not is_plain_jpeg(opened):
            return lambda: by_pillow(load_image(opened, conversions))
        height, width = opened.height, opened.width
    before = rng.bit_generator.state
    box = crop_box(height, width, rng, scale, aspect)
    mirrored = rng.random() < flip_probability
    shortest = min(box[2] - box[0], box[3] - box[1])

    def view() -> Pixels:
        try:
            pixels, divisor = decode_jpeg(image, shortest / (_MIN_REDUCTION * size_px))
            edges = tuple(edge / divisor for edge in box)
            return resample(pixels, edges, size_px, interpolation, mirrored)
        except (ValueError, MemoryError):
            rng.bit_generator.state = before
            return by_pillow(load_image(open_image(image, max_pixels), conversions))

    return view


def random_resized_crop(
    pixels: Pixels,
    rng: np.random.Generator,
    size_px: int,
    scale: tuple[float, float] = (0.5, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bicubic",
) -> Pixels:
    """A crop of random area and shape, resized to a square (antialiased).

    Follows torchvision's RandomResizedCrop, which BLIP and BLIP-2 use: the area is uniform in
    `scale` (shares of the whole), width / height is log-uniform in `aspect`; after ten crops that
    do not fit, the largest central one whose shape is allowed.
    """
    box = crop_box(pixels.shape[0], pixels.shape[1], rng, scale, aspect)
    return _resize(pixels, box, (size_px, size_px), interpolation)


def crop_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    aspect: tuple[float, float],
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of one random crop; see `random_resized_crop`.

    Of the whole area there is only the largest central one, and nothing is drawn.
    """
    log_aspect = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(10 if tuple(scale) != (1, 1) else 0):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(*log_aspect))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(height - crop_height + 1))
            left = int(rng.integers(width - crop_width + 1))
            return left, top, left + crop_width, top + crop_height
    crop_width, crop_height = width, height
    if width / height < aspect[0]:
        crop_height = round(width / aspect[0])
    elif width / height > aspect[1]:
        crop_width = round(height * aspect[1])
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return left, top, left + crop_width, top + crop_height


def random_flip(pixels: Pixels, rng: np.random.Generator, probability: float) -> Pixels:
    """Mirrors left and right with this probability."""
    return pixels[:, ::-1] if rng.random() < probability else pixels


def _whole(pixels: Pixels) -> tuple[int, int, int, int]:
    return 0, 0, pixels.shape[1], pixels.shape[0]


def _central(pixels: Pixels, height: int, width: int) -> Pixels:
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def _resize(
    pixels: Pixels, box: tuple[int, int, int, int], size: tuple[int, int], interpolation: str
) -> Pixels:
    """A part of the image at another size `(width, height)`."""
    left, top, right, bottom = box
    if (right - left, bottom - top) == size:
        return pixels[top:bottom, left:right]
    # Cropped first, as torchvision does: Pillow's own `box` would look at pixels beyond its edge.
    crop = Image.fromarray(pixels[top:bottom, left:right])
    return np.asarray(crop.resize(size, Image.Resampling(INTERPOLATIONS[interpolation])))


# RandAugment as BLIP uses it (`blip_image_train`): the sizes that magnitude 5 of 10 stands for.
# Brightness and sharpness come out as factor 1, which changes nothing; they stay in the list
# because each takes its share of the draws.
_MAGNITUDE = 5 / 10
_NUM_OPS = 2
_OP_PROBABILITY = 0.5
_ENHANCE = 0.1 + 1.8 * _MAGNITUDE
_SHEAR = 0.3 * _MAGNITUDE
_TRANSLATE_PX = 10 * _MAGNITUDE
_ROTATE_DEGREES = 30 * _MAGNITUDE
_GREY = (128, 128, 128)


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    """Pixel (x, y) of the result is pixel (a x + b y + c, d x + e y + f); outside is grey."""
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=_GREY
    )


RANDAUGMENT_OPS = {
    "identity": lambda image, sign: image,
    "autocontrast": lambda image, sign: ImageOps.autocontrast(image),
    "brightness": lambda image, sign: ImageEnhance.Brightness(image).enhance(_ENHANCE),
    "sharpness": lambda image, sign: ImageEnhance.Sharpness(image).enhance(_ENHANCE),
    "equalize": lambda image, sign: ImageOps.equalize(image),
    "shear_x": lambda image, sign: _affine(image, 1, -sign * _SHEAR, 0, 0, 1, 0),
    "shear_y": lambda image, sign: _affine(image, 1, 0, 0, -sign * _SHEAR, 1, 0),
    "translate_x": lambda image, sign: _affine(image, 1, 0, -sign * _TRANSLATE_PX, 0, 1, 0),
    "translate_y": lambda image, sign: _affine(image, 1, 0, 0, 0, 1, -sign * _TRANSLATE_PX),
    "rotate": lambda image, sign: image.rotate(
        sign * _ROTATE_DEGREES, Image.Resampling.BILINEAR, fillcolor=_GREY
    ),
}


def randaugment(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Two operations drawn with replacement, each applied with probability 0.5, magnitude 5.

    Signs of shears, shifts and rotations are drawn evenly; what comes into view is grey.
    """
    names = list(RANDAUGMENT_OPS)
    image = Image.fromarray(pixels)
    for choice in rng.integers(len(names), size=_NUM_OPS):
        if rng.random() < _OP_PROBABILITY:
            image = RANDAUGMENT_OPS[names[choice]](image, 1 if rng.random() < 0.5 else -1)
    return np.asarray(image)
