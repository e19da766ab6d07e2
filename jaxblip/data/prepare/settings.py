"""What a preparation is told: the source, the steps and their limits."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re

from jaxblip.data import storage
from jaxblip.data.archives import expand_braces
from jaxblip.data.rows import COLUMNS, BadRow, RowSource, check_row
from jaxblip.data.samples import BadSample, Source
from jaxblip.data.sources import open_source
from jaxblip.errors import UserError

_DRAWN_PX = 96  # side of what a procedural source draws
DUPLICATES = ("near", "exact", "keep")
_MANY_FILES = (".jsonl", ".csv", ".tsv", ".parquet", ".tar")


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that the written bytes depend on, besides the source's own.

    Attributes:
      source: as `open_source` takes it; paths are absolute.
      fields: pairs of an example field and its column, where the columns have other names.
      image_folder: that the paths of images are relative to; the file's own by default.
      split: the name of what is written.
      min_side: pixels of the shorter side that an image needs.
      max_aspect: so many times as long as wide, at most.
      max_pixels: an image with more is not decoded.
      min_chars: of a text; a shorter one is left out.
      max_chars: of a text; a longer one is left out.
      duplicates: which are dropped: "exact", examples whose images have the same bytes; "near",
        these and pictures that were saved twice; "keep", none.
      near_bits: of 64, in which the perceptual hashes of near duplicates may differ.
      resize: pixels of the shorter side that larger images are resized to; 0 for none.
      jpeg_quality: of resized images.
      shard_mb: size of a shard, in millions of bytes.
      block: examples that are read as one piece of work.
    """

    source: str
    fields: tuple[tuple[str, str], ...] = ()
    image_folder: str = ""
    split: str = "train"
    min_side: int = 32
    max_aspect: float = 10.0
    max_pixels: int = 100_000_000
    min_chars: int = 1
    max_chars: int = 2000
    duplicates: str = "near"
    near_bits: int = 4
    resize: int = 0
    jpeg_quality: int = 90
    shard_mb: float = 256.0
    block: int = 1000

    def __post_init__(self):
        least = {
            "min_side": 1, "max_aspect": 1, "max_pixels": 1, "min_chars": 1,
            "max_chars": self.min_chars, "near_bits": 0, "resize": 0, "block": 1,
        }  # fmt: skip
        for name, value in least.items():
            if not getattr(self, name) >= value:  # not < : also for NaN
                self._refuse(name, f"must be {value} or more")
        if not self.shard_mb > 0:
            self._refuse("shard_mb", "must be above 0")
        if self.near_bits > 8:
            self._refuse("near_bits", "must be 8 or less: more would be other pictures")
        if not 1 <= self.jpeg_quality <= 100:
            self._refuse("jpeg_quality", "must lie between 1 and 100")
        if self.duplicates not in DUPLICATES:
            self._refuse("duplicates", f"must be {', '.join(DUPLICATES)}")
        if not re.fullmatch("[a-z][a-z0-9_]*", self.split) or self.split == "all":
            self._refuse("split", "must be a name such as train or validation")

    @property
    def steps(self) -> str:
        """What is done to the examples, as the command line says it."""
        names = [field.name for field in dataclasses.fields(self)]
        names = names[names.index("min_side") :]
        return ", ".join(f"{name.replace('_', '-')} {getattr(self, name)}" for name in names)

    def _refuse(self, name: str, why: str) -> None:
        raise UserError(f"--{name.replace('_', '-')}={getattr(self, name)} {why}.")


def absolute_source(spec: str) -> str:
    """`spec` with absolute paths, so that workers find it; data sets by name as they are."""
    name, colon, _ = spec.partition(":")
    named = colon and name.isidentifier() and not os.path.isdir(name)
    if storage.is_url(spec) or named:
        return spec
    if spec.lower().endswith(".json"):  # perhaps of two files
        return ",".join(map(storage.absolute, spec.split(",")))
    return storage.absolute(spec)


def parts_of(spec: str) -> list[str]:
    """The files of a source, each of which is one by itself; or the source as its only part."""
    if os.path.isdir(spec) or not spec.lower().endswith(_MANY_FILES):
        return [spec]
    patterns = expand_braces(spec) if spec.lower().endswith(".tar") else [spec]
    return [path for pattern in patterns for path in storage.files(pattern)]


def open_part(settings: Settings, part: str, first: str) -> Source:
    """One file of the source, with images where the whole source would look for them.

    Args:
      first: the first of all parts.
    """
    folder = settings.image_folder
    if not folder and part != first:
        folder = os.path.dirname(first)
    return open_source(
        part, image_size_px=_DRAWN_PX, fields=dict(settings.fields), image_folder=folder
    )


def text_columns(source: Source) -> tuple[str | None, str]:
    """The columns that the texts of a source are written to.

    Returns:
      That of the instruction, if any, and that of what belongs to it.
    """
    if not getattr(source, "has_instructions", False):
        return None, COLUMNS["captions"][0]
    form = _form(source) if isinstance(source, RowSource) else "instruction"
    return form, COLUMNS["answers" if form == "question" else "output"][0]


def _form(source: RowSource) -> str:
    """Which of the two the rows have, that examples call instruction."""
    for row in range(len(source)):
        with contextlib.suppress(BadRow, BadSample):
            if form := check_row(source._rows[row], source._columns):
                return form
    return "instruction"
