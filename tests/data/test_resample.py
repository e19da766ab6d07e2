"""The resampler against Pillow's, whose filters it has."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from jaxblip.data import resample as module
from jaxblip.data.resample import resample
from photos import texture

FILTERS = ("bicubic", "bilinear", "lanczos")
# The second one is for edges through pixels, and for machines without the first one.
both_ways = pytest.mark.parametrize("way", ["simd", "products"], indirect=True)


@pytest.fixture
def way(request, monkeypatch):
    if request.param == "products":
        monkeypatch.setattr(module, "simd", None)
    else:
        pytest.importorskip("cykooz_resizer")
        monkeypatch.delattr(module, "_by_products")


def pillow(pixels, box, size_px, interpolation="bicubic"):
    left, top, right, bottom = box
    crop = Image.fromarray(pixels[top:bottom, left:right])
    return np.asarray(crop.resize((size_px, size_px), Image.Resampling[interpolation.upper()]))


@both_ways
@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("size_px", [1, 5, 8, 24, 37, 224])
def test_like_pillow_at_any_size(size_px, interpolation, way):
    rng = np.random.default_rng(size_px)
    for height, width in ((1, 1), (3, 50), (37, 37), (90, 71), (240, 320)):
        pixels = texture(height, width, seed=height)
        left, top = int(rng.integers(width)), int(rng.integers(height))
        right, bottom = int(rng.integers(left, width)) + 1, int(rng.integers(top, height)) + 1
        for box in ((0, 0, width, height), (left, top, right, bottom)):
            ours = resample(pixels, box, size_px, interpolation).astype(int)
            difference = abs(ours - pillow(pixels, box, size_px, interpolation))
            assert difference.mean() <= 0.4 or size_px == 1
            assert difference.max() <= 2


@both_ways
def test_hard_edges_at_the_ends_of_the_range(way):
    """Where the first pass goes beyond 0 and 255, which Pillow cuts off and products do not."""
    pixels = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (300, 300, 1))
    pixels = np.kron(pixels[:30, :30], np.ones((10, 10, 3), np.uint8))
    difference = abs(resample(pixels, (0, 0, 300, 300), 128).astype(int)
                     - pillow(pixels, (0, 0, 300, 300), 128))
    assert difference.mean() < 1


@pytest.mark.parametrize("interpolation", FILTERS)
def test_edges_through_pixels(interpolation):
    """Pillow looks beyond the edges, so that only the inner pixels are the same."""
    pixels, box = texture(90, 120), (10.25, 7.5, 101.75, 80.25)
    image = Image.fromarray(pixels)
    expected = image.resize((30, 30), Image.Resampling[interpolation.upper()], box=box)
    difference = abs(resample(pixels, box, 30, interpolation).astype(int) - np.asarray(expected))
    inner = difference[4:-4, 4:-4]
    assert inner.mean() <= 0.4 and inner.max() <= 2


@both_ways
def test_nothing_beyond_the_edges_is_looked_at(way):
    pixels, box = texture(60, 80), (11, 7, 51, 47)
    around = 255 - pixels
    around[7:47, 11:51] = pixels[7:47, 11:51]
    np.testing.assert_array_equal(resample(pixels, box, 16), resample(around, box, 16))


def test_what_is_beyond_an_edge_through_a_pixel_has_little_weight():
    pixels = texture(60, 80)
    around = 255 - pixels
    around[7:47, 11:51] = pixels[7:47, 11:51]
    # An eighth of a pixel counts an eighth: with the rest of it outside it has little weight.
    box = (11.875, 7.875, 50.125, 46.125)
    np.testing.assert_array_equal(resample(pixels, box, 16), resample(around, box, 16))
    grey = np.full_like(pixels, 100)
    grey[:8], grey[46:], grey[:, :12], grey[:, 50:] = 255, 255, 255, 255
    assert resample(grey, box, 8).max() < 115


@both_ways
def test_the_same_size_changes_nothing(way):
    pixels = texture(50, 60)
    np.testing.assert_array_equal(resample(pixels, (9, 4, 49, 44), 40), pixels[4:44, 9:49])


def test_one_colour_stays_it():
    for value in (0, 1, 127, 255):
        pixels = np.full((70, 90, 3), value, np.uint8)
        assert (resample(pixels, (0.5, 0.25, 89, 70), 24) == value).all()


@pytest.mark.parametrize("left", [3, 3.5])
def test_mirrored(left):
    pixels, box = texture(50, 60), (left, 4, 50, 47)
    mirror, plain = resample(pixels, box, 24, mirrored=True), resample(pixels, box, 24)
    np.testing.assert_array_equal(mirror, plain[:, ::-1])
    for pixels in (mirror, plain):
        assert pixels.flags.c_contiguous and pixels.flags.writeable


@pytest.mark.parametrize("interpolation", FILTERS)
def test_one_way_is_like_the_other(interpolation, monkeypatch):
    """With whole numbers, as ints or not."""
    pytest.importorskip("cykooz_resizer")
    pixels = texture(240, 320)
    for box in ((0, 0, 320, 240), (7, 21, 290, 200)):
        simd = resample(pixels, box, 96, interpolation)
        floats = resample(pixels, tuple(map(float, box)), 96, interpolation)
        np.testing.assert_array_equal(simd, floats)
        with monkeypatch.context() as patch:
            patch.setattr(module, "simd", None)
            products = resample(pixels, box, 96, interpolation)
        difference = abs(simd.astype(int) - products)
        assert difference.mean() < 0.1 and difference.max() <= 1


@pytest.mark.parametrize("interpolation", FILTERS)
def test_no_instructions_of_the_processor_change_a_pixel(interpolation, monkeypatch):
    simd = pytest.importorskip("cykooz_resizer")
    rng, plain = np.random.default_rng(0), simd.Resizer()
    plain.cpu_extensions = simd.CpuExtensions.none
    for number in range(20):
        height, width = rng.integers(1, 300, 2).tolist()
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        box, size_px = (0, 0, width, height), int(rng.integers(1, 120))
        fast = resample(pixels, box, size_px, interpolation)
        with monkeypatch.context() as patch:
            patch.setattr(module._of_thread, "resizer", plain)
            slow = resample(pixels, box, size_px, interpolation)
        np.testing.assert_array_equal(fast, slow)


def test_threads_do_not_write_into_each_others_results():
    pixels = [texture(200, 260, seed) for seed in range(4)]
    expected = [resample(each, (3, 5, 250, 190), 64) for each in pixels]
    with ThreadPoolExecutor(8) as threads:
        found = threads.map(lambda number: resample(pixels[number % 4], (3, 5, 250, 190), 64),
                            range(200))  # fmt: skip
        for number, result in enumerate(found):
            np.testing.assert_array_equal(result, expected[number % 4])


@pytest.mark.parametrize("interpolation", FILTERS)
def test_every_sum_is_exact(interpolation):
    """The pixels are those of exact arithmetic, so that no order of additions can change them."""
    pixels, box, size_px = texture(301, 402), (3.5, 2.25, 400, 300), 61

    def matrix(start, stop, length):
        dense = np.zeros((size_px, length))
        for out, taken, weights in module._band(start, stop, size_px, interpolation):
            dense[out] = 0
            dense[out, taken] = weights
            np.testing.assert_array_equal(weights * 2**14, np.rint(weights * 2**14))
        return dense

    rows, columns = matrix(0.25, 298, 298), matrix(0.5, 397, 397)
    largest = 255 * np.prod([abs(weights).sum(-1).max() for weights in (rows, columns)])
    assert largest < 2 ** (24 - 14)
    short = np.rint(np.einsum("oh,hwc->owc", rows, pixels[2:300, 3:400].astype(float)))
    small = np.rint(np.einsum("ow,hwc->hoc", columns, short)).clip(0, 255)
    np.testing.assert_array_equal(resample(pixels, box, size_px, interpolation), small)
