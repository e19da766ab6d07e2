"""The input pipeline: from sources to batches of NumPy arrays, at a position that is one number.

Example k of a run is a function of (sources, preprocessing, seed, k) alone, its augmentation
included. So a run goes on at `start_example` with any number of workers, any number of processes
and any batch size, and sees what it would have seen.
"""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import os
import signal
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from jaxblip.data.draws import Draw, generator, give_back
from jaxblip.data.preprocess import Preprocess
from jaxblip.data.samples import (
    CONVERSIONS,
    SKIP_REASONS,
    STAGES,
    BadSample,
    Source,
    counts_as_text,
)
from jaxblip.data.shared_images import SharedImages
from jaxblip.errors import RunStopped

_COUNTED = SKIP_REASONS + CONVERSIONS
# Examples to examine before their share of bad ones says anything (or the whole set, if smaller).
_MIN_EXAMINED = 100
# Bad examples in a row after which no good one is looked for any more.
_MAX_TRIES = 100
# Workers that die one after the other at the same batch, after which the run stops.
_MAX_DEATHS = 3
_DEATH = "terminated unexpectedly"  # in Grain's words
_worker_index: int | None = None  # of this process, where it is a worker


@dataclasses.dataclass(frozen=True)
class Part:
    """A source as the pipeline reads it.

    Attributes:
      source: examples, see `samples.Source`.
      preprocess: what to make of each; the fields of all parts are the same, and their shapes.
      name: of the part among several; "" alone.
      share: of all examples, to about a hundredth of the smallest one.
      shuffle_block: this many consecutive examples of the source keep together when it is
        shuffled, so that they are hard negatives of each other; a divisor of their number.
    """

    source: Source
    preprocess: Preprocess
    name: str = ""
    share: float = 1.0
    shuffle_block: int = 1

    @property
    def key(self) -> int:
        """A number that follows from the name, 0 alone: of random draws and of image ids."""
        return zlib.crc32(self.name.encode())

    @property
    def prefix(self) -> str:
        """Stands before what is counted of this part."""
        return f"{self.name}/" if self.name else ""


class _Row:
    """An example on its way into a batch; `arrays` is None where no good one was found.

    Its image goes to its place in the batch, `pixels`; `arrays` has the other fields.
    """

    def __init__(self, part: Part, number: int, index: int, state: dict[str, Any]):
        self.part, self.number = part, number
        self._index, self._state = index, state
        self.rng = generator(state)
        self.arrays: dict[str, np.ndarray] | None = None
        self.pixels: np.ndarray | None = None
        self.counts, self.conversions = Counter(), Counter()
        self.first_bad = ""

    def read(self) -> None:
        example = self.part.source[self._index]
        # Sources number their images independently of each other.
        self._example = example | {"image_id": example["image_id"] ^ self.part.key}

    def make_texts(self) -> None:
        self.arrays = self.part.preprocess.texts(self._example, self.rng)

    def open_image(self) -> None:
        preprocess = self.part.preprocess
        if "image" in preprocess.fields:
            image = self._example["image"]
            self._view = preprocess.open_image(image, self.rng, self.conversions)

    def make_image(self) -> None:
        preprocess = self.part.preprocess
        if "image" in preprocess.fields:
            self.pixels[...] = self._view()
        if "image_features" in preprocess.fields:
            views = self._example["image_features"]
            self.arrays["image_features"] = preprocess.image_features(views, self.rng)

    def find(self) -> None:
        """All stages from the beginning; a bad example is counted, and another drawn in its place.

        The replacement is drawn from the example's own generator, not the next one of the source:
        where a whole folder is missing, that would count the rest of it each time one of its images
        comes up, and show the first image behind it again and again.
        """
        self.rng.bit_generator.state = self._state
        for _ in range(_MAX_TRIES):
            self.conversions = Counter()
            try:
                for _, stage in _STAGES:
                    stage(self)
            except BadSample as bad:
                self.counts[bad.reason] += 1
                self.first_bad = self.first_bad or f"{bad.reason} ({self._detail(bad, stage)})"
                self._index = int(self.rng.integers(len(self.part.source)))
                self.arrays = None
            else:
                break

    def _detail(self, bad: BadSample, stage: Callable) -> str:
        source = self.part.source
        if stage is _Row.read or not hasattr(source, "place"):
            return bad.detail
        return f"{bad.detail}, of {source.place(self._index)}"


