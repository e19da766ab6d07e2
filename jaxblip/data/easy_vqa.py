"""easy-VQA: questions about pictures of one shape, from the PyPI package `easy-vqa`."""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

from jaxblip.errors import UserError

SPLITS = ("train", "test")

_SHAPES = ("circle", "rectangle", "triangle")
_COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


class EasyVqaRows:
    """4,000 pictures with 38,575 questions ("train"), or 1,000 with 9,673 ("test"), a row each.

    Questions about the same picture share its id. The type of an answer is "yes/no", "shape" or
    "color".

    Raises:
      UserError: the package is missing.
    """

    def __init__(self, split: str):
        self._split = split
        self._rows, self.folder = _questions_and_folder(split)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        question, answer, image = self._rows[index]
        row = {"image": f"{image}.png", "question": question, "answer": answer, "id": image}
        return row | {"answer_type": _answer_type(answer)}

    def place(self, index: int) -> str:
        return f"easy_vqa:{self._split}, question {index}"

    def __reduce__(self):
        return EasyVqaRows, (self._split,)


class EasyVqaCaptionRows:
    """The same pictures, a row each, with what the answers tell as caption: "blue rectangle".

    Pictures of which the questions leave the shape or the colour open (one in nine) are left
    out.

    Raises:
      UserError: the package is missing.
    """

    def __init__(self, split: str):
        self._split = split
        questions, self.folder = _questions_and_folder(split)
        self._rows = list(_captions(questions).items())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, caption = self._rows[index]
        return {"image": f"{image}.png", "caption": caption, "id": image}

    def place(self, index: int) -> str:
        return f"easy_vqa_captions:{self._split}, picture {self._rows[index][0]}"

    def __reduce__(self):
        return EasyVqaCaptionRows, (self._split,)


def _questions_and_folder(split: str) -> tuple[list[tuple[str, str, int]], str]:
    """(question, answer, id of the image) of all questions, and where the images lie."""
    try:
        import easy_vqa
    except ImportError as error:
        message = "the package easy-vqa is missing; pip install 'jaxblip[easy-vqa]'"
        raise UserError(message) from error
    train = split == "train"
    questions = easy_vqa.get_train_questions() if train else easy_vqa.get_test_questions()
    images = easy_vqa.get_train_image_paths() if train else easy_vqa.get_test_image_paths()
    return list(zip(*questions, strict=True)), os.path.dirname(next(iter(images.values())))


def _answer_type(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in _SHAPES else "color"


def _captions(questions: list[tuple[str, str, int]]) -> dict[int, str]:
    """Id -> colour and shape, of the images whose questions tell both."""
    facts: dict[int, dict[str, str]] = defaultdict(dict)
    for question, answer, image in questions:
        words = question.rstrip("?").split()
        if answer in ("yes", "no"):
            negated = "not" in words or "no" in words
            if (answer == "yes") == negated:
                continue  # that is what the picture does not show
        else:
            words.append(answer)  # beside it the question may name the other fact
        for word in words:
            if word in _SHAPES:
                facts[image]["shape"] = word
            elif word in _COLOURS:
                facts[image]["color"] = word
    return {
        image: f"{known['color']} {known['shape']}"
        for image, known in sorted(facts.items())
        if len(known) == 2
    }
