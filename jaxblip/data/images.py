"""Encoded bytes into uint8 RGB pixels, and the augmentations of BLIP and BLIP-2 on them.

Everything random takes a NumPy generator, so that an example's crop depends on its index alone.
"""

from __future__ import annotations

import io
import math
from collections import Counter

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageOps, UnidentifiedImageError

from jaxblip.data.samples import BadSample

# How an image becomes a square without augmentation, and the filters that encoders were trained on.
RESIZES = ("squash", "shortest_edge")
INTERPOLATIONS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}
_RIBBON = 100  # times as long as wide
_EXIF_ORIENTATION = 0x0112
_RGB16_PNG = ("RGB;16B", "RGBA;16B", "LA;16B")

Pixels = UInt8[np.ndarray, "height width 3"]


def decode_image(data: bytes, max_pixels: int, conversions: Counter | None = None) -> Pixels:
    """Decodes any format that Pillow reads into upright RGB.

    Transparent parts become white; 16 bits become 8; of an animation the first frame is taken;
    EXIF orientation is applied. What was converted is added to `conversions`, under the names in
    `samples.CONVERSIONS`.

    Raises:
      BadSample: the image is corrupt, truncated, of size zero, of more than `max_pixels` pixels
        (found from the header, before memory is taken), or of a pixel type that is no picture.
    """
    counted = conversions if conversions is not None else Counter()
    if not data:
        raise BadSample("zero-size image", "an empty file")
    try:
        image = Image.open(io.BytesIO(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample("gigantic image", str(error)) from error
    except UnidentifiedImageError as error:  # its message names a buffer
        raise BadSample("corrupt image", "its bytes are of no known format") from error
    except Exception as error:  # decoders raise nearly anything on hostile bytes
        raise BadSample("corrupt image", str(error)) from error
    width, height = image.size
    if width * height > max_pixels:
        raise BadSample("gigantic image", f"{width} x {height} pixels, more than {max_pixels}")
    try:
        if getattr(image, "is_animated", False) and image.format != "MPO":
            # An MPO file is a photograph with a second view behind it, not an animation.
            counted["first frame of animation"] += 1
            image.seek(0)
        png16 = image.format == "PNG" and bool(image.tile) and image.tile[0][3] in _RGB16_PNG
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
        image.load()
    except Exception as error:
        reason = "truncated image" if "truncated" in str(error) else "corrupt image"
        raise BadSample(reason, str(error)) from error
    if png16:  # Pillow has already dropped the low bytes
        counted["converted 16-bit"] += 1
    image = to_rgb(image, counted)
    if orientation in range(2, 9):
        counted["rotated by EXIF"] += 1
        image.getexif()[_EXIF_ORIENTATION] = orientation  # conversion may have dropped it
        image = ImageOps.exif_transpose(image)
    return np.asarray(image)


def to_rgb(image: Image.Image, counted: Counter) -> Image.Image:
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return image  # Pillow would copy it, which costs more than decoding
    if mode.startswith("I"):
        # "I" holds what 16-bit grey files of some formats decode to; 257 maps 65535 to 255.
        counted["converted 16-bit"] += 1
        values = np.asarray(image).astype(np.int64)
        grey = np.clip(np.round(values / 257), 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if mode == "F":
        raise BadSample("unsupported image", "floating-point pixels have no known range")
    if mode == "P":
        counted["converted palette"] += 1
    elif mode == "CMYK":
        counted["converted CMYK"] += 1
    elif mode in ("L", "1", "LA", "La"):
        counted["converted grayscale"] += 1
    elif mode not in ("RGB", "RGBA", "RGBa", "RGBX", "PA"):
        counted["converted colour space"] += 1
    try:
        if "transparency" in image.info or mode in ("RGBA", "RGBa", "LA", "La", "PA"):
            counted["converted alpha"] += 1
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, image).convert("RGB")
        return image.convert("RGB")
    except ValueError as error:
        raise BadSample("unsupported image", str(error)) from error


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
    """(left, top, right, bottom) of one random crop; see `random_resized_crop`."""
    log_aspect = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(10):
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
    return np.asarray(crop.resize(size, INTERPOLATIONS[interpolation]))


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
