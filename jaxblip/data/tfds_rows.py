"""Data sets of TensorFlow Datasets in array_record, read at random and without TensorFlow."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxblip.data import storage
from jaxblip.data.array_records import ArrayRecords
from jaxblip.data.choices import COLUMNS
from jaxblip.data.samples import BadSample
from jaxblip.errors import UserError

_FILES = ("dataset_info.json", "features.json")  # of every data set that TFDS has prepared
_VERSION = re.compile(r"\d+\.\d+\.\d+")


class TfdsRows:
    """The examples of a prepared data set, one of its splits or a part of it.

    Nested features are columns of dotted names: of `captions: Sequence({id, text})` a row has
    `captions.id` and `captions.text`, a list each. Images stay the bytes that they are stored as;
    other bytes are UTF-8 text. Nothing else is decoded, so that a label is its number.

    All shards are looked at when the data set is opened. The rows of those that cannot be read are
    bad samples, each, so that the others keep their places.

    Args:
      folder: that holds `dataset_info.json` and `features.json`.
      split: as in TFDS, such as "train", "train[:50%]" or "train+val"; by default the only one, or
        the one that is called train.
      columns: of the example fields, see `rows.columns_of`.

    Attributes:
      folder: that paths of images are relative to, where a data set has such.
      problems: a sentence about the shards that cannot be read, if there are any.

    Raises:
      UserError: it is no data set in array_record, lacks the split or a column that the field map
        names, or none of its shards can be read.
    """

    def __init__(self, folder: str, split: str, columns: Mapping[str, tuple[str, ...]]):
        self.folder = os.path.abspath(folder)
        info = _info(folder)
        instructions = _instructions(info, split, folder)
        features = dict(_leaves(info.features))
        _check_names(columns, features, folder)
        self._binary = _binary(features, columns["image"])
        self._parser = _parser(info.features)
        self._records = ArrayRecords(
            folder,
            [os.path.relpath(each.filename, folder) for each in instructions],
            [each.take for each in instructions],
            [each.skip for each in instructions],
        )
        sizes = [each.examples_in_shard for each in instructions]
        self.problems = self._records.problems(sizes, "prepare the data set again")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._records[index]
        try:
            example = self._parser.parse_example(record)
        except Exception as error:  # parsers raise nearly anything on hostile bytes
            raise BadSample("unreadable row", f"{self.place(index)}: {error!s:.200}") from error
        return {name: _plain(value, name not in self._binary) for name, value in _flatten(example)}

    def place(self, index: int) -> str:
        return self._records.place(index)


def open_tfds(spec: str, columns: Mapping[str, tuple[str, ...]]) -> TfdsRows:
    """The rows of "NAME", "NAME/CONFIG" or "NAME/CONFIG/VERSION", with ":SPLIT" or without.

    They are looked for in $TFDS_DATA_DIR, or else in ~/tensorflow_datasets.
    """
    name, split = divide(spec)
    root = os.path.expanduser(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    folder = data_set_folder(os.path.join(root, *name.split(":")))  # NAME:VERSION, as in TFDS
    if not name or folder is None:
        raise UserError(
            f"the data set tfds:{name} is not in {root}, which TFDS_DATA_DIR sets: "
            + _how_to_make(name, f"tfds build {name} --file_format=array_record")
        )
    return TfdsRows(folder, split, columns)


def _how_to_make(name: str, command: str) -> str:
    return (
        f'make it by tensorflow_datasets.builder("{name}", file_format="array_record")'
        f".download_and_prepare(), or where TensorFlow is installed, by `{command}`."
    )


def divide(spec: str) -> tuple[str, str]:
    """Name and split of "NAME:SPLIT", where the split may have colons in brackets, or be ""."""
    before, bracket, part = spec.partition("[")
    name, colon, split = before.rpartition(":")
    return (name, split + bracket + part) if colon else (spec, "")


def data_set_folder(folder: str) -> str | None:
    """The folder of the data set that is `folder` or lies in it, as NAME/CONFIG/VERSION at most.

    Of several versions it is the newest. None where there is none.

    Raises:
      UserError: there are several data sets.
    """
    found = list(_data_sets(folder, depth=3))
    parents = {os.path.dirname(each) for each in found}
    if len(found) > 1 and (len(parents) > 1 or not all(map(_version, found))):
        names = ", ".join(os.path.relpath(each, folder) for each in found[:10])
        raise UserError(f"{folder} holds several data sets: name one of {names}.")
    return max(found, key=_version, default=None)


def _data_sets(folder: str, depth: int) -> Iterator[str]:
    if all(os.path.isfile(os.path.join(folder, name)) for name in _FILES):
        yield folder
    elif depth:
        try:
            with os.scandir(folder) as entries:
                inside = sorted(entry.path for entry in entries if entry.is_dir())
        except OSError:
            return
        for each in inside:
            if not os.path.basename(each).startswith((".", "incomplete.")):
                yield from _data_sets(each, depth - 1)


def _version(folder: str) -> list[int]:
    """The numbers of a folder's name; none where it is not that of a version."""
    name = os.path.basename(folder)
    return [int(part) for part in name.split(".")] if _VERSION.fullmatch(name) else []


