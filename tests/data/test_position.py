"""Exact position: however often a run is stopped, and however it goes on, it sees the same.

Random histories: a run is killed at random points, and goes on with other numbers of processes and
workers and with another batch size.
"""

import random

import numpy as np
import pytest

from jaxblip.data.pipeline import Part, TrainBatches
from jaxblip.data.preprocess import Preprocess
from jaxblip.data.samples import BadSample
from jaxblip.data.shapes import ShapesSource

IMAGES = Preprocess(("image", "image_id"), 16, randaugment=True)
EXAMPLES = 48 * 4


class Partly(ShapesSource):
    """Some examples are bad, so that replacements are drawn."""

    def __getitem__(self, index):
        if index % 9 == 4:
            raise BadSample("corrupt image", "a test")
        return super().__getitem__(index)


def parts(number):
    sizes = (17, 23, 8)[:number]
    names = ("a", "b", "c")[:number] if number > 1 else ("",)
    return [
        Part(Partly("train", 16, size=size), IMAGES, name, share)
        for size, name, share in zip(sizes, names, (0.5, 0.3, 0.2))
    ]


def read(begin, end, batch_size, process_count=1, num_workers=0, number=1):
    """The examples of a stretch, in their global order, as the processes of a run see them."""
    images = []
    for index in range(process_count):
        with TrainBatches(
            parts(number), batch_size=batch_size, seed=11, start_example=begin, max_bad_share=1.0,
            process_index=index, process_count=process_count, num_workers=num_workers,
        ) as batches:  # fmt: skip
            rows = [next(batches)["image"] for _ in range((end - begin) // batch_size)]
            assert batches.examples_seen == end
        images.append(np.concatenate(rows))
    # Process p of P has every P-th example from p on.
    return np.stack(images, axis=1).reshape(end - begin, 16, 16, 3)


@pytest.fixture(scope="module")
def straight():
    return {number: read(0, EXAMPLES, 12, number=number) for number in (1, 3)}


def history(seed):
    """Stretches of random length, batch size and process count that make up the whole."""
    rng, begin = random.Random(seed), 0
    while begin < EXAMPLES:
        batch_size = rng.choice([4, 6, 8, 12])
        end = begin + batch_size * rng.randint(1, 4)
        if end > EXAMPLES or (EXAMPLES - end) % 2:
            batch_size, end = 2, begin + 2
        yield begin, end, batch_size, rng.choice([p for p in (1, 2, 4) if batch_size % p == 0])
        begin = end


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("seed", range(8))
def test_any_history_of_processes_and_batch_sizes_is_exact(straight, number, seed):
    stretches = list(history(seed))
    assert len(stretches) > 5 and stretches[-1][1] == EXAMPLES
    images = [read(*stretch, number=number) for stretch in stretches]
    np.testing.assert_array_equal(np.concatenate(images), straight[number])


@pytest.mark.parametrize("number, seed", [(1, 20), (3, 21)])
def test_any_history_of_workers_is_exact(straight, number, seed):
    rng = random.Random(seed)
    cuts = [0, *sorted(rng.sample(range(8, EXAMPLES, 8), 3)), EXAMPLES]
    workers = rng.sample([0, 1, 2, 3], 4)
    images = [
        read(begin, end, 8, num_workers=count, number=number)
        for begin, end, count in zip(cuts, cuts[1:], workers)
    ]
    np.testing.assert_array_equal(np.concatenate(images), straight[number])


def test_no_example_of_an_epoch_is_lost_or_repeated():
    """Half an epoch on two processes with one batch size, the rest on one with another."""
    whole = [Part(ShapesSource("train", 16, size=48), IMAGES)]
    seen = []
    for process_count, batch_size, begin, end in ((2, 8, 0, 24), (1, 6, 24, 48), (4, 12, 48, 96)):
        for index in range(process_count):
            with TrainBatches(
                whole, batch_size=batch_size, seed=2, start_example=begin,
                process_index=index, process_count=process_count,
            ) as batches:  # fmt: skip
                for _ in range((end - begin) // batch_size):
                    seen += next(batches)["image_id"].tolist()
    assert sorted(seen[:48]) == sorted(seen[48:]) == list(range(48))
