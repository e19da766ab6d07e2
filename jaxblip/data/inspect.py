"""What is in a source, and what is wrong with it: the verb `jaxblip data inspect`."""

from __future__ import annotations

import io
import os
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from jaxblip.data.decode import decode_image
from jaxblip.data.images import resize_square
from jaxblip.data.samples import BadSample, Source, counts_as_text
from jaxblip.data.storage import shown
from jaxblip.data.text import clean_caption
from jaxblip.errors import UserError

_PERCENTILES = (0, 5, 50, 95, 100)
_EXAMPLES = 10
_TILE_PX, _CAPTION_PX, _COLUMNS, _ROWS = 160, 44, 8, 5


def inspect_source(
    source: Source,
    *,
    sheet: str | os.PathLike = "",
    max_images: int = 1000,
    max_pixels: int = 100_000_000,
) -> list[str]:
    """Reads all texts of a source and some of its images.

    Args:
      sheet: a PNG to write with pictures from all over the source; "" for none.
      max_images: so many images are read, evenly spaced.
      max_pixels: an image with more is a problem.

    Returns:
      Lines that describe it: counts, ten examples, percentiles of lengths and sizes, problems.

    Raises:
      UserError: `max_images` is negative, or `sheet` lies in no folder.
    """
    if max_images < 0:
        raise UserError(f"{max_images} images cannot be read: the number must be 0 or more.")
    if sheet and not os.path.isdir(os.path.dirname(os.path.abspath(sheet))):
        raise UserError(f"there is no folder for {sheet}: make it first.")
    places = np.unique(np.linspace(0, len(source) - 1, min(max_images, len(source))).astype(int))
    problems, first, noted = Counter(), {}, set()

    def note(place: int, bad: BadSample) -> None:
        if (place, bad.reason) not in noted:  # of what is read twice, with and without images
            noted.add((place, bad.reason))
            problems[bad.reason] += 1
            first.setdefault(bad.reason, _sentence(source, place, bad))

    texts = list(_texts(source, note))
    images, sides = {}, []
    conversions = Counter()
    pictured = set(places[_evenly(len(places), _COLUMNS * _ROWS)].tolist())
    for place in places.tolist():
        try:
            example = source[place]
            pixels = example["image"]
            if isinstance(pixels, bytes):
                pixels = decode_image(pixels, max_pixels, conversions)
        except BadSample as bad:
            note(place, bad)
            continue
        sides.append(pixels.shape[1::-1])
        if place in pictured:
            images[place] = resize_square(pixels, _TILE_PX), example["captions"]
    lines = [*_counts(source, texts), *_examples(source), *_lengths(texts)]
    if sides:
        width, height = np.transpose(sides)
        lines += [
            f"images read: {len(sides):,} of {len(source):,} examples, evenly spaced",
            f"  width, pixels:  {_percentiles(width)}",
            f"  height, pixels: {_percentiles(height)}",
            f"  width / height: {_percentiles(width / height, '.2f')}",
        ]
    if conversions:
        lines.append(f"  {counts_as_text(conversions)}")
    lines += _problems(source, problems, first)
    if sheet and images:
        try:
            contact_sheet(images.values()).save(sheet, "PNG")
        except OSError as error:
            raise UserError(f"cannot write {sheet} ({error.strerror or error}).") from error
        lines.append(f"Written: {sheet}, {len(images)} pictures from all over the source.")
    return [shown(line) for line in lines]


def _sentence(source: Source, index: int, bad: BadSample) -> str:
    """What is wrong with an example, and where that stands, if its detail does not say it."""
    place = source.place(index) if hasattr(source, "place") else ""
    where = f" ({place})" if place not in bad.detail else ""
    return f"example {index}{where}" + f": {bad.detail}" * bool(bad.detail)


