"""From the text of a config to a source of examples."""

from __future__ import annotations

import os
from collections.abc import Mapping

from jaxblip.data import storage
from jaxblip.data.annotations import AnnotationRows
from jaxblip.data.archives import WebDatasetRows
from jaxblip.data.folders import METADATA, FolderRows
from jaxblip.data.jsonl import JsonlRows
from jaxblip.data.rows import Rows, RowSource, columns_of
from jaxblip.data.samples import Source
from jaxblip.data.shapes import SPLIT_SIZES, ShapesSource
from jaxblip.data.tables import CsvRows, ParquetRows
from jaxblip.errors import UserError

# Data sets that `jaxblip data` makes, in a folder of the same name where a config expects them.
_MADE_BY_VERB = ("openmoji",)
# Columns of `metadata.jsonl` as Hugging Face's imagefolder has them.
_METADATA_FIELDS = {"image": "file_name", "captions": "text"}


def open_source(
    spec: str,
    *,
    image_size_px: int,
    fields: Mapping[str, str] | None = None,
    image_folder: str = "",
) -> Source:
    """Opens what `config.data.train` or `config.eval.source` names.

    | spec | what it is |
    |---|---|
    | `shapes:train`, `shapes:heldout` | scenes that the package draws |
    | `FILE.jsonl` | one example a line |
    | `FILE.csv`, `FILE.tsv`, `FILE.parquet` | a table |
    | `FILE.tar`, `cc3m-{0000..0331}.tar` | WebDataset shards |
    | `FILE.json`, `FILE.json:SPLIT`, `QUESTIONS.json,ANNOTATIONS.json` | see `AnnotationRows` |
    | a folder | images with .txt files beside them, or with `metadata.jsonl` |

    Files may be globs, and URLs of storage that fsspec reads.

    Args:
      spec: see above.
      image_size_px: side of the images that a procedural source draws.
      fields: example field -> column, where the columns have other names, see `rows.COLUMNS`.
      image_folder: that the paths of images are relative to; the file's own by default.

    Raises:
      UserError: the spec names no source, or it cannot be used.
    """
    name, _, split = spec.partition(":")
    if name == "shapes" and split in SPLIT_SIZES:
        return ShapesSource(split, image_size_px)
    fields = dict(fields or {})
    if os.path.isdir(spec) and os.path.isfile(os.path.join(spec, METADATA)):
        spec = os.path.join(spec, METADATA)
        fields = _METADATA_FIELDS | {field: column for field, column in fields.items() if column}
    columns = columns_of(fields)
    if image_folder and not storage.is_url(image_folder) and not os.path.isdir(image_folder):
        raise UserError(f"there is no folder {image_folder!r} for the paths of images.")
    rows = _open_rows(spec, columns, image_folder)
    if image_folder:
        rows.folder = storage.absolute(image_folder)
    return RowSource(rows, columns)


def _open_rows(spec: str, columns: Mapping[str, tuple[str, ...]], image_folder: str) -> Rows:
    if os.path.isdir(spec):
        return FolderRows(spec)
    path, split = spec, ""
    if ".json:" in spec:
        path, _, split = spec.rpartition(":")
    match os.path.splitext(path)[1].lower():
        case ".jsonl":
            _check_made(path)
            return JsonlRows(path, columns)
        case ".csv":
            return CsvRows(path)
        case ".tsv":
            return CsvRows(path, separator="\t")
        case ".parquet":
            return ParquetRows(path)
        case ".tar":
            return WebDatasetRows(path)
        case ".json":
            return AnnotationRows(path, split)
    known = ", ".join(f"shapes:{split}" for split in SPLIT_SIZES)
    raise UserError(
        f"no data source is called {spec!r}; the known ones are {known}, a folder of images, and "
        "paths that end in .jsonl, .csv, .tsv, .parquet, .tar or .json"
    )


def _check_made(path: str) -> None:
    folder = os.path.dirname(path)
    if os.path.basename(folder) in _MADE_BY_VERB and not os.path.exists(path):
        raise UserError(
            f"{path} does not exist yet: `jaxblip data {os.path.basename(folder)} --out={folder}` "
            "makes it."
        )
