"""A folder of images, with captions beside them or in `metadata.jsonl` (or `.csv`)."""

from __future__ import annotations

import os
from typing import Any

from jaxblip.data import storage
from jaxblip.data.archives import IMAGE_ENDINGS
from jaxblip.data.samples import BadSample
from jaxblip.errors import UserError

METADATA = "metadata.jsonl"


class FolderRows:
    """Images of a folder and its sub-folders, each with a caption in the .txt file of its name.

    A row has `image`, the path, and `caption`, the text of the file beside it. Images without such
    a file are left out, and `problems` says how many.

    Raises:
      UserError: there is no image with a caption.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = os.path.abspath(folder)
        self._images, lonely = [], []
        for parent, folders, names in os.walk(self.folder):
            folders.sort()
            present = set(names)
            for name in sorted(names):
                stem, ending = os.path.splitext(name)
                if ending[1:].lower() not in IMAGE_ENDINGS:
                    continue
                path = os.path.relpath(os.path.join(parent, name), self.folder)
                (self._images if f"{stem}.txt" in present else lonely).append(path)
        if not self._images:
            raise UserError(
                f"{self.folder} has no images with captions: put a text such as 1.txt beside 1.jpg "
                f'or a {METADATA} with lines like {{"file_name": "1.jpg", "text": "a cat"}} there.'
            )
        self.problems = (
            [f"{len(lonely)} images without a .txt beside them, such as {lonely[0]}"]
            if lonely
            else []
        )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self._images[index]
        text = os.path.splitext(os.path.join(self.folder, image))[0] + ".txt"
        try:
            caption = storage.read_bytes(text).decode("utf-8-sig", errors="replace")
        except OSError as error:
            raise BadSample("unreadable row", f"{text}: {error}") from error
        return {"image": image, "caption": caption.strip()}

    def place(self, index: int) -> str:
        return os.path.join(self.folder, self._images[index])
