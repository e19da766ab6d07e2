"""Pictures that stand for photographs."""

import functools
import io

import numpy as np
from PIL import Image, ImageDraw


@functools.cache
def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise with the spectrum of photographs and weak colours, with a few sharp edges across."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf

    def field(steepness):
        spectrum = rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)
        values = np.fft.irfft2(spectrum / frequency**steepness, (height, width))
        return values / max(values.std(), 1e-9)

    grey, warm, green = field(1.25), field(1.6), field(1.6)
    colours = np.stack([warm, green, -warm - green], -1)
    pixels = np.clip(128 + 35 * grey[..., None] + 10 * colours, 20, 235).astype(np.uint8)
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        corners = rng.uniform(0, (width, height), (3, 2)).round().astype(int)
        colour = tuple(rng.integers(40, 216, 3).tolist())
        draw.polygon([tuple(corner) for corner in corners.tolist()], colour)
    return np.asarray(image)


def jpeg(image: np.ndarray | Image.Image, **options) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()
