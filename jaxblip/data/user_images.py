"""Images in any form that users of the Python interface have them in."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from jaxblip.data.decode import decode_image
from jaxblip.data.samples import BadSample
from jaxblip.errors import UserError

# An image: its file, its encoded bytes, a Pillow image, or uint8 pixels [height, width(, 3 or 4)].
ImageLike = str | os.PathLike | bytes | Image.Image | np.ndarray

# Modes that PNG has, and those that hold transparency in another form.
_PNG_MODES = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")
_ALPHA_MODES = ("La", "PA", "RGBa")


def read_image(image: ImageLike, max_pixels: int) -> UInt8[np.ndarray, "height width 3"]:
    """Upright RGB pixels of an image in any form that users have it in.

    Raises:
      UserError: there is none in it, or it has more than `max_pixels` pixels.
    """
    name = "The image" if isinstance(image, bytes) else f"The image {_shown(image)}"
    try:
        if isinstance(image, bytes):
            return decode_image(image, max_pixels)
        if isinstance(image, str | os.PathLike):
            return decode_image(Path(image).read_bytes(), max_pixels)
        if isinstance(image, Image.Image):
            return decode_image(_as_png(image), max_pixels)
        return _from_array(np.asarray(image), max_pixels)
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror or error}.") from error
    except BadSample as bad:
        detail = f" ({bad.detail})" if bad.detail else ""
        raise UserError(f"{name} cannot be used: {bad.reason}{detail}; give another one.") from bad


def _from_array(array: np.ndarray, max_pixels: int) -> np.ndarray:
    channels = array.shape[2] if array.ndim == 3 else 1
    is_image = array.ndim in (2, 3) and channels in (1, 3, 4) and array.size
    if array.dtype != np.uint8 or not is_image:
        raise UserError(
            f"An image of dtype {array.dtype} and shape {array.shape} is none: give uint8 values "
            "0-255 of shape [height, width, 3]."
        )
    if channels == 3:
        return array
    grey_or_alpha = array[..., 0] if channels == 1 and array.ndim == 3 else array
    return decode_image(_as_png(Image.fromarray(grey_or_alpha)), max_pixels)


def _as_png(image: Image.Image) -> bytes:
    """The image as a file, so that transparency and depth are treated as those of files."""
    image = ImageOps.exif_transpose(image)
    if image.mode in _ALPHA_MODES:
        image = image.convert("RGBA")
    if image.mode == "F":
        raise BadSample("unsupported image", "floating-point pixels have no known range")
    if image.mode not in _PNG_MODES:
        image = image.convert("RGB")
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=0)
    return file.getvalue()


def _shown(image: ImageLike) -> str:
    return repr(os.fspath(image)) if isinstance(image, str | os.PathLike) else type(image).__name__


def list_images(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    """One image as a list of one; an array of four axes is a list already, of five too."""
    if isinstance(images, str | os.PathLike | bytes | Image.Image):
        return [images]
    if hasattr(images, "ndim"):
        return list(images) if images.ndim >= 4 else [images]
    return list(images)