def _info(folder: str):
    """What TFDS knows of a data set, set to array_record."""
    try:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core import file_adapters
    except ImportError as error:
        raise UserError(
            f"{folder} is a data set of TFDS: pip install tensorflow-datasets ({error})."
        ) from error
    try:
        info = tfds.builder_from_directory(folder).info
    except Exception as error:  # TFDS raises nearly anything on files that it did not write
        reason = storage.phrase(error)
        raise UserError(f"{folder} is no data set that TFDS can read: {reason}.") from error
    wanted = file_adapters.FileFormat.ARRAY_RECORD
    if info.file_format is not wanted:
        if wanted not in info.alternative_file_formats:
            raise UserError(
                f"{folder} is in the format {info.file_format.value}, which has no random access: "
                + _how_to_make(
                    info.name,
                    f"tfds convert_format --dataset_version_dir={folder} "
                    "--out_file_format=array_record",
                )
            )
        info.set_file_format(wanted, override=True, override_if_initialized=True)
    return info


def _instructions(info, split: str, folder: str):
    """Files and their records that make up a split."""
    names = list(info.splits)
    if not names:
        raise UserError(f"{folder} has no splits: prepare the data set again.")
    split = split or (names[0] if len(names) == 1 else "train")
    try:
        instructions = info.splits[split].file_instructions
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{folder} has no split {split!r}; its splits are {', '.join(names)}, and parts of "
            f"them are written as {names[0]}[:50%]."
        ) from error
    instructions = [each for each in instructions if each.take > 0]
    if not instructions:
        raise UserError(f"{folder} has no examples in {split!r}.")
    return instructions


def _leaves(feature, name: str = "") -> Iterator[tuple[str, Any]]:
    """Columns with their features."""
    from tensorflow_datasets import features

    while isinstance(feature, features.Sequence):
        feature = feature.feature
    if isinstance(feature, features.FeaturesDict):
        for key, inner in feature.items():
            yield from _leaves(inner, f"{name}.{key}" if name else key)
    else:
        yield name, feature


def _binary(features: Mapping[str, Any], images: tuple[str, ...]) -> frozenset[str]:
    """Columns whose bytes are no text.

    A tensor of bytes says nothing about that, so what is used as an image is one, if it is not
    expressly a text: then it is a path.
    """
    from tensorflow_datasets.core.features import Image, Text

    return frozenset(
        name
        for name, feature in features.items()
        if isinstance(feature, Image) or (name in images and not isinstance(feature, Text))
    )


def _parser(features):
    from tensorflow_datasets.core.example_parser import ExampleParserNp

    return ExampleParserNp(features.get_serialized_info())


def _check_names(columns: Mapping[str, tuple[str, ...]], features, folder: str) -> None:
    has = ", ".join(sorted(features))
    for field, names in columns.items():
        if names == COLUMNS[field] or not names or names[0] in features:
            continue
        near = difflib.get_close_matches(names[0], features, 1)
        hint = f"did you mean {near[0]}?" if near else f"it has {has}."
        raise UserError(f"{folder} has no column {names[0]} (data.fields.{field}): {hint}")
    found = {field for field, names in columns.items() if not features.keys().isdisjoint(names)}
    if "image" not in found or found.isdisjoint(("captions", "answers", "output")):
        raise UserError(
            f"{folder} has the columns {has}: say in data.fields which is the image and which are "
            "the texts, such as --config.data.fields.captions=captions.text."
        )


def _flatten(example: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in example.items():
        inner = f"{name}.{key}" if name else key
        if isinstance(value, Mapping):
            yield from _flatten(value, inner)
        else:
            yield inner, value


def _plain(value: Any, text: bool) -> Any:
    """Lists for arrays and, where `text`, texts for bytes."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(each, text) for each in value]
    return value.decode("utf-8", errors="replace") if text and isinstance(value, bytes) else value
