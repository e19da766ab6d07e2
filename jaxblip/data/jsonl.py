"""Images with captions or answers from a JSONL file: one line an example, images beside it."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from jaxblip.data.samples import BadSample
from jaxblip.errors import UserError

_EXAMPLE = '{"image": "pictures/1.jpg", "caption": "a cat on a mat"}'
# What a line may hold beside its image: an instruction or None, its text, and a list of texts.
_FORMS = (
    ("question", "answer", "answers"),
    ("instruction", "output", "outputs"),
    (None, "caption", "captions"),
)
_EXAMPLES = {
    "question": '{"image": "pictures/1.jpg", "question": "what is on the mat?", "answer": "a cat"}',
    "instruction": (
        '{"image": "pictures/1.jpg", "instruction": "Describe the cat.", "output": "It sleeps."}'
    ),
    None: _EXAMPLE,
}


class JsonlSource:
    """One example a line: `image`, one of three kinds of text, and perhaps `id`.

    The texts are `caption` or `captions`; or `question` with `answer` or `answers`; or
    `instruction` with `output` or `outputs`. Answers and outputs are the captions of the example,
    and repeats among them are weights.

    `image` is a path, absolute or relative to the folder of the JSONL file. Lines with the same
    `id`, or without one with the same image path, share an `image_id`. Blank lines are skipped.
    Every line is checked when the file is opened; what stays in memory is where each begins.

    Args:
      path: the JSONL file, UTF-8.
      max_lines: only the first so many examples.
      images: without them no image file is read, for tasks on text.

    Attributes:
      has_instructions: whether all lines have a question or an instruction.

    Raises:
      UserError: the file is missing or empty, or a line is not such an example.
    """

    def __init__(
        self, path: str | os.PathLike, max_lines: int | None = None, images: bool = True
    ):
        self.path = os.path.abspath(path)
        self.images = images
        self._offsets, self._image_ids, self.has_instructions = _index(self.path, max_lines)

    def __len__(self) -> int:
        return len(self._image_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, length = self._offsets[index]
        with open(self.path, "rb") as file:  # opened anew: threads and workers share no position
            file.seek(start)
            line = json.loads(file.read(length))
        instruction, one, several = _form(line)
        # A list without captions is a sample without a caption: bad, but no defect of the file.
        captions = line.get(several, [line.get(one)]) or [""]
        example = {"captions": captions, "image_id": int(self._image_ids[index])}
        if instruction:
            example["instruction"] = line[instruction]
        if self.images:
            image_path = os.path.join(os.path.dirname(self.path), line["image"])
            try:
                with open(image_path, "rb") as file:
                    example["image"] = file.read()
            except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
                raise BadSample("missing image", f"{image_path}, of {self.path}") from error
        return example

    def without_images(self) -> JsonlSource:
        source = object.__new__(JsonlSource)
        source.__dict__.update(self.__dict__, images=False)
        return source


def _index(path: str, max_lines: int | None) -> tuple[np.ndarray, np.ndarray, bool]:
    """(start, length) in bytes and the image id of every example of a checked file.

    Also whether each of them has an instruction.
    """
    spans, image_ids, dense_ids, has_instructions = [], [], {}, True
    try:
        with open(path, "rb") as file:
            start = 0
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    line = _parse(raw, f"{path}:{number}")
                    has_instructions &= _form(line)[0] is not None
                    given = line.get("id")
                    key = ("image", line["image"]) if given is None else ("id", given)
                    image_ids.append(dense_ids.setdefault(key, len(dense_ids)))
                    spans.append((start, len(raw)))
                start += len(raw)
                if max_lines is not None and len(spans) >= max_lines:
                    break
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}); give the path of a JSONL file with lines "
            f"like {_EXAMPLE}"
        ) from error
    if not spans:
        raise UserError(f"{path} is empty; it needs at least one line like {_EXAMPLE}")
    return np.array(spans, np.int64), np.array(image_ids, np.int32), has_instructions


def _form(line: dict[str, Any]) -> tuple[str | None, str, str] | None:
    """The first of _FORMS that the line has in full, if any."""
    for form in _FORMS:
        instruction, one, several = form
        if (instruction is None or instruction in line) and (one in line or several in line):
            return form
    return None


def _parse(raw: bytes, place: str) -> dict[str, Any]:
    shown = raw.decode("utf-8", errors="replace").strip()
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    try:
        line = json.loads(raw)
    except ValueError as error:  # its own "line 1 column 9" would seem to be about the file
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "it is not UTF-8"
        raise UserError(
            f"{place}: no JSON ({reason}): {shown}; write one object a line, like {_EXAMPLE}"
        ) from error
    if not isinstance(line, dict):
        raise UserError(f"{place}: no JSON object: {shown}; write one a line, like {_EXAMPLE}")
    form = _form(line)
    if "image" not in line or form is None:
        lacks, example = _lacks(line) if form is None else ('"image"', _EXAMPLES[form[0]])
        has = ", ".join(f'"{name}"' for name in line) or "nothing"
        raise UserError(f"{place}: no {lacks}, the line has {has}; write it like {example}")
    instruction, one, several = form
    wrong = None
    if not isinstance(line["image"], str) or not line["image"]:
        wrong = ("image", "the path of an image")
    elif instruction and not isinstance(line[instruction], str):
        wrong = (instruction, "a text")
    elif several in line:
        captions = line[several]
        if not (isinstance(captions, list) and all(isinstance(c, str) for c in captions)):
            wrong = (several, "a list of texts")
    elif not isinstance(line[one], str):
        wrong = (one, "a text")
    if wrong is None and not isinstance(line.get("id"), (int, str, type(None))):
        wrong = ("id", "a number or a text")
    if wrong is not None:
        name, wanted = wrong
        raise UserError(f'{place}: "{name}" is {json.dumps(line[name])[:60]}, not {wanted}')
    return line


def _lacks(line: dict[str, Any]) -> tuple[str, str]:
    """What is missing of the form that a line without texts has begun, and an example of it."""
    for instruction, one, several in _FORMS:
        if instruction in line:
            return f'"{one}" (or "{several}")', _EXAMPLES[instruction]
        if instruction is not None and (one in line or several in line):
            return f'"{instruction}"', _EXAMPLES[instruction]
    return '"caption" (or "captions")', _EXAMPLE
