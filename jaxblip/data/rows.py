"""From a row of any file to an example: which column is what, and what is wrong with it."""

from __future__ import annotations

import base64
import difflib
import errno
import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

from jaxblip.data.choices import COLUMNS
from jaxblip.data.images import frame_numbers
from jaxblip.data.json_text import shown_json
from jaxblip.data.samples import BadSample
from jaxblip.data.storage import join, phrase, read_bytes, shown
from jaxblip.errors import UserError

# What evaluation knows of an example beside the above, where a row has it.
FACTS = ("question_id", "question_type", "answer_type", "domain")
# An instruction or None, and the texts that belong to it. The first that a row has in full counts.
_FORMS = (("question", "answers"), ("instruction", "output"), (None, "captions"))
_FIRST_ROWS = 10  # of which one must be an example
MAX_IMAGE_BYTES = 1 << 28  # of an encoded image, before anything of it is read
_TEXTS = ("captions", "question", "answers", "instruction", "output")
EXAMPLES = {
    "question": '{"image": "pictures/1.jpg", "question": "what is on the mat?", "answer": "a cat"}',
    "instruction": (
        '{"image": "pictures/1.jpg", "instruction": "Describe the cat.", "output": "It sleeps."}'
    ),
    None: '{"image": "pictures/1.jpg", "caption": "a cat on a mat"}',
}


