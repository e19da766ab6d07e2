"""Decoding of every kind of file that people have, and the augmentations against references."""

import io
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from jaxblip.data import images
from jaxblip.data.images import decode_image
from jaxblip.data.samples import CONVERSIONS, SKIP_REASONS, BadSample

LIMIT = 10_000


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(height=30, width=40, seed=0) -> np.ndarray:
    """Smooth noise, so that JPEG keeps it about."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def decoded(data: bytes) -> tuple[np.ndarray, dict]:
    conversions = Counter()
    pixels = decode_image(data, LIMIT, conversions)
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    assert set(conversions) <= set(CONVERSIONS)
    return pixels, dict(conversions)


def png(width, height, bits, colour_type, rows: bytes) -> bytes:
    """A PNG written by hand, for what Pillow does not write."""
    def chunk(kind, body):
        return (struct.pack(">I", len(body)) + kind + body
                + struct.pack(">I", zlib.crc32(kind + body)))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def test_plain_rgb_comes_back_as_it_is():
    pixels, conversions = decoded(encode(Image.fromarray(photo())))
    np.testing.assert_array_equal(pixels, photo())
    assert conversions == {}
    assert abs(decoded(encode(Image.fromarray(photo()), "JPEG", quality=95))[0].astype(int)
               - photo()).mean() < 4


def test_cmyk():
    cmyk = np.zeros((8, 8, 4), np.uint8)
    cmyk[..., 1] = cmyk[..., 2] = 255  # magenta and yellow make red
    pixels, conversions = decoded(
        encode(Image.frombytes("CMYK", (8, 8), cmyk.tobytes()), "JPEG", quality=100)
    )
    assert abs(pixels.astype(int) - (255, 0, 0)).max() <= 3
    assert conversions == {"converted CMYK": 1}


def test_16_bit_grey_keeps_its_range():
    values = np.array([[0, 257, 51400, 65535]], np.uint16)
    pixels, conversions = decoded(encode(Image.fromarray(values)))
    np.testing.assert_array_equal(pixels[0, :, 0], [0, 1, 200, 255])
    assert (pixels == pixels[..., :1]).all()
    assert conversions == {"converted 16-bit": 1}


def test_16_bit_rgb():
    rows = b"\0" + np.array([[65535, 0, 32768], [256, 512, 1024]], ">u2").tobytes()
    pixels, conversions = decoded(png(2, 1, 16, 2, rows))
    np.testing.assert_array_equal(pixels[0], [[255, 0, 128], [1, 2, 4]])
    assert conversions == {"converted 16-bit": 1}


def test_palette_with_and_without_transparency():
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    pixels, conversions = decoded(encode(palette))
    assert (pixels == (10, 200, 30)).all()
    assert conversions == {"converted palette": 1}
    pixels, conversions = decoded(encode(palette, transparency=1))
    assert (pixels == 255).all()
    assert conversions == {"converted palette": 1, "converted alpha": 1}


def test_alpha_lies_on_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0] = 200
    rgba[0, :, 3] = (255, 128, 0)
    pixels, conversions = decoded(encode(Image.fromarray(rgba)))
    expected = np.round(255 + (np.array([200, 0, 0]) - 255) * rgba[0, :, 3:] / 255)
    assert abs(pixels[0] - expected).max() <= 1
    assert conversions == {"converted alpha": 1}


def test_rgb_with_a_transparent_colour():
    image = Image.fromarray(np.array([[[9, 9, 9], [1, 2, 3]]], np.uint8))
    pixels, conversions = decoded(encode(image, transparency=(9, 9, 9)))
    np.testing.assert_array_equal(pixels[0], [[255, 255, 255], [1, 2, 3]])
    assert conversions == {"converted alpha": 1}


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey(mode):
    pixels, conversions = decoded(encode(Image.new(mode, (3, 2), 255)))
    assert pixels.shape == (2, 3, 3) and (pixels == 255).all()
    assert conversions == {"converted grayscale": 1}


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame(kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    pixels, conversions = decoded(
        encode(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    )
    assert (pixels == (255, 0, 0)).all()
    assert conversions["first frame of animation"] == 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda a: np.rot90(a)),
    ],
)
def test_exif_orientation(kind, orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels, conversions = decoded(encode(Image.fromarray(photo()), kind, exif=exif))
    plain, _ = decoded(encode(Image.fromarray(photo()), kind))
    np.testing.assert_array_equal(pixels, upright(plain))
    assert conversions == ({} if orientation == 1 else {"rotated by EXIF": 1})


@pytest.mark.parametrize(
    ("image", "conversion"),
    [
        (Image.fromarray(photo()).convert("L"), "converted grayscale"),
        (Image.fromarray(photo()).convert("RGBA"), "converted alpha"),
        (Image.fromarray(photo()[..., 0].astype(np.uint16) * 257), "converted 16-bit"),
    ],
    ids=["grey", "alpha", "16-bit"],
)
def test_exif_orientation_of_an_image_that_is_converted_too(image, conversion):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels, conversions = decoded(encode(image, exif=exif))
    np.testing.assert_array_equal(pixels, np.rot90(decoded(encode(image))[0], -1))
    assert conversions == {"rotated by EXIF": 1, conversion: 1}


def _truncated(kind):
    data = encode(Image.fromarray(photo(90, 90)), kind)
    return data[: len(data) * 2 // 3]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "zero-size image"),
        (b"no image at all", "corrupt image"),
        (encode(Image.fromarray(photo()))[:20], "corrupt image"),
        (_truncated("JPEG"), "truncated image"),
        (_truncated("PNG"), "truncated image"),
        (png(0, 5, 8, 2, b""), "corrupt image"),  # Pillow does not open such a file
        (encode(Image.new("RGB", (101, 100))), "gigantic image"),
        (png(60_000, 60_000, 8, 2, b""), "gigantic image"),  # beyond Pillow's own limit
        (png(2, 2, 8, 2, b"\0" * 3), "truncated image"),
        (encode(Image.new("F", (4, 4)), "TIFF"), "unsupported image"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)}_bytes",
)
def test_what_cannot_be_used_has_a_reason(data, reason):
    with pytest.raises(BadSample) as caught:
        decode_image(data, LIMIT)
    assert caught.value.reason == reason
    assert reason in SKIP_REASONS


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about broken TIFF tags
def test_no_bytes_at_all_raise_anything_else():
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"):
        data = encode(Image.fromarray(photo()), kind)
        for _ in range(60):
            broken = np.frombuffer(data, np.uint8).copy()
            broken[rng.integers(len(broken), size=8)] = rng.integers(256, size=8)
            try:
                decode_image(broken.tobytes(), LIMIT)
            except BadSample as bad:
                assert bad.reason in SKIP_REASONS


def test_eval_resize_is_pillows_bicubic_and_ignores_the_aspect():
    expected = Image.fromarray(photo()).resize((24, 24), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(images.resize_square(photo(), 24), np.asarray(expected))
    square = photo(24, 24)
    np.testing.assert_array_equal(images.resize_square(square, 24), square)


def test_eval_resize_is_antialiased():
    """Against torch's own implementation, which is not Pillow's."""
    torch = pytest.importorskip("torch")
    pixels = photo(90, 70)
    expected = torch.nn.functional.interpolate(
        torch.tensor(pixels.copy()).permute(2, 0, 1)[None].float(),
        (24, 24), mode="bicubic", antialias=True, align_corners=False,
    )[0].permute(1, 2, 0).numpy()  # fmt: skip
    assert abs(images.resize_square(pixels, 24) - expected.clip(0, 255)).max() <= 1.5


@pytest.mark.parametrize(
    ("shape", "kept"),
    [((60, 24), (18, 42, 0, 24)), ((24, 61), (0, 24, 18, 42)), ((24, 24), (0, 24, 0, 24))],
)
def test_the_shortest_edge_keeps_the_aspect_and_the_centre(shape, kept):
    pixels, (top, bottom, left, right) = photo(*shape), kept
    cut = images.resize_square(pixels, 24, "shortest_edge")  # its shorter side is that long already
    np.testing.assert_array_equal(cut, pixels[top:bottom, left:right])


def test_of_a_ribbon_only_the_middle_is_resized():
    """All of it would take 13 GB."""
    ribbon = np.zeros((1, 8_000_000, 3), np.uint8)
    ribbon[:, 3_999_950:4_000_050] = middle = photo(1, 100)
    cut = images.resize_square(ribbon, 24, "shortest_edge")
    expected = images.resize_square(middle, 24, "shortest_edge")
    np.testing.assert_array_equal(cut, expected)


@pytest.mark.parametrize("interpolation", images.INTERPOLATIONS)
def test_random_crop_is_crop_then_resize(interpolation):
    pixels, scale, aspect = photo(60, 80), (0.5, 1.0), (3 / 4, 4 / 3)
    for seed in range(5):
        rng, again = np.random.default_rng(seed), np.random.default_rng(seed)
        out = images.random_resized_crop(pixels, rng, 24, scale, aspect, interpolation)
        crop = Image.fromarray(pixels).crop(images.crop_box(60, 80, again, scale, aspect))
        expected = crop.resize((24, 24), Image.Resampling[interpolation.upper()])
        np.testing.assert_array_equal(out, np.asarray(expected))


def test_crop_area_and_aspect_follow_their_distributions():
    rng = np.random.default_rng(0)
    boxes = np.array([
        images.crop_box(1000, 1000, rng, (0.2, 0.5), (3 / 4, 4 / 3)) for _ in range(4000)
    ])
    assert (boxes >= 0).all() and (boxes <= 1000).all()
    widths, heights = (boxes[:, 2:] - boxes[:, :2]).T
    # At most half of the image: every draw fits, so nothing is rejected.
    quantiles = np.linspace(0.05, 0.95, 10)
    areas = np.quantile(widths * heights / 1e6, quantiles)
    np.testing.assert_allclose(areas, 0.2 + 0.3 * quantiles, atol=0.01)
    log_aspects = np.quantile(np.log(widths / heights), quantiles)
    np.testing.assert_allclose(log_aspects, np.log(4 / 3) * (2 * quantiles - 1), atol=0.02)
    free = boxes[:, 0] / (1000 - widths)
    np.testing.assert_allclose(np.quantile(free, quantiles), quantiles, atol=0.03)


def test_whole_image_where_scale_and_aspect_are_one():
    square = photo(24, 24)
    out = images.random_resized_crop(square, np.random.default_rng(0), 24, (1, 1), (1, 1))
    np.testing.assert_array_equal(out, square)


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (10, 1000, (493, 0, 506, 10)),  # too wide for ten tries: 4/3 of the height, in the middle
        (1000, 10, (0, 493, 10, 506)),
    ],
)
def test_crop_falls_back_to_the_centre(height, width, box):
    rng = np.random.default_rng(0)
    assert images.crop_box(height, width, rng, (0.9, 1.0), (3 / 4, 4 / 3)) == box


def test_flip():
    rng = np.random.default_rng(0)
    pixels = photo()
    flips = 0
    for _ in range(1000):
        out = images.random_flip(pixels, rng, 0.3)
        if np.array_equal(out, pixels[:, ::-1]):
            flips += 1
        else:
            np.testing.assert_array_equal(out, pixels)
    assert 250 < flips < 350
    np.testing.assert_array_equal(images.random_flip(pixels, rng, 0.0), pixels)


def test_randaugment_leaves_as_many_alone_as_the_odds_say():
    """An operation does nothing if not applied (1/2) or if it is one of three that change nothing
    at magnitude 5: identity, brightness and sharpness at factor 1."""
    rng = np.random.default_rng(0)
    pixels = np.random.default_rng(1).integers(60, 200, (24, 24, 3), np.uint8)
    same = np.mean([
        np.array_equal(images.randaugment(pixels, rng), pixels) for _ in range(3000)
    ])
    assert same == pytest.approx((0.5 + 0.5 * 3 / 10) ** 2, abs=0.03)


def apply(name, sign, pixels):
    return np.asarray(images.RANDAUGMENT_OPS[name](Image.fromarray(pixels), sign))


def test_randaugment_magnitudes():
    pixels = photo(64, 64)
    for name in ("identity", "brightness", "sharpness"):
        np.testing.assert_array_equal(apply(name, 1, pixels), pixels)
    # 5 pixels: half of the ten that the largest magnitude means.
    shifted = apply("translate_x", 1, pixels)
    np.testing.assert_array_equal(shifted[:, 5:], pixels[:, :-5])
    assert (shifted[:, :5] == 128).all()
    np.testing.assert_array_equal(apply("translate_x", -1, pixels)[:, :-5], pixels[:, 5:])
    np.testing.assert_array_equal(apply("translate_y", 1, pixels)[5:], pixels[:-5])
    # A vertical line leans by 0.15 of the height; a rotated one by 15 degrees.
    line = np.zeros((101, 101, 3), np.uint8)
    line[:, 50] = 255
    column = apply("shear_x", 1, line)[..., 0].astype(float)
    column[column == 128] = 0
    places = column.argmax(1)
    assert (places[90] - places[10]) / 80 == pytest.approx(0.15, abs=0.02)
    rows = apply("shear_y", 1, line.transpose(1, 0, 2))[..., 0].astype(float)
    rows[rows == 128] = 0
    assert (rows.argmax(0)[90] - rows.argmax(0)[10]) / 80 == pytest.approx(0.15, abs=0.02)
    turned = apply("rotate", 1, line)[..., 0].astype(float)
    turned[turned == 128] = 0
    slope = (turned[75].argmax() - turned[25].argmax()) / 50
    assert abs(slope) == pytest.approx(np.tan(np.deg2rad(15)), abs=0.03)
    stretched = apply("autocontrast", 1, np.clip(pixels, 60, 180))
    assert stretched.min() == 0 and stretched.max() == 255
    assert len(images.RANDAUGMENT_OPS) == 10
