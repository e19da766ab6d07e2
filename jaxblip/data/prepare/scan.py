"""The first pass: every example is read and checked once, and what the next passes need is noted.

The examples of a source are worked on in blocks. Of block 7 the pass leaves
  scan/000007.jsonl    a line an example: its texts, its bytes, or why it is dropped
  scan/000007.npy      a row each for those that are left: what duplicates are found by
  scan/000007.images   their resized images, one behind the other, where some were resized
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import io
import json
from typing import Any, BinaryIO, NamedTuple

import imagehash
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jaxblip.data.decode import decode_image
from jaxblip.data.prepare.folder import Folder
from jaxblip.data.prepare.settings import Settings, open_part, text_columns
from jaxblip.data.prepare.texts import clean_text, clean_texts
from jaxblip.data.samples import BadSample, Source
from jaxblip.errors import UserError

THUMBNAIL_PX = 16
# Of an example that is left: its number in the source, digests of image and instruction, of the
# instruction alone, the perceptual hash, and the image at 16 x 16.
TRACES = np.dtype([
    ("index", np.int64), ("same", np.uint64, 2), ("asked", np.uint64), ("hash", np.uint64),
    ("thumbnail", np.uint8, THUMBNAIL_PX * THUMBNAIL_PX * 3),
])  # fmt: skip
_HASHED_PX = 128  # of the shorter side; four times what the hash itself looks at


class Block(NamedTuple):
    """`count` rows of one part of the source, from row `first` on.

    Attributes:
      start: number of the first example, counted through all parts.
    """

    number: int
    part: int
    first: int
    count: int
    start: int

    @property
    def name(self) -> str:
        return f"{self.number:06}"


class Job(NamedTuple):
    """What the workers of all passes get. Lists that grow with the source stay in files.

    Attributes:
      folder: where the data set is written.
      columns: of the instruction, or None, and of the texts.
      run: a name that no other run has, for what processes remember.
    """

    settings: Settings
    folder: Folder
    run: str
    columns: tuple[str | None, str] = (None, "")

    @property
    def work(self) -> Folder:
        """Where what is between the passes stands."""
        return self.folder / f".prepare-{self.settings.split}"

    @property
    def parts(self) -> list[str]:
        """The files of the source."""
        return _parts(self.work, self.run)

    @property
    def blocks(self) -> list[Block]:
        return _blocks(self.work, self.run)

    def block_of(self, index: int) -> int:
        """Number of the block that has this example."""
        return bisect.bisect_right(self.blocks, index, key=lambda block: block.start) - 1


@functools.lru_cache(maxsize=1)
def _parts(work: Folder, run: str) -> list[str]:
    return work.read_json("parts.json")


@functools.lru_cache(maxsize=1)
def _blocks(work: Folder, run: str) -> list[Block]:
    return [Block(*block) for block in work.read_json("blocks.json")]


def count_part(number: int, job: Job) -> None:
    """Opens a part and notes how many examples it has, and in which columns."""
    source = _source(number, job)
    found = {
        "examples": len(source),
        "columns": text_columns(source),
        "problems": list(getattr(source, "problems", ())),
    }
    (job.work / "parts").write_json(f"{number:06}.json", found)


def scan_block(number: int, job: Job) -> None:
    """Reads and checks the examples of a block."""
    block = job.blocks[number]
    folder = job.work / "scan"
    if job.settings.resize:
        with folder.new(f"{block.name}.images") as path, open(path, "wb") as images:
            lines, traces = _scan_rows(block, job, images)
    else:
        lines, traces = _scan_rows(block, job)
    folder.write_array(f"{block.name}.npy", np.array(traces, TRACES))
    # The last one: where it stands, the block is done. Half surrogates may come from broken names.
    folder.write(f"{block.name}.jsonl", "\n".join(lines).encode("utf-8", "backslashreplace"))


def read_lines(number: int, job: Job) -> list[dict[str, Any]]:
    """What `scan_block` wrote of each example."""
    content = (job.work / "scan").read(f"{job.blocks[number].name}.jsonl").decode()
    return [json.loads(line) for line in content.split("\n")]


def read_traces(number: int, job: Job) -> np.ndarray:
    """What duplicates are found by: rows of `TRACES`, of the examples that are left."""
    return (job.work / "scan").read_array(f"{job.blocks[number].name}.npy")


def read_image(line: dict[str, Any], number: int, job: Job) -> bytes:
    """The encoded image of an example of a block, as it is to be written.

    Raises:
      UserError: it is no longer what it was when it was checked.
    """
    block = job.blocks[number]
    if "at" in line:
        return (job.work / "scan").read(f"{block.name}.images", line["at"], line["bytes"])
    try:
        row = block.first + line["index"] - block.start
        encoded = _encoded(_source(block.part, job)[row]["image"])
    except BadSample as bad:
        encoded, why = b"", f"{bad.reason}: {bad.detail}"
    else:
        why = "it has other bytes"
    if _digest(encoded).hex() != line["digest"]:
        raise UserError(
            f"example {line['index']} of {job.settings.source} has changed since it was checked "
            f"({why}): remove what was written and start again."
        )
    return encoded


def _source(part: int, job: Job) -> Source:
    return _opened(job.settings, job.parts[part], job.parts[0])


# A worker goes through the blocks of a part one after the other.
_opened = functools.lru_cache(maxsize=1)(open_part)


def _scan_rows(block: Block, job: Job, images: BinaryIO | None = None) -> tuple[list, list]:
    """A line for each example of a block, and the traces of those that are left."""
    source = _source(block.part, job)
    lines, traces = [], []
    for offset in range(block.count):
        index = block.start + offset
        try:
            line, trace, resized = _scan(source, block.first + offset, job)
        except BadSample as bad:
            line = {"dropped": bad.reason, "detail": bad.detail}
        else:
            traces.append((index, *trace))
            if resized is not None:
                line["at"] = images.tell()
                images.write(resized)
        lines.append(json.dumps({"index": index} | line, ensure_ascii=False))
    return lines, traces


def _scan(source: Source, row: int, job: Job) -> tuple[dict[str, Any], tuple, bytes | None]:
    """The line and the traces of an example, and its image where that was resized."""
    settings = job.settings
    example = source[row]
    encoded = _encoded(example["image"])
    line = {"id": example["image_id"], **_texts(example, job)}
    pixels = decode_image(encoded, settings.max_pixels)
    _check_size(pixels, settings)
    image = Image.fromarray(pixels)
    digest = _digest(encoded)
    asked = hashlib.blake2b(line.get("asked", "").encode(), digest_size=8).digest()
    trace = np.frombuffer(_digest(digest + asked), np.uint64), np.frombuffer(asked, np.uint64)[0]
    trace += looks(image) if settings.duplicates == "near" else (0, 0)
    line["digest"] = digest.hex()
    resized = None
    if settings.resize and min(image.size) > settings.resize:
        resized = _resize(image, settings)
    line["bytes"] = len(encoded if resized is None else resized)
    return line, trace, resized


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def looks(image: Image.Image) -> tuple[int, UInt8[np.ndarray, "768"]]:
    """The perceptual hash of an image in 64 bits, and its thumbnail, flat.

    The hash is `imagehash.phash`: signs of the lowest frequencies of the grey image.
    """
    shrink = min(image.size) // _HASHED_PX
    if shrink > 1:  # the mean of whole pixels: three times as fast as from the full size
        image = image.reduce(shrink)
    bits = np.packbits(imagehash.phash(image).hash)
    size = (THUMBNAIL_PX, THUMBNAIL_PX)
    thumbnail = np.asarray(image.resize(size, Image.Resampling.BOX))
    return int.from_bytes(bits.tobytes(), "big"), thumbnail.reshape(-1)


def _texts(example: dict[str, Any], job: Job) -> dict[str, Any]:
    """`texts`, and `asked` where the data set has instructions."""
    settings, (asked, column) = job.settings, job.columns
    lines = asked == "instruction"
    if ("instruction" in example) != (asked is not None):
        raise BadSample("bad row", f"the first example has {asked or column}, and it is another")
    found = {}
    if asked:
        found["asked"] = clean_text(example["instruction"], lines)
        if not found["asked"]:
            raise BadSample("empty instruction")
    captions = example["captions"]
    found["texts"] = clean_texts(captions, settings.min_chars, settings.max_chars, lines)
    return found


def _check_size(pixels: np.ndarray, settings: Settings) -> None:
    height, width = pixels.shape[:2]
    if min(height, width) < settings.min_side:
        raise BadSample("small image", f"{width} x {height} pixels")
    if max(height, width) > settings.max_aspect * min(height, width):
        raise BadSample("narrow image", f"{width} x {height} pixels")


def _encoded(image: bytes | np.ndarray) -> bytes:
    if isinstance(image, bytes):
        return image
    buffer = io.BytesIO()  # drawn by a procedural source
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _resize(image: Image.Image, settings: Settings) -> bytes:
    scale = settings.resize / min(image.size)
    size = tuple(max(settings.resize, round(side * scale)) for side in image.size)
    buffer = io.BytesIO()
    image = image.resize(size, Image.Resampling.BICUBIC)
    image.save(buffer, "JPEG", quality=settings.jpeg_quality)
    return buffer.getvalue()