class Rows(Protocol):
    """Random access to the rows of one or more files; small when pickled.

    Attributes:
      folder: that paths of images are relative to.
    """

    folder: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Raises BadSample where the row cannot be read."""

    def place(self, index: int) -> str:
        """Where the row stands, as "file:line" or the like."""


class BadRow(Exception):
    """What is wrong with a row, in one sentence without its place."""


class RowSource:
    """A `samples.Source` over rows.

    Args:
      rows: of a table, an annotation file or an archive.
      columns: of the example fields, from `columns_of`.
      images: without them no image is read, for tasks on text.
      frames: of a video, which is a row with a list of images, so many are read, evenly spaced;
        with 1 its middle one is the image of the example.

    Attributes:
      has_instructions: whether the rows have a question or an instruction; where they were not all
        looked at, whether the first good one has.

    Raises:
      UserError: none of the first rows is an example. A row that is none is a bad sample.
    """

    def __init__(
        self, rows: Rows, columns: Mapping[str, tuple[str, ...]], images: bool = True,
        frames: int = 1,
    ):  # fmt: skip
        self._rows, self._columns, self._images, self._frames = rows, columns, images, frames
        self.has_instructions = getattr(rows, "has_instructions", None)
        if self.has_instructions is None:
            self.has_instructions = _first_form(rows, columns) is not None

    @property
    def problems(self) -> list[str]:
        """What was left out when the rows were opened, a sentence each."""
        return getattr(self._rows, "problems", [])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        try:
            check_row(row, self._columns)
        except BadRow as bad:
            raise BadSample("bad row", f"{self._rows.place(index)}: {bad}") from bad
        example = texts_of(row, self._columns)
        if self.has_instructions:  # of a row without one it is empty, and so a bad sample
            example.setdefault("instruction", "")
        example["image_id"] = image_id(row, self._columns)
        example |= facts_of(row, self._columns)
        if self._images:
            image = _value(row, self._columns, "image")
            try:
                example["image"] = self._load(image)
            except (OSError, ValueError) as error:
                too_long = isinstance(error, OSError) and error.errno == errno.EFBIG
                reason = "gigantic image" if too_long else "missing image"
                raise BadSample(reason, f"{self.place(index)}: {phrase(error)}") from error
        return example

    def _load(self, image: Any) -> bytes | list[bytes]:
        if not isinstance(image, list | tuple):
            return load_image(image, self._rows.folder)
        numbers = frame_numbers(len(image), min(self._frames, len(image)))
        loaded = [load_image(image[number], self._rows.folder) for number in numbers]
        return loaded if self._frames > 1 else loaded[0]

    def place(self, index: int) -> str:
        """Where an example stands, and the path of its image, where that is no part of it."""
        place = self._rows.place(index)
        try:
            row = self._rows[index]
        except BadSample:
            return place
        image = _value(row, self._columns, "image") if isinstance(row, Mapping) else None
        if isinstance(image, Mapping):
            image = image.get("path")
        if isinstance(image, list | tuple) and all(isinstance(frame, str) for frame in image):
            return f"one of {image!r:.200} in {place}"
        named = isinstance(image, str) and not image.startswith("data:")
        return f"{image!r:.200} in {place}" if named and not place.endswith(shown(image)) else place

    def without_images(self) -> RowSource:
        source = object.__new__(RowSource)
        source.__dict__.update(self.__dict__, _images=False)
        return source


def _first_form(rows: Rows, columns: Mapping[str, tuple[str, ...]]) -> str | None:
    """The kind of instruction of the first row that is an example, see `check_row`."""
    first_bad = None
    for index in range(min(_FIRST_ROWS, len(rows))):
        try:
            return check_row(rows[index], columns)
        except BadRow as bad:
            first_bad = first_bad or f"{rows.place(index)}: {bad}"
        except BadSample as bad:
            first_bad = first_bad or bad.detail
    raise UserError(first_bad)


def columns_of(fields: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """`COLUMNS` with those that a field map names in the place of the usual ones.

    Where it names one of the texts, the columns of usual names are no texts.

    Args:
      fields: example field -> name of its column; "" for the usual one.

    Raises:
      UserError: the map names no field of examples.
    """
    named = {field: column for field, column in fields.items() if column}
    for field in named:
        if field not in COLUMNS:
            near = difflib.get_close_matches(field, COLUMNS, 1)
            hint = f", did you mean {near[0]}?" if near else f"; they are {', '.join(COLUMNS)}"
            raise UserError(f"data.fields.{field} is no field of an example{hint}")
    usual = dict(COLUMNS)
    if any(field in named for field in _TEXTS):
        usual |= dict.fromkeys(_TEXTS, ())
    return usual | {field: (column,) for field, column in named.items()}


def check_row(row: Mapping[str, Any], columns: Mapping[str, tuple[str, ...]]) -> str | None:
    """The kind of instruction that a row has, "question", "instruction" or None.

    Raises:
      BadRow: it has no image, no texts, or a value of another type.
    """
    if not isinstance(row, Mapping):
        raise BadRow(f"no object: {shown_json(row)}")
    form = _form(row, columns)
    image = _column(row, columns, "image")
    if image is None or form is None:
        if form is None:
            lacks, example = _lacks(row, columns)
        else:
            lacks, example = f'"{columns["image"][0]}"', EXAMPLES[form[0]]
        has = shown(", ".join(f'"{name}"' for name in row)[:300]) or "nothing"
        raise BadRow(f"no {lacks}, the line has {has}; write it like {example}")
    instruction, texts = form
    _check_image(image, row[image])
    if instruction is not None:
        column = _column(row, columns, instruction)
        _check(isinstance(row[column], str), column, row[column], "a text")
    column = _column(row, columns, texts)
    _check_texts(column, row[column], columns[texts])
    column = _column(row, columns, "image_id")
    if column is not None:
        known = isinstance(row[column], int | str | None) or _is_whole(row[column])
        _check(known, column, row[column], "a whole number or a text")
    return instruction


def texts_of(row: Mapping[str, Any], columns: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """`captions`, and `instruction` where it has one, of a row that was checked."""
    instruction, texts = _form(row, columns)
    value = _value(row, columns, texts)
    # A list without captions is a sample without a caption: bad, but no defect of the file.
    captions = [value] if isinstance(value, str) else value or [""]
    example = {"captions": [_encodable(caption) for caption in captions]}
    if instruction is not None:
        example["instruction"] = _encodable(_value(row, columns, instruction))
    return example


def facts_of(row: Mapping[str, Any], columns: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Those of `FACTS` that a row has: an id, which may be a number, and names of groups."""
    found = {name: _value(row, columns, name) for name in FACTS}
    found = {name: value for name, value in found.items() if isinstance(value, int | str)}
    return {name: x if name == "question_id" else str(x) for name, x in found.items()}


