"""From the text of a config to a source of examples."""

from __future__ import annotations

import os
from collections.abc import Mapping

from jaxblip.data import easy_vqa, openmoji, shapes, storage
from jaxblip.data.annotations import AnnotationRows
from jaxblip.data.archives import WebDatasetRows
from jaxblip.data.folders import METADATA, FolderRows
from jaxblip.data.jsonl import JsonlRows
from jaxblip.data.rows import Rows, RowSource, columns_of
from jaxblip.data.samples import Source
from jaxblip.data.tables import CsvRows, ParquetRows
from jaxblip.data.tfds_rows import TfdsRows, data_set_folder, divide, open_tfds
from jaxblip.errors import UserError

# Data sets that need no file, and their splits.
_NAMED = {
    "shapes": tuple(shapes.SPLIT_SIZES),
    "openmoji": openmoji.SPLITS,
    "easy_vqa": easy_vqa.SPLITS,
    "easy_vqa_captions": easy_vqa.SPLITS,
}
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
    frames: int = 1,
) -> Source:
    """Opens what `config.data.train.source` or `config.eval.source` names.

    | spec | what it is |
    |---|---|
    | `shapes:train`, `shapes:heldout` | scenes that the package draws |
    | `openmoji:train`, `openmoji:heldout` | emoji with their names, drawn from packages |
    | `easy_vqa:train`, `easy_vqa:test` | questions about shapes, from the package easy-vqa |
    | `easy_vqa_captions:train`, `easy_vqa_captions:test` | captions that their answers make |
    | `tfds:NAME/CONFIG:SPLIT` | a data set of TensorFlow Datasets, see `TfdsRows` |
    | a folder, or `FOLDER:SPLIT` | one that TFDS or `jaxblip data prepare` wrote |
    | `FILE.jsonl` | one example a line |
    | `FILE.csv`, `FILE.tsv`, `FILE.parquet` | a table |
    | `FILE.tar`, `cc3m-{0000..0331}.tar` | WebDataset shards |
    | `FILE.json`, `FILE.json:SPLIT`, `QUESTIONS.json,ANNOTATIONS.json` | see `AnnotationRows` |
    | a folder | images with .txt files beside them, or with `metadata.jsonl` |

    Files may be globs, and URLs of storage that fsspec reads. Data sets by name, but those of TFDS,
    have the usual columns, whatever `fields` says.

    Args:
      spec: see above.
      image_size_px: side of the images that a procedural source draws.
      fields: example field -> column, where the columns have other names, see `choices.COLUMNS`.
      image_folder: that the paths of images are relative to; the file's own by default.
      frames: of a video, see `RowSource`.

    Raises:
      UserError: the spec names no source, or it cannot be used.
    """
    name, _, split = spec.partition(":")
    if split in _NAMED.get(name, ()):
        return _open_named(name, split, image_size_px)
    fields = dict(fields or {})
    if os.path.isdir(spec) and os.path.isfile(os.path.join(spec, METADATA)):
        spec = os.path.join(spec, METADATA)
        fields = _METADATA_FIELDS | {field: column for field, column in fields.items() if column}
    columns = columns_of(fields)
    if image_folder and not storage.is_url(image_folder) and not os.path.isdir(image_folder):
        raise UserError(f"there is no folder {image_folder!r} for the paths of images.")
    rows = _open_rows(spec, columns)
    if image_folder:
        rows.folder = storage.absolute(image_folder)
    return RowSource(rows, columns, frames=frames)


def _open_named(name: str, split: str, image_size_px: int) -> Source:
    match name:
        case "shapes":
            return shapes.ShapesSource(split, image_size_px)
        case "openmoji":
            return openmoji.OpenmojiSource(split, image_size_px)
        case "easy_vqa":
            return RowSource(easy_vqa.EasyVqaRows(split), columns_of({}))
        case "easy_vqa_captions":
            return RowSource(easy_vqa.EasyVqaCaptionRows(split), columns_of({}))


def _open_rows(spec: str, columns: Mapping[str, tuple[str, ...]]) -> Rows:
    if spec.startswith("tfds:"):
        return open_tfds(spec.removeprefix("tfds:"), columns)
    folder, split = (spec, "") if os.path.isdir(spec) else divide(spec)
    if os.path.isdir(folder):
        data_set = data_set_folder(folder)
        if data_set:
            return TfdsRows(data_set, split, columns)
        if not split:
            return FolderRows(folder)
        raise UserError(f"{folder} has no splits such as {split!r}: it is no data set of TFDS.")
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
    known = ", ".join(f"{name}:{split}" for name in _NAMED for split in _NAMED[name])
    raise UserError(
        f"no data source is called {spec!r}; the known ones are {known}, tfds:NAME:SPLIT, a local "
        "folder of images or of a data set of TFDS, and paths that end in .jsonl, .csv, .tsv, "
        ".parquet, .tar or .json"
    )


def _check_made(path: str) -> None:
    folder = os.path.dirname(path)
    if os.path.basename(folder) in _MADE_BY_VERB and not os.path.exists(path):
        raise UserError(
            f"{path} does not exist yet: `jaxblip data {os.path.basename(folder)} --out={folder}` "
            "makes it."
        )