# Each with the one of STAGES that its time is counted in.
_STAGES = (
    ("reading", _Row.read),
    ("texts", _Row.make_texts),
    ("images", _Row.open_image),
    ("images", _Row.make_image),
)


@dataclasses.dataclass(frozen=True)
class _MakeBatch:
    """Draws to a batch, with what is counted of each part.

    `arrays` has at most images where a row found no good example, and `lost` says of which part.
    Nothing about the data may raise here, because it would end the worker.

    Attributes:
      parts: where the draws are from.
      shared: where a worker writes images; `shared_place` says where they are instead of `arrays`.
    """

    parts: Sequence[Part]
    shared: SharedImages | None

    def __call__(self, draws: Sequence[tuple[int, int, dict[str, Any]]]) -> dict[str, Any]:
        rows = [_Row(self.parts[number], number, *rest) for number, *rest in draws]
        fields, arrays, shared_place = self.parts[0].preprocess.fields, {}, []
        if "image" in fields:
            if self.shared:
                images, shared_place = self.shared.take(_worker_index)
            else:
                images = np.empty(_images_shape(self.parts, len(rows)), np.uint8)
            for row, pixels in zip(rows, images, strict=True):
                row.pixels = pixels
            if not shared_place:
                arrays["image"] = images
        # Stage by stage, because Python is three times slower right behind a decoder, which has
        # emptied the caches.
        bad, seconds = set(), dict.fromkeys(STAGES, 0.0)
        for name, stage in _STAGES:
            begin = time.perf_counter()
            for place, row in enumerate(rows):
                if place not in bad:
                    try:
                        stage(row)
                    except BadSample:
                        bad.add(place)
            seconds[name] += time.perf_counter() - begin
        for place in bad:
            rows[place].find()
        give_back(row.rng for row in rows)
        counted = self._counted(rows)
        if not counted["lost"].any():
            for field in fields:
                if field != "image":
                    arrays[field] = np.stack([row.arrays[field] for row in rows])
        counted["seconds"] = np.array(list(seconds.values()))
        return {"arrays": arrays, "shared_place": shared_place} | counted

    def _counted(self, rows: Sequence[_Row]) -> dict[str, Any]:
        counts = [Counter() for _ in self.parts]
        drawn, lost, first_bad = ([empty] * len(self.parts) for empty in (0, 0, ""))
        for row in rows:
            counts[row.number].update(row.counts)
            counts[row.number].update(row.conversions)
            drawn[row.number] += 1
            lost[row.number] += row.arrays is None
            first_bad[row.number] = first_bad[row.number] or row.first_bad
        return {
            "counts": np.array([[of_part[name] for name in _COUNTED] for of_part in counts]),
            "drawn": np.array(drawn),
            "first_bad": first_bad,
            "lost": np.array(lost),
        }


def _images_shape(parts: Sequence[Part], rows: int) -> tuple[int, ...]:
    return rows, *parts[0].preprocess.image_shape


def _begin_worker(worker_index: int, worker_count: int) -> None:
    """Notes which worker this is, and ends it when the process that started it dies, not before.

    That may be by SIGKILL: Grain's workers would wait for it for ever, and hold its terminal and
    its memory. And where a signal goes to all processes (Slurm's SIGTERM, Ctrl-C), it is the parent
    that knows what to do.
    """
    del worker_count
    global _worker_index
    _worker_index = worker_index
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    gc.freeze()  # modules stay: no collection need look through them again


def made_ahead(
    dataset: grain.MapDataset, num_workers: int, prefetch: int = 2
) -> grain.DatasetIterator:
    """What is in a data set, in its order; `close()` ends what makes it.

    Args:
      num_workers: processes that make it; 0 for threads of this one.
      prefetch: elements made ahead (by each worker).

    Raises:
      RuntimeError: from `next`, when a worker dies (`is_death`).
    """
    # A worker has no threads, which would empty each other's caches: what it makes ahead is queued.
    threads, ahead = (0, 0) if num_workers else (min(2, prefetch), prefetch)
    elements = dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    )
    if num_workers:
        # Shared memory takes 0.1 ms to set up and to remove: only for what takes longer to pickle.
        elements = grain.experimental.WithOptionsIterDataset(
            elements, grain.experimental.DatasetOptions(min_shm_size=2**17)
        )
        # Grain's workers read absl flags, which only absl's own `app.run` parses.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(
            num_workers=num_workers, per_worker_buffer_size=prefetch
        )
        elements = elements.mp_prefetch(options, worker_init_fn=_begin_worker)
    return iter(elements)


