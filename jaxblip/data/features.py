"""Image features on disk: what a frozen image encoder makes of the images of a source, read again.

A folder that `jaxblip data cache-features` wrote has the features of one source:

- `features.json`: the header, see `header_fields`; written last, so that there is none before.
- `images.npy`: int64 [3, images] of image ids in ascending order, the place of each image among the
  records, and its state (GOOD, or the stage in which it turned out to be bad).
- shards of array_record: of each image its views one behind the other, bfloat16 [tokens, width]
  each, as they come from the encoder, without the norm behind it, which trains. The record of an
  image that could not be used says why, as JSON.

Images are found by their ids, so that the texts of a source may change.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import BFloat16
from ml_collections import ConfigDict

from jaxblip.data import storage
from jaxblip.data.array_records import ArrayRecords
from jaxblip.data.mixture import TrainSource, configs_of_sources
from jaxblip.data.samples import SKIP_REASONS, BadSample, Source
from jaxblip.errors import UserError

HEADER, IMAGES = "features.json", "images.npy"
UNFINISHED = ".unfinished"  # the folder beside them, until the header is written
DTYPE = np.dtype(ml_dtypes.bfloat16)
GOOD, BAD_ROW, BAD_IMAGE = range(3)  # states of an image
# Fields of config.data that decide what is seen of an image; those of `Preprocess` come first.
OF_PREPROCESS = (
    "image_size_px",
    "interpolation",
    "crop_scale",
    "crop_aspect",
    "flip_probability",
    "randaugment",
    "max_image_pixels",
)
_OF_DATA = (*OF_PREPROCESS, "pixel_mean", "pixel_std")
_OF_TRAINING = ("initializer_range", "position_init", "remat")  # of config.model.vision
_REMEDY = "write them again with `jaxblip data cache-features`"


def fields_of(config: ConfigDict) -> dict[str, Any]:
    """The fields of a config that features follow from, but for the weights, as JSON has them."""
    fields = {f"data.{name}": config.data[name] for name in _OF_DATA}
    for name, value in config.model.vision.items():
        if name not in _OF_TRAINING:
            fields[f"model.vision.{name}"] = value
    return json.loads(json.dumps({"frozen_dtype": config.frozen_dtype, **fields}))


def is_random(data: ConfigDict) -> bool:
    """Whether training sees an image another way each time, by the fields of `config.data`."""
    whole = tuple(data.crop_scale) == (1.0, 1.0)
    return not whole or data.flip_probability not in (0.0, 1.0) or data.randaugment


def folder_of(folder: str, name: str) -> str:
    """Where in a run's folder the features of a source are; those of the only one are in it."""
    return os.path.join(folder, name) if name else folder


def num_examples(source: Source) -> int:
    """Of the source itself, not of its captions."""
    return len(getattr(source, "examples", source))


def shard_name(number: int, shards: int) -> str:
    return f"features-{number:05}-of-{shards:05}.array_record"


def with_features(config: ConfigDict, sources: Sequence[TrainSource]) -> list[TrainSource]:
    """The sources of a run that reads features in place of images.

    Raises:
      UserError: there are none, or they are of other images or of another encoder's config.
    """
    # The sources were opened before the weights were known, which give the config more values.
    of_sources = configs_of_sources(config)
    return [
        dataclasses.replace(each, source=_open(of_sources[each.name], each)) for each in sources
    ]


def check_encoder(sources: Sequence[TrainSource], reference: Mapping[str, str]) -> None:
    """Raises UserError unless the features are of the image encoder of this run.

    Args:
      reference: its source, revision and fingerprint (`initialize.frozen_params`).
    """
    for each in sources:
        encoder = each.source.header["encoder"]
        if encoder["fingerprint"] != reference["fingerprint"]:
            raise UserError(
                f"{each.source.folder} has features of other weights of the image encoder "
                f"({_named(encoder)}) than this run has ({_named(reference)}): name those in "
                f"config.init, or {_REMEDY}."
            )


def _named(encoder: Mapping[str, str]) -> str:
    return ", ".join(filter(None, (encoder["source"], encoder["revision"])))


