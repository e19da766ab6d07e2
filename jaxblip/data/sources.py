"""From the text of a config to a source of examples."""

from __future__ import annotations

from pathlib import Path

from jaxblip.data.jsonl import JsonlSource
from jaxblip.data.samples import Source
from jaxblip.data.shapes import SPLIT_SIZES, ShapesSource
from jaxblip.errors import UserError

# Data sets that `jaxblip data` makes, in a folder of the same name where a config expects them.
_MADE_BY_VERB = ("openmoji",)


def open_source(spec: str, *, image_size_px: int) -> Source:
    """Opens "shapes:train", "shapes:heldout" or the path of a .jsonl file.

    Args:
      spec: as in `config.data.train` and `config.data.eval`.
      image_size_px: side of the images that a procedural source draws.

    Raises:
      UserError: the spec names no source, or the file cannot be used.
    """
    name, _, split = spec.partition(":")
    if name == "shapes" and split in SPLIT_SIZES:
        return ShapesSource(split, image_size_px)
    if spec.endswith(".jsonl"):
        folder = Path(spec).parent
        if folder.name in _MADE_BY_VERB and not Path(spec).exists():
            raise UserError(
                f"{spec} does not exist yet: `jaxblip data {folder.name} --out={folder}` makes it."
            )
        return JsonlSource(spec)
    known = ", ".join(f"shapes:{split}" for split in SPLIT_SIZES)
    raise UserError(
        f"no data source is called {spec!r}; the known ones are {known} "
        "and the path of a file that ends in .jsonl"
    )