def contact_sheet(tiles: Iterable[tuple[np.ndarray, Sequence[str]]]) -> Image.Image:
    """Pictures in rows, the first caption of each below it."""
    tiles = list(tiles)
    rows = -(-len(tiles) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * _TILE_PX, rows * (_TILE_PX + _CAPTION_PX)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (pixels, captions) in enumerate(tiles):
        left, top = number % _COLUMNS * _TILE_PX, number // _COLUMNS * (_TILE_PX + _CAPTION_PX)
        sheet.paste(Image.fromarray(pixels), (left, top))
        draw.multiline_text((left + 4, top + _TILE_PX + 2), _wrapped(captions[0]), fill="black")
    return sheet


def _wrapped(caption: str) -> str:
    return "\n".join(textwrap.wrap(caption, width=26)[:3])


def _texts(source: Source, note) -> Iterable[dict]:
    if hasattr(source, "without_images"):
        source = source.without_images()
    for index in range(len(source)):
        try:
            example = source[index]
        except BadSample as bad:
            note(index, bad)
            continue
        if not any(clean_caption(caption, max_words=50) for caption in example["captions"]):
            note(index, BadSample("empty caption"))
        yield {name: example[name] for name in example if name != "image"}


def _counts(source: Source, texts: Sequence[dict]) -> list[str]:
    pictures = len({example["image_id"] for example in texts})
    captions = [caption for example in texts for caption in example["captions"]]
    several = len(captions) / max(1, len(texts))
    asked = sum(bool(example.get("instruction")) for example in texts)
    lines = [
        f"{len(source):,} examples of {pictures:,} images, {len(captions):,} texts "
        f"({several:.2g} an example, {len(set(captions)):,} different)",
    ]
    if asked:
        lines.append(f"{asked:,} of them have a question or an instruction")
    return lines


def _examples(source: Source) -> list[str]:
    lines = ["examples:"]
    for place in _evenly(len(source), _EXAMPLES).tolist():
        try:
            example = source[place]
        except BadSample as bad:
            lines.append(f"  {place}: {bad.reason} ({bad.detail})")
            continue
        image = example.get("image")
        form = _form(image) if image is not None else "no image"
        asked = f"{example['instruction']!r} -> " if "instruction" in example else ""
        said = ", ".join(map(repr, example["captions"][:3]))
        more = ", ..." if len(example["captions"]) > 3 else ""
        lines.append(f"  {place}: {form}; {asked}{said}{more}")
    return lines


def _form(image: bytes | np.ndarray) -> str:
    if isinstance(image, np.ndarray):
        return f"{image.shape[1]}x{image.shape[0]} drawn"
    try:
        with Image.open(io.BytesIO(image)) as opened:
            return f"{opened.width}x{opened.height} {opened.format} {opened.mode}"
    except Exception as error:  # decoders raise nearly anything on hostile bytes
        return f"no image ({error})"


def _lengths(texts: Sequence[dict]) -> list[str]:
    captions = [len(text.split()) for example in texts for text in example["captions"]]
    asked = [len(e["instruction"].split()) for e in texts if "instruction" in e]
    lines = [f"texts, words:        {_percentiles(captions)}"] if captions else []
    if asked:
        lines.append(f"instructions, words: {_percentiles(asked)}")
    return lines


def _percentiles(values, form: str = ".0f") -> str:
    found = np.percentile(values, _PERCENTILES)
    names = ("least", "5 %", "median", "95 %", "most")
    return ", ".join(f"{name} {value:{form}}" for name, value in zip(names, found, strict=True))


def _problems(source: Source, problems: Counter, first: dict[str, str]) -> list[str]:
    found = [f"  {reason}: {problems[reason]:,}, such as {first[reason]}" for reason in problems]
    found += [f"  {problem}" for problem in getattr(source, "problems", ())]
    return ["problems:", *found] if found else ["problems: none"]


def _evenly(size: int, wanted: int) -> np.ndarray:
    """At most `wanted` indices below `size`."""
    return np.unique(np.linspace(0, size - 1, min(size, wanted)).astype(int))
