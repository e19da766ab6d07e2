"""Pictures that are none, or odd: every one is used or counted by its reason, with its path.

What each conversion makes of the pixels is tested with the decoder.
"""

import io
import struct
import time
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from hostile import encoded, inspected, opened
from jaxblip.data.eval_set import iterate_eval_images
from jaxblip.data.decode import decode_image
from jaxblip.data.pipeline import Part, TrainBatches
from jaxblip.data.preprocess import Preprocess
from jaxblip.data.samples import CONVERSIONS, SKIP_REASONS, BadSample
from jaxblip.errors import RunStopped

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)).resize(
    (40, 30)
)
pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
PREPROCESS = Preprocess(("image", "image_id"), 24, randaugment=True)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, data: bytes, *others: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(others)
    return start + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def zeros(size: int) -> bytes:
    """Zeros compressed, a thousandth of their number."""
    packer = zlib.compressobj()
    return b"".join(packer.compress(b"\0" * (1 << 20)) for _ in range(size >> 20)) + packer.flush()


# A box of the container that HEIC files have.
HEIC = struct.pack(">I", 24) + b"ftypheic" + b"\0\0\0\0mif1heic" + b"\0" * 2000
NO_IMAGES = {
    "HEIC": (HEIC, "corrupt image"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9"/></svg>', "corrupt image"),
    "PDF": (b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj\n", "corrupt image"),
    "HTML": (b"<!DOCTYPE html><html><title>404 Not Found</title></html>", "corrupt image"),
    "a script": (b"#!/bin/sh\nrm -rf x\n", "corrupt image"),
    # Pillow has programs of the machine run for it.
    "PostScript": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "unsupported image",
    ),
    "JSON": (b'{"error": "rate limit"}', "corrupt image"),
    "an empty file": (b"", "zero-size image"),
    "a truncated JPEG": (encoded(PHOTO, "JPEG")[:-100], "truncated image"),
    "the head of a JPEG": (b"\xff\xd8\xff\xe0", "corrupt image"),
    "a gigantic PNG": (png(50_000, 50_000, b""), "gigantic image"),
    "a large PNG": (png(10_000, 11_000, zeros(16 << 20)), "gigantic image"),
    "a bomb in the text of a PNG": (
        png(8, 8, zlib.compress(bytes(200)), chunk(b"zTXt", b"a\0\0" + zeros(64 << 20))), None,
    ),
    "a bomb of more data than pixels": (png(8, 8, zeros(64 << 20)), None),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_IMAGES)
def test_what_is_no_image_has_a_reason(case):
    data, reason = NO_IMAGES[case]
    begin = time.monotonic()
    try:
        pixels = decode_image(data, 1_000_000)
    except BadSample as bad:
        assert bad.reason == reason if reason else bad.reason in SKIP_REASONS
        assert bad.detail.isprintable()
    else:  # the pixels are good, and what belongs to none is not read
        assert reason is None and pixels.shape == (8, 8, 3)
    assert time.monotonic() - begin < 5


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112] = orientation
    return made


FRAMES = dict(save_all=True, append_images=[PHOTO.rotate(180)], duration=100)
WIDE, TALL = PHOTO.resize((10_000, 1)), PHOTO.resize((1, 10_000))
CLEAR = PHOTO.convert("RGBA")
CLEAR.putalpha(PHOTO.convert("L"))
IMAGES = {
    "wide.png": encoded(WIDE), "tall.png": encoded(TALL),
    "wide.jpg": encoded(WIDE, "JPEG"), "tall.jpg": encoded(TALL, "JPEG"),
    "grey.jpg": encoded(PHOTO.convert("L"), "JPEG"), "alpha.png": encoded(CLEAR),
    "alpha.webp": encoded(CLEAR, "WEBP"), "cmyk.jpg": encoded(PHOTO.convert("CMYK"), "JPEG"),
    **{f"turned{n}.jpg": encoded(PHOTO, "JPEG", exif=exif(n)) for n in range(1, 9)},
    "moving.gif": encoded(PHOTO, "GIF", **FRAMES), "moving.webp": encoded(PHOTO, "WEBP", **FRAMES),
    "moving.png": encoded(PHOTO, "PNG", **FRAMES),
    "grey16.png": encoded(Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)),
    "palette.png": encoded(PHOTO.convert("P"), transparency=3),
    "one.png": encoded(PHOTO.convert("1")), "lab.tif": encoded(PHOTO.convert("LAB"), "TIFF"),
    "png.jpg": encoded(PHOTO), "tiff.jpeg": encoded(PHOTO, "TIFF"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    bad = {f"{name}.jpg": data for name, (data, reason) in NO_IMAGES.items() if reason}
    for name, data in {**IMAGES, **bad}.items():
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text(name)
    return folder


REASONS = Counter(reason for _, reason in NO_IMAGES.values() if reason)


def test_training_uses_or_counts_each(folder):
    source = opened(folder)
    assert len(source) == len(IMAGES) + REASONS.total()
    settings = dict(batch_size=8, seed=0, max_bad_share=0.9)
    with TrainBatches([Part(source, PREPROCESS)], **settings) as batches:
        seen = [next(batches) for _ in range(20)]
    assert set(batches.skipped) == set(REASONS)
    used = {int(each) for batch in seen for each in batch["image_id"]}
    assert len(used) == len(IMAGES)
    assert set(batches.converted) == set(CONVERSIONS)
    with TrainBatches([Part(source, PREPROCESS)], batch_size=8, seed=0) as batches:
        with pytest.raises(RunStopped, match=r"; one of them: .* image \(.*, of /.*\.jpg\); fix"):
            for _ in range(50):
                next(batches)


def test_evaluation_uses_or_counts_each(folder):
    for resize in "squash", "shortest_edge":
        found = iterate_eval_images(opened(folder), 24, 1_000_000, 50, resize=resize)
        assert len(found.images) == len(IMAGES) and found.skipped == REASONS
        assert set(found.converted) == set(CONVERSIONS)


def test_inspect_names_one_of_each(folder, capsys):
    status, printed = inspected(folder, capsys, f"--sheet={folder.parent}/sheet.png")
    assert status == 0
    for reason, count in REASONS.items():
        assert f"  {reason}: {count}, such as example " in printed
    assert f"{folder}/an empty file.jpg" in printed


@pytest.mark.parametrize("shape", [(1, 10_000), (10_000, 1)])
def test_ribbons_become_squares(shape):
    """Against the pixels themselves: a ramp along the ribbon stays a ramp."""
    ramp = np.linspace(0, 255, 10_000).astype(np.uint8).reshape(shape)
    pixels = decode_image(encoded(Image.fromarray(np.stack([ramp] * 3, -1))), 1_000_000)
    assert pixels.shape == (*shape, 3)
    arrays = Preprocess(("image",), 24, flip_probability=0)(
        {"image": pixels, "captions": ["a"]}, np.random.default_rng(0), Counter()
    )
    assert arrays["image"].shape == (24, 24, 3)
    # A crop of a shape that is allowed lies in the middle, where the ramp has half its height.
    assert abs(arrays["image"].astype(int) - 127).max() <= 1
    source = io.BytesIO(encoded(Image.fromarray(pixels)))
    assert Image.open(source).size == shape[::-1]