def image_id(row: Mapping[str, Any], columns: Mapping[str, tuple[str, ...]]) -> int:
    """A number below 2^63 that rows of the same picture share.

    It is the row's id where that is such a number; else it is made of the id, or of the path or
    the bytes of the image.
    """
    given = _value(row, columns, "image_id")
    given = int(given) if _is_whole(given) else given
    if isinstance(given, int) and 0 <= given < 2**63:
        return given
    key = ("image", _value(row, columns, "image")) if given is None else ("id", given)
    digest = hashlib.blake2b(repr(key).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def load_image(image: str | bytes | Mapping[str, Any], folder: str) -> bytes:
    """The encoded bytes of an image as a row has it.

    Args:
      image: a path, a URL of storage that fsspec reads, a `data:` URL, bytes, or a mapping with
        `bytes` and perhaps `path`, as Hugging Face data sets have it.
      folder: that paths are relative to.

    Raises:
      OSError, ValueError: it cannot be read.
    """
    if isinstance(image, Mapping):
        image = image["path"] if image.get("bytes") is None else image["bytes"]
    if isinstance(image, bytes):
        return image
    if image.startswith("data:"):
        form, found, text = image.partition(";base64,")
        if not found:
            raise ValueError(f"a data: URL without ;base64, behind {form[:40]!r}")
        try:
            return base64.b64decode("".join(text.split()), validate=True)
        except ValueError as error:
            raise ValueError(f"no base64: {error}") from error
    return read_bytes(join(folder, image), most=MAX_IMAGE_BYTES)


def _column(row: Mapping[str, Any], columns: Mapping[str, tuple[str, ...]], field: str):
    """The column of `row` that holds a field, or None."""
    for name in columns[field]:  # a generator would take three times as long, ten times an example
        if name in row:
            return name
    return None


def _value(row: Mapping[str, Any], columns: Mapping[str, tuple[str, ...]], field: str):
    column = _column(row, columns, field)
    return None if column is None else row[column]


def _form(row: Mapping[str, Any], columns: Mapping[str, tuple[str, ...]]):
    """The first of _FORMS that the row has in full, if any."""
    for instruction, texts in _FORMS:
        begun = instruction is None or _column(row, columns, instruction) is not None
        if begun and _column(row, columns, texts) is not None:
            return instruction, texts
    return None


def _lacks(row: Mapping[str, Any], columns: Mapping[str, tuple[str, ...]]) -> tuple[str, str]:
    """What is missing of the form that a row without texts has begun, and an example of it."""

    def named(field):
        *several, one = columns[field] or COLUMNS[field]
        return f'"{one}"' + "".join(f' (or "{name}")' for name in several)

    for instruction, texts in _FORMS[:2]:
        if _column(row, columns, instruction) is not None:
            return named(texts), EXAMPLES[instruction]
        if _column(row, columns, texts) is not None:
            return named(instruction), EXAMPLES[instruction]
    return named("captions"), EXAMPLES[None]


def _is_whole(value: Any) -> bool:
    """Whether it is a number such as 5.0, as tables have where some numbers are missing."""
    return isinstance(value, float) and value.is_integer()


def _encodable(text: str) -> str:
    """The text without halves of characters, which JSON can escape and no encoding has."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _check(good: bool, column: str, value: Any, wanted: str) -> None:
    if not good:
        raise BadRow(f'"{column}" is {shown_json(value)}, not {wanted}')


def _check_image(column: str, value: Any) -> None:
    if isinstance(value, list | tuple):
        _check(len(value) > 0, column, value, "the path of an image, or those of a video's frames")
        for frame in value:
            _check(not isinstance(frame, list | tuple), column, value, "a list of paths")
            _check_image(column, frame)
        return
    if isinstance(value, Mapping):
        held = value.get("bytes") if value.get("bytes") is not None else value.get("path")
        _check(isinstance(held, bytes | str), column, value, "bytes or the path of an image")
        return
    _check(isinstance(value, bytes | str) and bool(value), column, value, "the path of an image")


def _check_texts(column: str, value: Any, names: tuple[str, ...]) -> None:
    """A usual column holds what its name says; one that a field map names holds either."""
    is_list = isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)
    if len(names) == 1:
        _check(is_list or isinstance(value, str), column, value, "a text or a list of texts")
    elif column == names[0]:
        _check(is_list, column, value, "a list of texts")
    else:
        _check(isinstance(value, str), column, value, "a text")
