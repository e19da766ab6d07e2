"""A folder of images, with captions beside them or in `metadata.jsonl` (or `.csv`)."""

from __future__ import annotations

import os
from typing import Any

from jaxblip.data import storage
from jaxblip.data.archives import IMAGE_ENDINGS, MAX_TEXT_BYTES
from jaxblip.data.samples import BadSample, LeftOut
from jaxblip.errors import UserError

METADATA = "metadata.jsonl"


class FolderRows:
    """Images of a folder and its sub-folders, each with a caption in the .txt file of its name.

    A row has `image`, the path, and `caption`, the text of the file beside it. What lacks the other
    is left out, and `problems` says how many; so are links to folders, which may lead back.

    Raises:
      UserError: there is no image with a caption.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = os.path.abspath(folder)
        self._images: list[tuple[str, str]] = []  # path, and the ending of the text's
        left_out = LeftOut()

        def note(error: OSError) -> None:
            where = f"{error.filename} ({storage.phrase(error)})"
            left_out.add("folders that cannot be read", where)

        for parent, folders, names in os.walk(self.folder, onerror=note):
            folders.sort()
            for name in folders:
                if os.path.islink(os.path.join(parent, name)):
                    left_out.add("links to folders", self._inside(parent, name))
            self._add(parent, sorted(names), left_out)
        self.problems = left_out.sentences(storage.shown(self.folder))
        if not self._images:
            raise UserError(
                f"{storage.shown(self.folder)} has no images with captions: put a text such as "
                f"1.txt beside 1.jpg or a {METADATA} with lines like "
                '{"file_name": "1.jpg", "text": "a cat"} there.'
            )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, ending = self._images[index]
        text = os.path.splitext(os.path.join(self.folder, image))[0] + ending
        try:
            caption = storage.read_bytes(text, most=MAX_TEXT_BYTES)
        except OSError as error:
            detail = f"{storage.shown(text)}: {storage.phrase(error)}"
            raise BadSample("unreadable row", detail) from error
        return {"image": image, "caption": caption.decode("utf-8-sig", errors="replace").strip()}

    def place(self, index: int) -> str:
        return storage.shown(os.path.join(self.folder, self._images[index][0]))

    def _inside(self, parent: str, name: str) -> str:
        return os.path.relpath(os.path.join(parent, name), self.folder)

    def _add(self, parent: str, names: list[str], left_out: LeftOut) -> None:
        """The images of one folder, with the texts beside them."""
        parts = [os.path.splitext(name) for name in names]
        texts = {stem: ending for stem, ending in parts if ending.lower() == ".txt"}
        alone = set(texts)
        for stem, ending in parts:
            if ending[1:].lower() not in IMAGE_ENDINGS:
                continue
            path = self._inside(parent, stem + ending)
            alone.discard(stem)
            if stem in texts:
                self._images.append((path, texts[stem]))
            else:
                left_out.add("images without a .txt beside them", path)
        for stem in sorted(alone):
            left_out.add("texts without an image", self._inside(parent, stem + texts[stem]))