class FeatureSource:
    """A `samples.Source` whose examples have "image_features" in the place of "image".

    These are a sequence of the image's views, of which each is read when it is asked for.

    Args:
      source: of the examples, whose images are not read.
      folder: with the features of its images.

    Attributes:
      header: what `features.json` says.
      folder: as given.
      has_instructions, problems: as of a source.

    Raises:
      UserError: there are no features, or none that can be read.
    """

    def __init__(self, source: Source, folder: str):
        self.folder, self.header = folder, read_header(folder)
        self._texts = source.without_images() if hasattr(source, "without_images") else source
        self.has_instructions = getattr(source, "has_instructions", False)
        lengths = self.header["shard_lengths"]
        names = [shard_name(number, len(lengths)) for number in range(len(lengths))]
        self._records = ArrayRecords(folder, names, lengths)
        self.problems = [
            *getattr(source, "problems", ()), *self._records.problems(lengths, _REMEDY)
        ]  # fmt: skip
        self._images = self._open_images()

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._texts[index]
        ids, places, states = self._images
        found = int(np.searchsorted(ids, example["image_id"]))
        if found == len(ids) or ids[found] != example["image_id"]:
            raise BadSample("no features", f"image {example['image_id']} is not in {self.folder}")
        views = _Views(self._records, int(places[found]), self.header)
        if states[found] == BAD_ROW:  # as the source itself would say it, before it reads the texts
            views[0]
        return example | {"image_features": views}

    def place(self, index: int) -> str:
        has_place = hasattr(self._texts, "place")
        return self._texts.place(index) if has_place else f"example {index}"

    def _open_images(self) -> np.ndarray:
        path = os.path.join(self.folder, IMAGES)
        try:
            images = np.load(path, mmap_mode="r", allow_pickle=False)
            if images.shape != (3, self.header["images"]) or images.dtype != np.int64:
                raise ValueError(f"{images.dtype} {images.shape}")
            return images
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.folder} has no {IMAGES} that can be read ({storage.phrase(error)}): "
                f"{_REMEDY}."
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_images"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._images = self._open_images()


class _Views(Sequence):
    """The views of one image, each read when it is asked for."""

    def __init__(self, records: ArrayRecords, place: int, header: Mapping[str, Any]):
        self._records, self._views = records, header["views"]
        self._first, self._shape = place * self._views, (header["tokens"], header["width"])

    def __len__(self) -> int:
        return self._views

    def __getitem__(self, view: int) -> BFloat16[np.ndarray, "tokens width"]:
        """Raises BadSample where the image could not be used, or its record cannot be read."""
        if not 0 <= view < self._views:
            raise IndexError(view)
        record = self._records[self._first + view]
        if len(record) != self._shape[0] * self._shape[1] * DTYPE.itemsize:
            raise _bad_sample(record, self._records.place(self._first + view))
        return np.frombuffer(record, DTYPE).reshape(self._shape)


def bad_record(bad: BadSample) -> bytes:
    """What stands in the place of features that there are none of."""
    return json.dumps([bad.reason, bad.detail]).encode()


def _bad_sample(record: bytes, place: str) -> BadSample:
    try:
        reason, detail = json.loads(record)
    except ValueError:
        reason = detail = None
    if reason in SKIP_REASONS and isinstance(detail, str):
        return BadSample(reason, detail)
    return BadSample("unreadable row", f"{place} of {len(record)} bytes")


def read_header(folder: str) -> dict[str, Any]:
    """What `features.json` says.

    Raises:
      UserError: there is none, or it is none.
    """
    path = os.path.join(folder, HEADER)
    if not os.path.isfile(path):
        is_begun = os.path.isdir(os.path.join(folder, UNFINISHED))
        raise UserError(
            f"the features in {folder} are unfinished: run `jaxblip data cache-features` again, "
            "which goes on where it was."
            if is_begun
            else f"{folder} has no image features: `jaxblip data cache-features --to={folder}` "
            "writes them, for the same --config and fields."
        )
    try:
        header = json.loads(storage.read_bytes(path))
        sizes = [header[name] for name in ("images", "tokens", "width", "views")]
        sizes += header["shard_lengths"]
        header["fields"].items(), header["encoder"]["fingerprint"], header["examples"]
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(f"sizes {sizes[:9]}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no header of image features ({storage.phrase(error)}): {_REMEDY}."
        ) from error
    return header


def _open(config: ConfigDict, each: TrainSource) -> FeatureSource:
    folder = folder_of(config.data.features, each.name)
    source = FeatureSource(each.source, folder)
    header, fields = source.header, fields_of(config)
    for name in sorted({*fields, *header["fields"]}):
        there, here = header["fields"].get(name), fields.get(name)
        if there != here:
            raise UserError(
                f"{folder} has features made with {name}={_written(there)}, and this run has "
                f"{_written(here)}: set --config.{name}={_written(there)}, or make others with "
                "`jaxblip data cache-features`."
            )
    if header["examples"] != num_examples(each.source):
        raise UserError(
            f"{folder} has features of {header['source']} with {header['examples']:,} examples, "
            f"and {config.data.train.source} has {num_examples(each.source):,}: name the data that "
            f"they are of, or {_REMEDY}."
        )
    return source


def _written(value: Any) -> str:
    """A value as the command line has it."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
