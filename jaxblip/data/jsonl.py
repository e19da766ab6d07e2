"""Image-caption pairs from a JSONL file: one line an example, images beside it."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from jaxblip.data.samples import BadSample
from jaxblip.errors import UserError

_EXAMPLE = '{"image": "pictures/1.jpg", "caption": "a cat on a mat"}'


class JsonlSource:
    """One example a line: `image`, `caption` or `captions`, and perhaps `id`.

    `image` is a path, absolute or relative to the folder of the JSONL file. Lines with the same
    `id`, or without one with the same image path, share an `image_id`. Blank lines are skipped.
    Every line is checked when the file is opened; what stays in memory is where each begins.

    Args:
      path: the JSONL file, UTF-8.
      max_lines: only the first so many examples.
      images: without them no image file is read, for tasks on text.

    Raises:
      UserError: the file is missing or empty, or a line is not such an example.
    """

    def __init__(
        self, path: str | os.PathLike, max_lines: int | None = None, images: bool = True
    ):
        self.path = os.path.abspath(path)
        self.images = images
        self._offsets, self._image_ids = _index(self.path, max_lines)

    def __len__(self) -> int:
        return len(self._image_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, length = self._offsets[index]
        with open(self.path, "rb") as file:  # opened anew: threads and workers share no position
            file.seek(start)
            line = json.loads(file.read(length))
        # A list without captions is a sample without a caption: bad, but no defect of the file.
        captions = line.get("captions", [line.get("caption")]) or [""]
        example = {"captions": captions, "image_id": int(self._image_ids[index])}
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


def _index(path: str, max_lines: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(start, length) in bytes and the image id of every example of a checked file."""
    spans, image_ids, dense_ids = [], [], {}
    try:
        with open(path, "rb") as file:
            start = 0
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    line = _parse(raw, f"{path}:{number}")
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
    return np.array(spans, np.int64), np.array(image_ids, np.int32)


def _parse(raw: bytes, place: str) -> dict[str, Any]:
    shown = raw.decode("utf-8", errors="replace").strip()
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    try:
        line = json.loads(raw)
    except ValueError as error:  # JSONDecodeError, or bytes that are not UTF-8
        raise UserError(
            f"{place}: no JSON ({error}): {shown}; write one object a line, like {_EXAMPLE}"
        ) from error
    if not isinstance(line, dict):
        raise UserError(f"{place}: no JSON object: {shown}; write one a line, like {_EXAMPLE}")
    if "image" not in line or not ("caption" in line or "captions" in line):
        lacks = '"image"' if "image" not in line else '"caption" (or "captions")'
        has = ", ".join(f'"{name}"' for name in line) or "nothing"
        raise UserError(f"{place}: no {lacks}, the line has {has}; write it like {_EXAMPLE}")
    wrong = None
    if not isinstance(line["image"], str) or not line["image"]:
        wrong = ("image", "the path of an image")
    elif "captions" in line:
        captions = line["captions"]
        if not (isinstance(captions, list) and all(isinstance(c, str) for c in captions)):
            wrong = ("captions", "a list of texts")
    elif not isinstance(line["caption"], str):
        wrong = ("caption", "a text")
    if wrong is None and not isinstance(line.get("id"), (int, str, type(None))):
        wrong = ("id", "a number or a text")
    if wrong is not None:
        name, wanted = wrong
        raise UserError(f'{place}: "{name}" is {json.dumps(line[name])[:60]}, not {wanted}')
    return line
