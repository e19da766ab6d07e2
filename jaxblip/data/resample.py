"""Antialiased resizing of a part of an image to a square, with Pillow's filters.

A part whose edges are edges of pixels is resized by `cykooz_resizer` (the crate fast_image_resize),
in a sixth of the time that Pillow takes. It has Pillow's pixels but for the last bit, and the same
ones with any SIMD instructions.

It does not know edges that go through pixels, as a JPEG has that is decoded at a reduced size.
There, and where the package is missing, resizing along one axis is to multiply by a matrix that is
zero off a narrow band, and the blocks of this band go through NumPy's matrix product: a third of
the time that Pillow takes. Weights are multiples of 2**-14, and what the first pass gives is
rounded to whole numbers, so that float32 holds every sum exactly: the pixels are the same on every
machine. They are Pillow's but for what it does between its two passes: it rounds, where we round
with rows and columns exchanged, and it cuts off what overshoots 0 and 255, which shows at corners
of things as bright as can be.
"""

from __future__ import annotations

import functools
import math
import threading

import numpy as np
from jaxtyping import Float32, UInt8

try:
    import cykooz_resizer as simd
except ImportError:  # there are no wheels for Linux on ARM
    simd = None

# Output pixels of a block. Larger blocks multiply more zeros, smaller ones cost more calls; these
# products are also too small for the BLAS library to start threads, which would fight over cores.
_BLOCK = 8
_WEIGHT_UNIT = 2.0**-14


def _cubic(x: np.ndarray) -> np.ndarray:
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - x, 0)


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(x < 3, np.sinc(x) * np.sinc(x / 3), 0)


# Each filter at a distance from its centre, and the distance at which it ends.
_FILTERS = {"bicubic": (_cubic, 2.0), "bilinear": (_triangle, 1.0), "lanczos": (_lanczos, 3.0)}


def resample(
    pixels: UInt8[np.ndarray, "height width 3"],
    box: tuple[float, float, float, float],
    size_px: int,
    interpolation: str = "bicubic",
    mirrored: bool = False,
) -> UInt8[np.ndarray, "size size 3"]:
    """A part of the image as a square. Nothing beyond the edges of the part is looked at.

    Args:
      pixels: contiguous.
      box: (left, top, right, bottom) of the part, in pixels; an edge may go through a pixel.
      interpolation: the filter: "bicubic", "bilinear" or "lanczos".
      mirrored: whether left and right change places.
    """
    if simd and all(edge == int(edge) for edge in box):
        square = _by_simd(pixels, tuple(map(int, box)), size_px, interpolation)
    else:
        square = _by_products(pixels, box, size_px, interpolation)
    if mirrored:
        square = square[:, ::-1]
    if square.flags.c_contiguous:
        return square.copy()  # of memory that cannot be written
    result = np.empty((size_px, size_px, 3), np.uint8)
    for channel in range(3):  # three times faster than all at once
        result[:, :, channel] = square[:, :, channel]
    return result


class _Resizers(threading.local):
    """Of each thread one, with its results: it keeps memory, and does one thing at a time."""

    def __init__(self):
        self.resizer = simd.Resizer()
        self.square = functools.cache(lambda size: simd.ImageData(size, size, simd.PixelType.U8x3))


_of_thread = _Resizers() if simd else None


@functools.cache
def _options(interpolation: str) -> simd.ResizeOptions:
    names = {"bicubic": "catmull_rom", "bilinear": "bilinear", "lanczos": "lanczos3"}
    return simd.ResizeOptions(simd.ResizeAlg.convolution(simd.FilterType[names[interpolation]]))


def _by_simd(
    pixels: UInt8[np.ndarray, "height width 3"],
    box: tuple[int, int, int, int],
    size_px: int,
    interpolation: str,
) -> UInt8[np.ndarray, "size size 3"]:
    left, top, right, bottom = box
    # Cut out, since it looks beyond the edges of a box; as items of a row each, which is faster.
    part = pixels.reshape(len(pixels), -1)[top:bottom, 3 * left : 3 * right]
    rows = part.view(f"V{part.shape[1]}").tobytes()
    image = simd.ImageData(right - left, bottom - top, simd.PixelType.U8x3, rows)
    square = _of_thread.square(size_px)
    _of_thread.resizer.resize(image, square, _options(interpolation))
    return np.frombuffer(square.get_buffer(), np.uint8).reshape(size_px, size_px, 3)


def _by_products(
    pixels: UInt8[np.ndarray, "height width 3"],
    box: tuple[float, float, float, float],
    size_px: int,
    interpolation: str,
) -> UInt8[np.ndarray, "size size 3"]:
    left, top, right, bottom = box
    first_row, first_column = math.floor(top), math.floor(left)
    rows = slice(first_row, math.ceil(bottom))
    columns = slice(3 * first_column, 3 * math.ceil(right))
    part = pixels.reshape(len(pixels), -1)[rows, columns]
    # Both passes multiply the first axis. The first one also brings columns to the front.
    short = np.empty((part.shape[1], size_px), np.float32)
    for out, taken, weights in _band(top - first_row, bottom - first_row, size_px, interpolation):
        np.matmul(part[taken].astype(np.float32).T, weights.T, out=short[:, out])
    np.rint(short, out=short)
    short = short.reshape(-1, 3 * size_px)
    small = np.empty((size_px, 3 * size_px), np.float32)
    across = left - first_column, right - first_column
    for out, taken, weights in _band(*across, size_px, interpolation):
        np.matmul(weights, short[taken], out=small[out])
    np.clip(np.rint(small, out=small), 0, 255, out=small)
    return small.astype(np.uint8).reshape(size_px, 3, size_px).transpose(2, 0, 1)


@functools.lru_cache(maxsize=2048)
def _band(
    start: float, stop: float, size_px: int, interpolation: str
) -> list[tuple[slice, slice, Float32[np.ndarray, "block taken"]]]:
    """Blocks of the matrix that resizes [start, stop), 0 <= start < 1, of an axis to `size_px`.

    Of each: the output pixels, the input pixels, and the weights. All blocks are of one shape.
    """
    kernel, reach = _FILTERS[interpolation]
    scale = (stop - start) / size_px
    stretch = max(scale, 1.0)  # the filter is as wide as an output pixel: this is antialiasing
    block = min(_BLOCK, size_px)
    # The last block overlaps the one before where `block` is no divisor.
    outs = np.minimum(np.arange(0, size_px, block), size_px - block)
    centres = start + (outs[:, None] + np.arange(block) + 0.5) * scale
    end = math.ceil(stop)
    firsts = np.maximum(np.floor(centres[:, 0] - reach * stretch), 0).astype(int)
    lasts = np.minimum(np.ceil(centres[:, -1] + reach * stretch), end).astype(int)
    taken = (lasts - firsts).max()
    firsts = np.minimum(firsts, end - taken)
    inputs = (firsts[:, None] + np.arange(taken))[:, None, :]
    inside = np.minimum(inputs + 1, stop) - np.maximum(inputs, start)  # the share of each pixel
    weights = inside * kernel(np.abs(inputs + 0.5 - centres[:, :, None]) / stretch)
    weights /= weights.sum(-1, keepdims=True)
    weights = (np.rint(weights / _WEIGHT_UNIT) * _WEIGHT_UNIT).astype(np.float32)
    return [
        (slice(out, out + block), slice(first, first + taken), weight)
        for out, first, weight in zip(outs.tolist(), firsts.tolist(), weights)
    ]
