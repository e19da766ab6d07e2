"""Images as squares, and the augmentations against references."""

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from jaxblip.data import images
from jaxblip.data.choices import INTERPOLATIONS
from jaxblip.data.decode import decode_image
from jaxblip.data.samples import BadSample
from photos import jpeg, texture


LIMIT = 2_000_000


def photo(height=30, width=40, seed=0) -> np.ndarray:
    """Smooth noise, so that JPEG keeps it about."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


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


def old_view(image, rng, size_px, conversions, interpolation="bicubic"):
    """Pillow alone, step by step, which `random_view` is to be like."""
    if isinstance(image, bytes):
        image = decode_image(image, LIMIT, conversions)
    args = ((0.5, 1.0), (3 / 4, 4 / 3), interpolation)
    return images.random_flip(images.random_resized_crop(image, rng, size_px, *args), rng, 0.5)


def both_views(image, size_px, seed=0, interpolation="bicubic"):
    """What `random_view` and Pillow make of an image, having checked that they draw the same."""
    results = []
    for make in (images.random_view, old_view):
        rng, conversions = np.random.default_rng(seed), Counter()
        if make is old_view:
            pixels = old_view(image, rng, size_px, conversions, interpolation)
        else:
            pixels = images.random_view(
                image, rng, size_px, interpolation=interpolation, max_pixels=LIMIT,
                conversions=conversions,
            )  # fmt: skip
        results.append((pixels, conversions, rng.random()))
    (ours, *our_rest), (theirs, *their_rest) = results
    assert our_rest == their_rest
    assert ours.shape == theirs.shape and ours.dtype == np.uint8
    return ours, theirs


def assert_close(ours, theirs):
    """Within 1/255 on average and 2/255 for 99.9 % of the values."""
    difference = abs(ours.astype(int) - theirs)
    assert difference.mean() <= 1 and np.quantile(difference, 0.999) <= 2


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize(
    ("shape", "size_px"), [((24, 40), 32), ((160, 213), 48), ((480, 640), 224), ((700, 900), 48)]
)
def test_a_view_of_a_jpeg_is_like_pillows(shape, size_px, subsampling, interpolation):
    for seed in range(2):
        data = jpeg(
            texture(*shape, seed), quality=80, subsampling=subsampling, progressive=seed % 2 == 0
        )
        ours, theirs = both_views(data, size_px, seed, interpolation)
        assert_close(ours, theirs)
        again = images.random_view(
            data, np.random.default_rng(seed), size_px, interpolation=interpolation
        )
        np.testing.assert_array_equal(ours, again)


def test_a_large_jpeg_is_decoded_at_half_a_quarter_or_an_eighth(monkeypatch):
    divisors = set()

    def decode_jpeg(*args):
        pixels, divisor = images_decode_jpeg(*args)
        divisors.add(divisor)
        return pixels, divisor

    images_decode_jpeg = images.decode_jpeg
    monkeypatch.setattr(images, "decode_jpeg", decode_jpeg)
    data = jpeg(texture(1100, 1300), quality=85)
    for size_px in (400, 192, 96, 48, 32):
        for seed in range(2):
            assert_close(*both_views(data, size_px, seed))
    assert divisors == {1, 2, 4, 8}


@pytest.mark.parametrize(
    "image",
    [
        texture(50, 60),
        texture(50, 60)[..., 0],
        "PNG",
        "WEBP",
        Image.new("CMYK", (60, 50), (10, 200, 30, 40)),
        6,
    ],
    ids=["array", "grey JPEG", "PNG", "WEBP", "CMYK JPEG", "turned JPEG"],
)
def test_a_view_of_anything_else_is_pillows_exactly(image):
    if isinstance(image, str):
        file = io.BytesIO()
        Image.fromarray(texture(50, 60)).save(file, image, lossless=True)
        image = file.getvalue()
    elif isinstance(image, int):
        exif = Image.Exif()
        exif[0x0112] = image
        image = jpeg(texture(50, 60), exif=exif)
    elif isinstance(image, Image.Image) or image.ndim == 2:
        image = jpeg(image)
    for seed in range(3):
        ours, theirs = both_views(image, 32, seed)
        np.testing.assert_array_equal(ours, theirs)


def test_what_is_wrong_with_a_damaged_jpeg_is_what_pillow_says():
    """Cut off or overwritten anywhere: the same pixels, or the same reason and nothing drawn."""
    rng = np.random.default_rng(0)
    seen = Counter()
    for number in range(300):
        data = jpeg(texture(40, 56, number % 5), progressive=number % 2 == 0)
        if number % 3 == 0:
            data = data[: rng.integers(len(data))]
        else:
            broken = np.frombuffer(data, np.uint8).copy()
            broken[rng.integers(len(broken), size=4)] = rng.integers(256, size=4)
            data = broken.tobytes()
        try:
            expected = old_view(data, np.random.default_rng(number), 24, Counter())
        except BadSample as bad:
            seen[bad.reason] += 1
            ours = np.random.default_rng(number)
            with pytest.raises(BadSample) as caught:
                images.random_view(data, ours, 24, max_pixels=LIMIT)
            assert (caught.value.reason, caught.value.detail) == (bad.reason, bad.detail)
            assert ours.random() == np.random.default_rng(number).random()
        else:
            seen["good"] += 1
            ours = images.random_view(data, np.random.default_rng(number), 24, max_pixels=LIMIT)
            assert abs(ours.astype(int) - expected).mean() <= 1
    assert min(seen[reason] for reason in ("good", "truncated image", "corrupt image")) > 20


def test_views_may_be_opened_first_and_made_later_in_any_order(monkeypatch):
    """A plain JPEG, one that only Pillow decodes, another format, and pixels."""

    def decode_jpeg(data, *args):
        if data is odd:
            raise ValueError
        return images_decode_jpeg(data, *args)

    images_decode_jpeg = images.decode_jpeg
    monkeypatch.setattr(images, "decode_jpeg", decode_jpeg)
    plain, odd = jpeg(texture(60, 80), quality=90), jpeg(texture(60, 80), quality=70)
    png = io.BytesIO()
    Image.fromarray(texture(60, 80)).save(png, "PNG")
    sources = [plain, odd, png.getvalue(), texture(60, 80)]
    for seed in range(4):
        rngs = [np.random.default_rng(seed) for _ in sources]
        views = [images.open_view(*each, 24) for each in zip(sources, rngs, strict=True)]
        made = [view() for view in views[::-1]][::-1]
        for source, rng, pixels in zip(sources, rngs, made, strict=True):
            again = np.random.default_rng(seed)
            np.testing.assert_array_equal(pixels, images.random_view(source, again, 24))
            assert rng.random() == again.random()


def test_a_gigantic_jpeg_is_refused_by_its_header():
    with pytest.raises(BadSample) as caught:
        images.random_view(jpeg(texture(50, 60)), np.random.default_rng(0), 24, max_pixels=2999)
    assert caught.value.reason == "gigantic image"


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
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


@pytest.mark.parametrize("aspect", [(1, 1), (3 / 4, 4 / 3)])
def test_nothing_is_drawn_of_a_crop_of_the_whole_area(aspect):
    """Also where rounding would leave room for several: of 17 x 16 a square has two places."""
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    boxes = {images.crop_box(17, 16, rng, (1.0, 1.0), aspect) for _ in range(20)}
    assert boxes == {(0, 0, 16, 16) if aspect == (1, 1) else (0, 0, 16, 17)}
    assert rng.bit_generator.state == before


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
