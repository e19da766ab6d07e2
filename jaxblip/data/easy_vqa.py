"""easy-VQA: questions about pictures of one shape, from the PyPI package `easy-vqa`."""

from __future__ import annotations

import os
from typing import Any

from jaxblip.errors import UserError

SPLITS = ("train", "test")


class EasyVqaRows:
    """4,000 pictures with 38,575 questions ("train"), or 1,000 with 9,673 ("test"), a row each.

    Questions about the same picture share its id.

    Raises:
      UserError: the package is missing.
    """

    def __init__(self, split: str):
        try:
            import easy_vqa
        except ImportError as error:
            raise UserError(
                "the package easy-vqa is missing; pip install 'jaxblip[easy-vqa]'"
            ) from error
        self._split = split
        train = split == "train"
        questions = easy_vqa.get_train_questions() if train else easy_vqa.get_test_questions()
        self._rows = list(zip(*questions, strict=True))
        images = easy_vqa.get_train_image_paths() if train else easy_vqa.get_test_image_paths()
        self.folder = os.path.dirname(next(iter(images.values())))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        question, answer, image = self._rows[index]
        return {"image": f"{image}.png", "question": question, "answer": answer, "id": image}

    def place(self, index: int) -> str:
        return f"easy_vqa:{self._split}, question {index}"

    def __reduce__(self):
        return EasyVqaRows, (self._split,)
