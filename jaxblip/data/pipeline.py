"""The input pipeline: from a source to batches of NumPy arrays, at a position that is one number.

Example k of a run is a function of (source, preprocessing, seed, k) alone, its augmentation
included. So a run goes on at `start_example` with any number of workers, any number of processes
and any batch size, and sees what it would have seen.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from jaxblip.data.preprocess import Preprocess
from jaxblip.data.samples import CONVERSIONS, SKIP_REASONS, BadSample, Source, counts_as_text
from jaxblip.errors import RunStopped

_COUNTED = SKIP_REASONS + CONVERSIONS
# Examples to examine before their share of bad ones says anything (or the whole set, if smaller).
_MIN_EXAMINED = 100
# Bad examples in a row after which no good one is looked for any more.
_MAX_TRIES = 100


@dataclasses.dataclass(frozen=True)
class _LoadExample:
    """Index to example; a bad one is counted, and another drawn in its place.

    The replacement is drawn from the example's own generator, not the next one of the source:
    where a whole folder is missing, that would count the rest of it each time one of its images
    comes up, and show the first image behind it again and again. Nothing about the data may raise
    here, because it would end the worker.
    """

    source: Source
    preprocess: Preprocess

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        counts = Counter()
        first_bad = ""
        for _ in range(_MAX_TRIES):
            conversions = Counter()
            try:
                arrays = self.preprocess(self.source[index], rng, conversions)
            except BadSample as bad:
                counts[bad.reason] += 1
                first_bad = first_bad or f"{bad.reason} ({bad.detail})"
                index = int(rng.integers(len(self.source)))
                continue
            return {"arrays": arrays, "counts": counts + conversions, "first_bad": first_bad}
        return {"arrays": None, "counts": counts, "first_bad": first_bad}


def _stack(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Batches what `_LoadExample` gives; `arrays` is None where no good example was found."""
    counts = sum((example["counts"] for example in examples), Counter())
    arrays = [example["arrays"] for example in examples]
    found = all(a is not None for a in arrays)
    return {
        "arrays": {k: np.stack([a[k] for a in arrays]) for k in arrays[0]} if found else None,
        "counts": np.array([counts[name] for name in _COUNTED], np.int64),
        "first_bad": next((e["first_bad"] for e in examples if e["first_bad"]), ""),
    }


def _end_with_parent(worker_index: int, worker_count: int) -> None:
    """Ends this worker when the process that started it dies, be it by SIGKILL.

    Grain's workers would wait for it for ever, and hold its terminal and its memory.
    """
    del worker_index, worker_count

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _shuffled(size: int, block: int, seed: int) -> grain.MapDataset:
    """Indices of `size` examples, shuffled anew each epoch by blocks of `block` neighbours."""
    # Every block's j-th example in one order of the blocks, the same for all j, then interleaved.
    return grain.MapDataset.mix(
        [grain.MapDataset.range(j, size, block).shuffle(seed=seed) for j in range(block)]
    )


class TrainBatches(Iterator[dict[str, np.ndarray]]):
    """Endless shuffled batches of this process, `{field: [batch_size / process_count, ...]}`.

    Every epoch has an order of its own. Of each global batch, process p of P takes every P-th
    example from p on. Bad samples are replaced and counted. Use as a context manager, or call
    `close()`: workers and threads end with it.

    Args:
      source: examples, see `samples.Source`.
      preprocess: what to make of each.
      batch_size: over all processes; a multiple of `process_count`.
      seed: of order and augmentation.
      shuffle_block: this many consecutive examples of the source keep together when it is
        shuffled, so that they are hard negatives of each other; a divisor of their number.
      process_index, process_count: this process among those that train together.
      start_example: global number of examples consumed before; where to go on.
      num_workers: worker processes; 0 for threads in this one.
      max_bad_share: bad among examined examples, above which the run stops.
      prefetch: batches made ahead (by each worker).
      counters: `state()` of the run that goes on, so that its counts do too.

    Raises:
      RunStopped: from `next`, when too many examples are bad.
    """

    def __init__(
        self,
        source: Source,
        preprocess: Preprocess,
        *,
        batch_size: int,
        seed: int,
        shuffle_block: int = 1,
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
        self.examined = int(counters.get("examined", 0))
        self.skipped = Counter(counters.get("skipped", {}))
        self.converted = Counter(counters.get("converted", {}))
        self._first_bad = ""
        self._batch_size = batch_size
        self._rows = batch_size // process_count
        self._max_bad_share = max_bad_share
        self._min_examined = min(_MIN_EXAMINED, len(source))
        if "image" not in preprocess.fields and hasattr(source, "without_images"):
            source = source.without_images()
        dataset = (
            _shuffled(len(source), shuffle_block, seed)
            .seed(seed)
            .repeat()
            # Before any slice: the generator of an example follows from its global index.
            .random_map(_LoadExample(source, preprocess))[start_example:]
        )
        dataset = (
            dataset[process_index::process_count]
            .batch(self._rows, drop_remainder=True, batch_fn=_stack)
            .to_iter_dataset(
                grain.ReadOptions(num_threads=min(2, prefetch), prefetch_buffer_size=prefetch)
            )
        )
        if num_workers:
            # Grain's workers read absl flags, which only absl's own `app.run` parses.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=num_workers, per_worker_buffer_size=prefetch
                ),
                worker_init_fn=_end_with_parent,
            )
        self._iterator = iter(dataset)

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._iterator)
        counts = dict(zip(_COUNTED, batch["counts"].tolist()))
        self.skipped.update({name: counts[name] for name in SKIP_REASONS if counts[name]})
        self.converted.update({name: counts[name] for name in CONVERSIONS if counts[name]})
        self.examined += self._rows + sum(counts[name] for name in SKIP_REASONS)
        self._stop_if_too_many_are_bad(batch)
        self.examples_seen += self._batch_size
        # Plain arrays, since those of workers lie in shared memory that Grain frees late.
        return {field: np.array(rows) for field, rows in batch["arrays"].items()}

    def state(self) -> dict[str, Any]:
        """JSON-able: `start_example=state["examples_seen"], counters=state` goes on from here.

        `examples_seen` is global, the counters are of this process.
        """
        return {
            "examples_seen": self.examples_seen,
            "examined": self.examined,
            "skipped": dict(self.skipped),
            "converted": dict(self.converted),
        }

    def close(self) -> None:
        self._iterator.close()

    def __enter__(self) -> TrainBatches:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def _stop_if_too_many_are_bad(self, batch: dict[str, Any]) -> None:
        bad = self.skipped.total()
        none_found = batch["arrays"] is None
        self._first_bad = self._first_bad or batch["first_bad"]
        judged = self.examined >= self._min_examined and bad > self._max_bad_share * self.examined
        if not (none_found or judged):
            return
        reasons = counts_as_text(self.skipped)
        first = f"; one of them: {self._first_bad}" if self._first_bad else ""
        what = (
            f"none of {_MAX_TRIES} in a row could be used"
            if none_found
            else f"above data.max_bad_share={self._max_bad_share:g}"
        )
        raise RunStopped(
            f"{bad} of {self.examined} examples ({bad / self.examined:.1%}) were bad: {reasons}, "
            f"{what}{first}; fix the data or raise data.max_bad_share"
        )
