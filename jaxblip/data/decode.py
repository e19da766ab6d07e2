"""Encoded bytes into uint8 RGB pixels.

Pillow reads everything. Of plain JPEGs, which most photographs are, libjpeg-turbo alone decodes the
same pixels in less time, straight into an array, and at a smaller size where that will do.
"""

from __future__ import annotations

import io
import struct
from collections import Counter

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from jaxblip.data.samples import BadSample

_EXIF_ORIENTATION = 0x0112
_TURNED = range(2, 9)  # values of it that are not upright
_BY_PROGRAMS = ("EPS", "WMF")  # Pillow runs Ghostscript, say, on bytes of any origin
_RGB16_PNG = ("RGB;16B", "RGBA;16B", "LA;16B")
# By which libjpeg-turbo divides sizes with fast code; 5/8 to 7/8 take longer than the whole.
_DIVISORS = (8, 4, 2, 1)
# Of other chroma subsamplings, which are rare, small decoded sizes lose colour at sharp edges.
_SHRINKABLE = ("444", "420")
# Segments of a JPEG: sizes (of those that are coded in a usual way), the beginning of the pixels,
# and what changes nothing about how they are to be seen: tables, comments, and JFIF's own.
_SIZES, _PIXELS, _HARMLESS = (0xC0, 0xC1, 0xC2), 0xDA, (0xC4, 0xDB, 0xDD, 0xE0, 0xFE)

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
    return load_image(open_image(data, max_pixels), conversions)


def open_image(data: bytes, max_pixels: int) -> Image.Image:
    """What the header says; raises as `decode_image` does."""
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
    if image.format in _BY_PROGRAMS:
        raise BadSample("unsupported image", f"{image.format}, which other programs would draw")
    return image


def load_image(image: Image.Image, conversions: Counter | None = None) -> Pixels:
    """The rest of `decode_image`."""
    counted = conversions if conversions is not None else Counter()
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
    image = _to_rgb(image, counted)
    if orientation in _TURNED:
        counted["rotated by EXIF"] += 1
        image.getexif()[_EXIF_ORIENTATION] = orientation  # conversion may have dropped it
        image = ImageOps.exif_transpose(image)
    return np.asarray(image)


def _to_rgb(image: Image.Image, counted: Counter) -> Image.Image:
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


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG that is plain at the first glance, in a fifth of Pillow's time.

    Where its header has anything but sizes and tables, such as EXIF, it is for Pillow to say
    whether it `is_plain_jpeg`, and None is returned.
    """
    if not data.startswith(b"\xff\xd8"):
        return None
    place, size = 2, None
    try:
        while True:
            begin, marker, length = struct.unpack_from(">BBH", data, place)
            if begin != 0xFF:
                return None
            if marker == _PIXELS:
                return size
            if marker in _SIZES:
                bits, height, width, colours = struct.unpack_from(">BHHB", data, place + 4)
                if size or bits != 8 or colours != 3 or not height or not width:
                    return None
                size = height, width
            elif marker not in _HARMLESS:
                return None
            place += 2 + length
    except struct.error:  # it ends
        return None


def is_plain_jpeg(image: Image.Image) -> bool:
    """Whether an opened image is an upright JPEG in colour, which needs no more than decoding."""
    if image.format != "JPEG" or image.mode != "RGB":
        return False
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1) not in _TURNED
    except Exception:  # `load_image` says what is wrong
        return False


def decode_jpeg(data: bytes, shrink: float = 1.0) -> tuple[Pixels, int]:
    """A plain JPEG at 1, 1/2, 1/4 or 1/8 of its size, but at least 1 / `shrink`; and that divisor.

    Raises:
      ValueError: something is wrong with it, if only a little. Pillow, which is less strict, is to
        say whether it can be used.
    """
    height, width, _, subsampling = simplejpeg.decode_jpeg_header(data)
    divisor = next(d for d in _DIVISORS if d <= shrink or d == 1)
    if subsampling not in _SHRINKABLE:
        divisor = 1
    size = {"min_height": -(-height // divisor), "min_width": -(-width // divisor)}
    return simplejpeg.decode_jpeg(data, "RGB", **size), divisor
