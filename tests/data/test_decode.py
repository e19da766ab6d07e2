"""Decoding of every kind of file that people have."""

import io
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from jaxblip.data import decode
from jaxblip.data.decode import decode_image
from jaxblip.data.samples import CONVERSIONS, SKIP_REASONS, BadSample
from photos import jpeg, texture

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


@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (16, 33), (48, 64), (121, 86)])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_plain_jpeg_has_the_pixels_that_pillow_decodes(shape, subsampling, progressive):
    for quality in (30, 85, 97):
        options = dict(quality=quality, subsampling=subsampling, progressive=progressive)
        data = jpeg(texture(*shape), **options)
        pixels, divisor = decode.decode_jpeg(data)
        assert divisor == 1
        np.testing.assert_array_equal(pixels, decode_image(data, LIMIT * 10))
        assert pixels.flags.c_contiguous and pixels.flags.owndata


def test_a_jpeg_without_ycbcr_has_the_pixels_that_pillow_decodes():
    data = jpeg(texture(40, 50), keep_rgb=True)
    assert simplejpeg.decode_jpeg_header(data)[2] == "RGB"
    np.testing.assert_array_equal(decode.decode_jpeg(data)[0], decode_image(data, LIMIT))


@pytest.mark.parametrize(
    ("shrink", "divisor"), [(0.3, 1), (1.9, 1), (2, 2), (3.9, 2), (4, 4), (7.9, 4), (8, 8), (50, 8)]
)
def test_a_jpeg_shrinks_by_powers_of_two_but_never_more_than_asked(shrink, divisor):
    pixels = texture(90, 123)
    for subsampling in ("4:4:4", "4:2:0"):
        small, found = decode.decode_jpeg(jpeg(pixels, subsampling=subsampling), shrink)
        assert found == divisor
        assert small.shape == (-(-90 // divisor), -(-123 // divisor), 3)
    assert decode.decode_jpeg(jpeg(pixels, subsampling="4:2:2"), shrink)[1] == 1


RED = Image.new("RGB", (9, 9), "red")


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


@pytest.mark.parametrize(
    ("data", "is_plain"),
    [
        (jpeg(texture(9, 9)), True),
        (jpeg(texture(9, 9), progressive=True), True),
        (jpeg(texture(9, 9), exif=exif(1)), True),
        (jpeg(texture(9, 9), exif=exif(9)), True),  # no orientation there is
        (jpeg(texture(9, 9), exif=exif(6)), False),
        (jpeg(texture(9, 9)[..., 0]), False),
        (encode(Image.new("CMYK", (9, 9)), "JPEG"), False),
        (encode(RED, "PNG"), False),
        (encode(RED, "WEBP"), False),
        (encode(RED, "MPO", save_all=True, append_images=[RED]), False),
    ],
    ids="JPEG progressive upright unknown turned grey CMYK PNG WEBP MPO".split(),
)
def test_what_is_a_plain_jpeg(data, is_plain):
    assert decode.is_plain_jpeg(decode.open_image(data, LIMIT)) == is_plain


def test_of_a_jpeg_that_pillow_would_not_take_nothing_is_decoded():
    data = jpeg(texture(64, 64))
    for end in range(2, len(data), 7):
        with pytest.raises(ValueError):
            decode.decode_jpeg(data[:end])


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 5}])
def test_the_size_of_a_plain_jpeg_is_known_without_pillow(options):
    data = encode(Image.fromarray(photo()), "JPEG", comment="a comment", **options)
    assert decode.plain_jpeg_size(data) == (30, 40)
    assert decode.is_plain_jpeg(decode.open_image(data, LIMIT))
    # Up to its first pixels it is known; of a part of the header nothing.
    sizes = {decode.plain_jpeg_size(data[:length]) for length in range(len(data))}
    assert sizes == {None, (30, 40)}


def test_what_pillow_is_to_look_at_is_no_plain_jpeg():
    picture = Image.fromarray(photo())
    exif = Image.Exif()
    exif[0x0112] = 6
    for data in (
        encode(picture, "JPEG", exif=exif),
        encode(picture, "JPEG", icc_profile=b"x" * 50),
        encode(picture.convert("L"), "JPEG"),
        encode(picture.convert("CMYK"), "JPEG"),
        encode(picture, "MPO", save_all=True, append_images=[picture]),
        encode(picture, "PNG"),
        b"",
        bytes(range(256)),
        jpeg(photo())[:2] + b"\xff\xff" + jpeg(photo())[2:],
    ):
        assert decode.plain_jpeg_size(data) is None
