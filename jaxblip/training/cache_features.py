"""`jaxblip data cache-features`: the output of a frozen image encoder for all images of a run."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import BFloat16
from ml_collections import ConfigDict

from jaxblip import sharding
from jaxblip.data import features, run_sources, run_tokenizers, storage
from jaxblip.data.image_views import distinct_images, view_batches
from jaxblip.data.mixture import TrainSource, configs_of_sources
from jaxblip.data.prepare.folder import Folder
from jaxblip.data.samples import BadSample, Source, counts_as_text
from jaxblip.errors import RunStopped, UserError
from jaxblip.models.vit import VisionTransformer
from jaxblip.tasks import FROM_FEATURES, Task, make_task
from jaxblip.tasks.parts import trains
from jaxblip.training.adopt import adopt_sources
from jaxblip.training.initialize import frozen_params
from jaxblip.training.state import Params

_SETTINGS, _IMAGES = "settings.json", "images.npy"  # in the folder of what is unfinished
_WRITER_OPTIONS = "group_size:1,uncompressed"  # noise to a compressor; records are read alone
_WHOLE_BATCHES = 128  # a multiple of these images is in a shard, so that most batches are full
_MIN_EXAMINED = 100  # images, before their share of bad ones says anything
_PROGRESS_S = 10.0


@dataclasses.dataclass(frozen=True)
class _Job:
    """The features of one source, and where they are written.

    Attributes:
      config: the run's, with the fields of the source.
      source: of the images.
      images: [2, images], see `distinct_images`.
      settings: what must be the same where the work goes on.
      shape: tokens and width of an image's features.
    """

    config: ConfigDict
    source: Source
    folder: Folder
    images: np.ndarray
    settings: dict[str, Any]
    shape: tuple[int, int]

    @property
    def work(self) -> Folder:
        return self.folder / features.UNFINISHED

    @property
    def views(self) -> int:
        return self.settings["views"]

    @property
    def record_bytes(self) -> int:
        return math.prod(self.shape) * features.DTYPE.itemsize

    @property
    def shard_edges(self) -> list[int]:
        """The first image of each shard, and behind the last one."""
        count = max(1, int(self.settings["shard_mb"] * 1e6 / self.views / self.record_bytes))
        if count > _WHOLE_BATCHES:
            count -= count % _WHOLE_BATCHES
        return [*range(0, self.images.shape[1], count), self.images.shape[1]]

    def left(self) -> list[int]:
        """The shards that are not written yet."""
        there = self.work.names()
        return [n for n in range(len(self.shard_edges) - 1) if f"{n:06}.json" not in there]


def cache_features(
    config: ConfigDict,
    to: str,
    views: int = 1,
    shard_mb: float = 1000.0,
    say: Callable[[str], None] = print,
) -> None:
    """Writes the features of each image of `config.data.train.source`, see `data.features`.

    Each image is read and encoded once, `eval.batch_size` at a time over the devices of this
    process; several processes share the shards. Killed and started again it goes on with the shards
    that are missing, and ends with the same bytes. A mixture has a folder for each of its sources.

    Args:
      to: the folder, local or mounted.
      views: of each image: 1 where the preprocessing draws nothing, or a number of random ones.
      shard_mb: size of a shard, in millions of bytes.
      say: gets what is said meanwhile.

    Raises:
      UserError: the config has no frozen encoder or another preprocessing, or the folder is used or
        full.
      RunStopped: too many images are bad.
    """
    _check(config, to, views)
    sources = run_sources.open_train_sources(config)
    config = run_tokenizers.with_some_vocabulary(adopt_sources(config).config)
    task = make_task(config)
    mesh = sharding.make_mesh({"data": -1}, jax.local_devices())
    params, references = frozen_params(task, mesh, ["vision"])
    encode = _encoder(task, params, mesh)
    if jax.process_index():
        say = lambda line: None  # noqa: E731
    for each in sources:
        if each.name:
            say(f"{each.name}:")
        job = _begin(task, each, to, views, shard_mb, references["vision"], say)
        if job is not None:
            _write(job, encode, mesh, say)
    say(f"To train with them: --config.data.features={to}")


def _check(config: ConfigDict, to: str, views: int) -> None:
    if config.task not in FROM_FEATURES:
        raise UserError(
            f"The task {config.task} does not train from image features: those of "
            f"{', '.join(FROM_FEATURES)} do."
        )
    if trains(config, "vision"):
        raise UserError(
            "The image encoder trains, so that its output changes with each step: add vision to "
            "config.frozen, and let neither config.trainable nor config.lora.parts name it."
        )
    if views < 1:
        raise UserError(f"--views={views} is no number of views: give 1 or more.")
    if storage.is_url(to):
        raise UserError(f"--to={to} is a URL: name a folder, local or mounted.")
    for name, each in configs_of_sources(config).items():
        of_name, random = f" of {name}" if name else "", features.is_random(each.data)
        if random and views == 1:
            raise UserError(
                f"Training{of_name} sees another part of an image each time: set "
                "--config.data.crop_scale=1,1 --config.data.flip_probability=0 "
                "--config.data.randaugment=False, or give --views=N for N random views of each."
            )
        if views > 1 and not random:
            raise UserError(
                f"All {views} views of an image{of_name} would be the same, since nothing about "
                "them is random: leave out --views, or set data.crop_scale or "
                "data.flip_probability."
            )


def _encoder(task: Task, params: Params, mesh: Mesh) -> Callable[[np.ndarray], jax.Array]:
    """uint8 images to bfloat16 [batch, tokens, width], split over the devices."""
    model = VisionTransformer(task.model.vision_config, task.dtype)

    def encode(params: Params, images: jax.Array) -> jax.Array:
        tokens = model.apply({"params": params["vision"]}, task.normalize_images(images))
        return tokens.astype(features.DTYPE)

    rows = sharding.batch_sharding(mesh)
    compiled = jax.jit(
        encode, in_shardings=(sharding.tree_shardings(params, mesh), rows), out_shardings=rows
    )
    return lambda images: compiled(params, jax.device_put(images, rows))


def _begin(
    task: Task,
    each: TrainSource,
    to: str,
    views: int,
    shard_mb: float,
    encoder: dict[str, str],
    say: Callable[[str], None],
) -> _Job | None:
    """Checks the folder and notes there what is to be written; None where it is all there."""
    config = configs_of_sources(task.config)[each.name]
    source = getattr(each.source, "examples", each.source)  # each image, not each caption
    vision = task.model.vision_config
    settings = {
        "source": config.data.train.source,
        "examples": len(source),
        "views": views,
        "seed": config.seed,
        "shard_mb": shard_mb,
        "compute_dtype": config.compute_dtype,
        "encoder": encoder,
        "fields": features.fields_of(config),
    }
    folder = Folder(features.folder_of(os.path.abspath(to), each.name))
    work = folder / features.UNFINISHED
    _everybody_is_here()
    if features.HEADER in folder.names():
        _check_same(folder, features.read_header(folder.path), settings)
        say(f"{folder.path} has these features already.")
        return None
    if _SETTINGS in work.names():
        _check_same(folder, work.read_json(_SETTINGS), settings)
    elif jax.process_index() == 0:
        _start(folder, source, settings, say)
    _everybody_is_here()
    images = work.read_array(_IMAGES)
    job = _Job(config, source, folder, images, settings, (vision.num_tokens, vision.width))
    _check_space(job, say)
    return job


def _start(
    folder: Folder, source: Source, settings: dict[str, Any], say: Callable[[str], None]
) -> None:
    work = folder / features.UNFINISHED
    if there := folder.names() - {features.UNFINISHED}:
        raise UserError(
            f"{folder.path} has other files in it, such as {min(there)}: name an empty folder with "
            "--to."
        )
    work.make()
    say(f"Looking for the images of {settings['examples']:,} examples.")
    images = distinct_images(source)
    if not images.size:
        raise UserError(f"{settings['source']} has no example that can be read.")
    work.write_array(_IMAGES, images)
    work.write_json(_SETTINGS, settings)  # last: with it there is all to go on with


def _check_same(folder: Folder, before: dict[str, Any], settings: dict[str, Any]) -> None:
    flat = [
        {**each, **each["fields"], "fields": None, "encoder": each["encoder"]["fingerprint"]}
        for each in (before, settings)
    ]
    for name, value in flat[1].items():
        if flat[0].get(name) != value:
            there, here = flat[0].get(name), value
            if name == "encoder":
                there, here = before[name]["source"], f"{settings[name]['source']} as it is now"
            raise UserError(
                f"{folder.path} has features of {name}={there}, not {here}: name another folder "
                "with --to, or remove what is there."
            )


def _check_space(job: _Job, say: Callable[[str], None]) -> None:
    """Says how large the features are, before any is computed."""
    path = next(p for p in (Path(job.folder.path), *Path(job.folder.path).parents) if p.exists())
    images, free, edges = job.images.shape[1], shutil.disk_usage(path).free, job.shard_edges
    left, of_image = job.left(), job.views * job.record_bytes
    needed = of_image * sum(edges[number + 1] - edges[number] for number in left)
    written = len(edges) - 1 - len(left)
    tokens, width = job.shape
    say(
        f"{images:,} images of {job.settings['examples']:,} examples, {job.views} "
        f"view{'s' * (job.views > 1)} of {tokens} x {width} values each: "
        f"{_size(images * of_image)} in {len(edges) - 1:,} shard{'s' * (len(edges) > 2)}"
        + f", of which {written:,} are written already" * bool(written)
        + f"; {_size(free)} are free in {job.folder.path}."
    )
    if needed > free:
        raise UserError(
            f"{job.folder.path} has {_size(free)} free, and the features that are left need "
            f"{_size(needed)}: make room, or name a folder elsewhere with --to."
        )


def _write(
    job: _Job,
    encode: Callable[[np.ndarray], jax.Array],
    mesh: Mesh,
    say: Callable[[str], None],
) -> None:
    """Writes the shards that are left, and then the header."""
    edges, views = job.shard_edges, job.views
    shards = job.left()[jax.process_index() :: jax.process_count()]
    if jax.process_index() == 0:
        job.folder.sweep()
    _everybody_is_here()
    batch_size = -(-job.config.eval.batch_size // mesh.size) * mesh.size
    rows = {n: _cut(edges[n] * views, edges[n + 1] * views, batch_size) for n in shards}
    tally = _Tally(job, sum(edges[n + 1] - edges[n] for n in shards), say)
    all_rows = list(itertools.chain(*rows.values()))
    with contextlib.closing(_encoded(job, encode, all_rows, batch_size)) as encoded:
        for shard in shards:
            _write_shard(job, shard, rows[shard], encoded, tally)
    tally.end()
    _everybody_is_here()
    if jax.process_index() == 0:
        _finish(job, say)
    _everybody_is_here()


def _write_shard(
    job: _Job,
    shard: int,
    rows: Sequence[tuple[int, int]],
    encoded: Iterator[tuple[np.ndarray, dict[str, Any]]],
    tally: _Tally,
) -> None:
    """Writes a shard, and then 000003.json with the number of its images and the bad ones."""
    edges, found = job.shard_edges, {}
    with job.folder.new(features.shard_name(shard, len(edges) - 1)) as path:
        writer = ArrayRecordWriter(path, _WRITER_OPTIONS)
        for begin, end in rows:
            tokens, batch = next(encoded)
            bad = {begin + place: rest for place, *rest in batch["bad"]}
            for row in range(begin, end):
                if row in bad:
                    stage, reason, detail = bad[row]
                    writer.write(features.bad_record(BadSample(reason, detail)))
                    found[row // job.views] = stage, reason
                else:
                    writer.write(tokens[row - begin].tobytes())
            tally.add(begin, end, bad, batch["converted"])
        writer.close()
    job.work.write_json(
        f"{shard:06}.json",
        {
            "images": edges[shard + 1] - edges[shard],
            "bad": [[image, stage] for image, (stage, _) in found.items()],
            "skipped": Counter(reason for _, reason in found.values()),
        },
    )


def _cut(begin: int, end: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, end)) for start in range(begin, end, size)]


def _encoded(
    job: _Job,
    encode: Callable[[np.ndarray], jax.Array],
    rows: Sequence[tuple[int, int]],
    batch_size: int,
) -> Iterator[tuple[BFloat16[np.ndarray, "batch tokens width"], dict[str, Any]]]:
    """Features with the batch that they are of, one batch ahead, so that devices need not wait."""
    ahead = collections.deque()
    found = view_batches(job.config, job.source, job.images, job.views, batch_size, rows)
    with contextlib.closing(found) as batches:
        for batch in batches:
            ahead.append((encode(np.array(batch.pop("image"))), batch))
            if len(ahead) == 2:
                tokens, batch = ahead.popleft()
                yield np.asarray(tokens), batch
        for tokens, batch in ahead:
            yield np.asarray(tokens), batch


def _finish(job: _Job, say: Callable[[str], None]) -> None:
    """Makes a folder with all its shards one that can be read."""
    written = [job.work.read_json(f"{n:06}.json") for n in range(len(job.shard_edges) - 1)]
    states = np.full(job.images.shape[1], features.GOOD)
    skipped = Counter()
    for each in written:
        skipped.update(each["skipped"])
        for image, stage in each["bad"]:
            states[image] = (features.BAD_ROW, features.BAD_IMAGE)[stage]
    order = np.argsort(job.images[0])
    images = np.stack([job.images[0][order], order, states[order]])
    job.folder.write_array(features.IMAGES, images)
    header = {
        **job.settings,
        "images": job.images.shape[1],
        "skipped": skipped,
        "tokens": job.shape[0],
        "width": job.shape[1],
        "dtype": features.DTYPE.name,
        "shard_lengths": [each["images"] * job.views for each in written],
    }
    job.folder.write_json(features.HEADER, header)
    job.work.remove()
    good = job.images.shape[1] - skipped.total()
    left_out = f"; skipped: {counts_as_text(skipped)}" if skipped else ""
    say(f"Written: {job.folder.path}, features of {good:,} images{left_out}.")


class _Tally:
    """Counts what is done, and says now and then how far the work is."""

    def __init__(self, job: _Job, images: int, say: Callable[[str], None]):
        self._job, self._images, self._say = job, images, say
        self._rows, self._bad, self._converted = 0, Counter(), Counter()
        self._first_bad = ""
        self._begin = self._said = time.monotonic()

    def add(
        self,
        begin: int,
        end: int,
        bad: dict[int, tuple[int, str, str]],
        converted: dict[str, int],
    ) -> None:
        """Counts the rows from `begin` to `end`.

        Raises:
          RunStopped: too many images are bad.
        """
        self._rows += end - begin
        self._converted.update(converted)
        for row, (_, reason, detail) in bad.items():
            self._bad[reason] += row % self._job.views == 0
            self._first_bad = self._first_bad or detail
        examined, limit = self._rows // self._job.views, self._job.config.data.max_bad_share
        judged = examined >= min(_MIN_EXAMINED, self._images)
        if judged and self._bad.total() > limit * examined:
            raise RunStopped(
                f"{self._bad.total()} of {examined} images were bad: {counts_as_text(self._bad)}, "
                f"above data.max_bad_share={limit:g}; one of them: {self._first_bad}; fix the data "
                "or raise data.max_bad_share"
            )
        now = time.monotonic()
        if now - self._said >= _PROGRESS_S:
            self._said, rate = now, self._rate(now)
            left = (self._images - examined) / rate / 60
            self._say(
                f"encoded {examined:,} of {self._images:,}  {rate:,.1f} images a second  "
                f"left {left:.0f} min"
            )

    def end(self) -> None:
        if self._rows:
            now = time.monotonic()
            self._say(f"{now - self._begin:.0f} s, {self._rate(now):,.1f} images a second.")
        if self._converted:
            self._say(f"converted: {counts_as_text(self._converted)}")

    def _rate(self, now: float) -> float:
        return self._rows / self._job.views / (now - self._begin)


def _everybody_is_here() -> None:
    """Waits for the other processes, where there are any."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("cache_features")


def _size(number: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            break
        number /= 1000
    else:
        unit = "TB"
    return f"{number:,.0f} {unit}" if unit == "bytes" else f"{number:,.1f} {unit}"
