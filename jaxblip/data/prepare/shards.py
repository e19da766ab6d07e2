"""The third pass: what is left, in the order of the source, into shards of array_record."""

from __future__ import annotations

import bisect
import functools
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from jaxblip.data.prepare.folder import Folder
from jaxblip.data.prepare.plan import read_plan
from jaxblip.data.prepare.scan import Job, read_image, read_lines
from jaxblip.data.rows import COLUMNS

NAME = "jaxblip"  # of the data set, with which the names of its files begin
INFO = "dataset_info.json"  # what makes a folder a data set
_FORMAT = "array_record"
# Images are compressed as they are. Groups of one record are read alone.
_WRITER_OPTIONS = "group_size:1,uncompressed"


def plan_shards(kept: Iterable[int], size: int, job: Job) -> int:
    """Notes where shards begin, and returns how many there are: as many as `size` bytes fill.

    Args:
      kept: examples that are left of each block.
    """
    starts = np.cumsum([0, *kept]).tolist()
    shards = max(1, min(starts[-1], -int(-size // (job.settings.shard_mb * 1e6))))
    job.work.write_json("shards.json", {"shards": shards, "starts": starts})
    return shards


def write_shard(number: int, job: Job) -> None:
    """Writes a shard, and then shards/000003.json with its `examples` and `bytes`."""
    shards = _plan(job.work, job.run)["shards"]
    features = features_of(job.columns)
    serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    examples = size = 0
    with job.folder.new(shard_name(job.settings.split, number, shards)) as path:
        writer = ArrayRecordWriter(path, _WRITER_OPTIONS)
        for example in _examples(number, job):
            record = serializer.get_tf_example(features.encode_example(example))
            # In the order of names, which a plain SerializeToString does not promise.
            record = record.SerializeToString(deterministic=True)
            writer.write(record)
            examples, size = examples + 1, size + len(record)
        writer.close()
    (job.work / "shards").write_json(f"{number:06}.json", {"examples": examples, "bytes": size})


def features_of(columns: tuple[str | None, str]) -> tfds.features.FeaturesDict:
    """The features of the data set, of names that `rows.COLUMNS` knows."""
    asked, texts = columns
    return tfds.features.FeaturesDict({
        COLUMNS["image"][0]: tfds.features.Image(),
        **({asked: tfds.features.Text()} if asked else {}),
        texts: tfds.features.Sequence(tfds.features.Text()),
        COLUMNS["image_id"][0]: np.int64,
    })  # fmt: skip


def shard_name(split: str, number: int, shards: int) -> str:
    return f"{NAME}-{split}.{_FORMAT}-{number:05}-of-{shards:05}"


def write_info(
    folder: Folder, columns: tuple[str | None, str], splits: Mapping[str, Mapping[str, Any]]
) -> None:
    """Makes a folder with shards a data set.

    Args:
      splits: name -> its `shard_lengths` and `bytes`.
    """
    with tempfile.TemporaryDirectory() as local:
        template = tfds.core.ShardedFileTemplate(
            data_dir=local, dataset_name=NAME, filetype_suffix=_FORMAT
        )
        identity = tfds.core.dataset_info.DatasetIdentity(
            name=NAME, version=tfds.core.Version("1.0.0"), data_dir=local, module_name=""
        )
        info = tfds.core.DatasetInfo(builder=identity, features=features_of(columns))
        info.set_file_format(_FORMAT)
        info.set_splits(tfds.core.splits.SplitDict([
            tfds.core.SplitInfo(
                name=name, shard_lengths=split["shard_lengths"], num_bytes=split["bytes"],
                filename_template=template.replace(split=name),
            )
            for name, split in sorted(splits.items())
        ]))  # fmt: skip
        info.write_to_directory(local)
        files = sorted(path for path in Path(local).iterdir() if path.name != INFO)
        for path in [*files, Path(local, INFO)]:
            folder.write(path.name, path.read_bytes())


def splits_of(folder: Folder) -> list[str]:
    """The splits of the data set in a folder, none where there is no data set."""
    if INFO not in folder.names():
        return []
    return [split["name"] for split in folder.read_json(INFO)["splits"]]


def _examples(shard: int, job: Job) -> Iterator[dict[str, Any]]:
    plan = _plan(job.work, job.run)
    starts, shards = plan["starts"], plan["shards"]
    first, end = (starts[-1] * edge // shards for edge in (shard, shard + 1))
    number = bisect.bisect_right(starts, first) - 1
    while first < end:
        decided = read_plan(number, job)
        lines = [
            line for line in read_lines(number, job) if str(line["index"]) not in decided["dropped"]
        ]
        for line in lines[first - starts[number] : end - starts[number]]:
            texts = line["texts"] + decided["added"].get(str(line["index"]), [])
            yield _example(line, texts, read_image(line, number, job), job)
        number += 1
        first = starts[number]


def _example(line: dict[str, Any], texts: list[str], image: bytes, job: Job) -> dict[str, Any]:
    asked, column = job.columns
    instruction = {asked: line["asked"]} if asked else {}
    return {
        COLUMNS["image"][0]: image, **instruction, column: texts, COLUMNS["image_id"][0]: line["id"]
    }  # fmt: skip


@functools.lru_cache(maxsize=1)
def _plan(work: Folder, run: str) -> dict[str, Any]:
    return work.read_json("shards.json")