def is_death(error: RuntimeError) -> bool:
    """Whether it says that a worker process has died."""
    return _DEATH in str(error)


def _shuffled(size: int, block: int, seed: int) -> grain.MapDataset:
    """Indices of `size` examples, shuffled anew each epoch by blocks of `block` neighbours."""
    # Every block's j-th example in one order of the blocks, the same for all j, then interleaved.
    parts = [grain.MapDataset.range(j, size, block).shuffle(seed=seed) for j in range(block)]
    return grain.MapDataset.mix(parts) if block > 1 else parts[0]


def _without_images(part: Part) -> Part:
    if "image" in part.preprocess.fields or not hasattr(part.source, "without_images"):
        return part
    return dataclasses.replace(part, source=part.source.without_images())


def _draws(part: Part, number: int, seed: int) -> grain.MapDataset:
    """The endless draws of one part, each with a generator of its own."""
    seed ^= part.key
    return (
        _shuffled(len(part.source), part.shuffle_block, seed)
        .repeat()
        # Before any slice: the generator of an example follows from its index.
        .map_with_index(Draw(number, seed))
    )


class TrainBatches(Iterator[dict[str, np.ndarray]]):
    """Endless shuffled batches of this process, `{field: [batch_size / process_count, ...]}`.

    Every epoch of a part has an order of its own; several parts are interleaved by their shares. Of
    each global batch, process p of P takes every P-th example from p on. Bad samples are replaced
    and counted. A worker that dies is replaced, and nothing is lost. Use as a context manager, or
    call `close()`: workers and threads end with it.

    Args:
      parts: where examples come from.
      batch_size: over all processes; a multiple of `process_count`.
      seed: of order and augmentation.
      process_index, process_count: this process among those that train together.
      start_example: global number of examples consumed before; where to go on.
      num_workers: worker processes; 0 for threads in this one.
      max_bad_share: bad among examined examples of a part, above which the run stops.
      prefetch: batches made ahead (by each worker).
      counters: `state()` of the run that goes on, so that its counts do too.

    Attributes:
      examples_seen: global number of examples, those of earlier processes of the run included.
      examined, drawn: of each part by its name, the examples looked at and those in batches.
      skipped, converted: by reason; of several parts by "part/reason".
      seconds: that all workers spent on the batches made here, by stage.
      batches_made: by this object.
      restarts: how often workers were started anew because one had died.

    Raises:
      RunStopped: from `next`, when too many examples are bad, or workers die again and again.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        start_example: int = 0,
        num_workers: int = 0,
        max_bad_share: float = 0.05,
        prefetch: int = 2,
        counters: dict[str, Any] | None = None,
    ):
        if batch_size % process_count:
            raise ValueError(f"{process_count} processes do not divide batch_size={batch_size}")
        counters = counters or {}
        self.examples_seen = start_example
        self.restarts = int(counters.get("restarts", 0))
        for name in ("examined", "drawn", "skipped", "converted"):
            setattr(self, name, Counter(counters.get(name, {})))
        self.seconds, self.batches_made = Counter(), 0
        self._parts = [_without_images(part) for part in parts]
        self._first_bad: dict[str, str] = {}
        self._batch_size = batch_size
        self._max_bad_share = max_bad_share
        self._num_workers, self._prefetch = num_workers, prefetch
        self._process = process_index, process_count
        draws = [_draws(part, number, seed) for number, part in enumerate(parts)]
        self._draws = (
            draws[0]
            if len(parts) == 1
            else grain.MapDataset.mix(draws, [part.share for part in parts])
        )
        self._iterator = self._start()

    def __next__(self) -> dict[str, np.ndarray]:
        batch = self._next_batch()
        for number, part in enumerate(self._parts):
            self._count(part, int(batch["drawn"][number]), batch["counts"][number].tolist())
        self.seconds.update(dict(zip(STAGES, batch["seconds"].tolist(), strict=True)))
        self._stop_if_too_many_are_bad(batch)
        self.examples_seen += self._batch_size
        self.batches_made += 1
        arrays = batch["arrays"]
        if self._num_workers:
            # Plain arrays, since large ones lie in shared memory that Grain frees late.
            arrays = {field: np.array(rows) for field, rows in arrays.items()}
        if batch["shared_place"]:
            arrays["image"] = self._shared.read(batch["shared_place"])
        return arrays

    def state(self) -> dict[str, Any]:
        """JSON-able: `start_example=state["examples_seen"], counters=state` goes on from here.

        `examples_seen` is global, the counters are of this process. `sizes` are those of the
        sources: in one of another size the position means nothing.
        """
        return {
            "examples_seen": self.examples_seen,
            "examined": dict(self.examined),
            "drawn": dict(self.drawn),
            "skipped": dict(self.skipped),
            "converted": dict(self.converted),
            "restarts": self.restarts,
            "sizes": {part.name: len(part.source) for part in self._parts},
        }

    def shares(self) -> dict[str, float]:
        """The share of each part in what this process has drawn so far; {} where there is one."""
        if len(self._parts) == 1:
            return {}
        return {part.name: self.drawn[part.name] / self.drawn.total() for part in self._parts}

    def close(self) -> None:
        self._iterator.close()
        if self._shared:
            self._shared.close()

    def __enter__(self) -> TrainBatches:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def _start(self) -> grain.DatasetIterator:
        """Batches from the position on."""
        index, count = self._process
        rows = self._batch_size // count
        self._shared = None
        if self._num_workers and "image" in self._parts[0].preprocess.fields:
            # As many as wait in the queue of a worker and behind it, and those between.
            places = 2 * self._prefetch + 3
            shape = _images_shape(self._parts, rows)
            self._shared = SharedImages(self._num_workers, places, shape)
        dataset = self._draws[self.examples_seen + index :: count].batch(
            rows, drop_remainder=True, batch_fn=_MakeBatch(self._parts, self._shared)
        )
        return made_ahead(dataset, self._num_workers, self._prefetch)

    def _next_batch(self) -> dict[str, Any]:
        for _ in range(_MAX_DEATHS):
            try:
                return next(self._iterator)
            except RuntimeError as error:
                if not is_death(error):
                    raise
                self.restarts += 1
                self.close()
                self._iterator = self._start()
        raise RunStopped(
            f"Worker processes were killed {_MAX_DEATHS} times in a row while they prepared the "
            f"batch behind example {self.examples_seen}: look for a lack of memory (a smaller "
            "data.num_workers needs less), or set data.num_workers=0 to see what ends them."
        )

    def _count(self, part: Part, drawn: int, counts: Sequence[int]) -> None:
        self.drawn[part.name] += drawn
        self.examined[part.name] += drawn
        for name, count in zip(_COUNTED, counts, strict=True):
            if count and name in SKIP_REASONS:
                self.skipped[part.prefix + name] += count
                self.examined[part.name] += count
            elif count:
                self.converted[part.prefix + name] += count

    def _stop_if_too_many_are_bad(self, batch: dict[str, Any]) -> None:
        for number, part in enumerate(self._parts):
            if first := batch["first_bad"][number]:
                self._first_bad.setdefault(part.name, first)
            skipped = Counter({r: self.skipped[part.prefix + r] for r in SKIP_REASONS})
            bad, examined = skipped.total(), self.examined[part.name]
            judged = examined >= min(_MIN_EXAMINED, len(part.source))
            if batch["lost"][number]:
                what = f"none of {_MAX_TRIES} in a row could be used"
            elif judged and bad > self._max_bad_share * examined:
                what = f"above data.max_bad_share={self._max_bad_share:g}"
            else:
                continue
            of_part = f" of {part.name}" if part.name else ""
            first = self._first_bad.get(part.name)
            raise RunStopped(
                f"{bad} of {examined} examples{of_part} ({bad / examined:.1%}) were bad: "
                f"{counts_as_text(+skipped)}, {what}{f'; one of them: {first}' if first else ''}; "
                "fix the data or raise data.max_bad_share"
            )
