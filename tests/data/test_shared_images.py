"""Memory between worker processes and the one that trains."""

import gc
import itertools
import pickle
import time
from multiprocessing.shared_memory import SharedMemory

import numpy as np
import pytest
from PIL import Image

from jaxblip.data.pipeline import Part, TrainBatches
from jaxblip.data.preprocess import Preprocess
from jaxblip.data.shared_images import SharedImages

SHAPE = (2, 3, 3, 3)


@pytest.fixture
def shared():
    shared = SharedImages(2, 3, SHAPE)
    yield shared
    shared.close()


def exists(name: str) -> bool:
    try:
        SharedMemory(name).close()
    except FileNotFoundError:
        return False
    return True


def test_what_a_worker_writes_the_reader_reads(shared):
    worker = pickle.loads(pickle.dumps(shared))
    for value in range(20):
        images, place = worker.take(1)
        assert images.shape == SHAPE and images.dtype == np.uint8 and place == [1, 0]
        images[...] = value
        assert (shared.read(place) == value).all()


def test_nothing_is_overwritten_before_it_is_read(shared):
    worker, places = pickle.loads(pickle.dumps(shared)), []
    for value in range(3):
        images, place = worker.take(0)
        images[...] = value
        places.append(place)
    assert places == [[0, 0], [0, 1], [0, 2]]
    own, nowhere = worker.take(0)
    own[...] = 9
    assert nowhere == [] and own.shape == SHAPE and worker.take(1)[1] == [1, 0]
    second = shared.read(places[1])
    images, place = worker.take(0)
    assert place == places[1]
    images[...] = 7
    assert (second == 1).all() and second.base is None
    for place, value in zip(places, (0, 7, 2), strict=True):
        assert (shared.read(place) == value).all()


def test_the_memory_goes_when_it_is_closed_or_forgotten(shared):
    name = shared._memory.name
    assert exists(name)
    shared.close()
    shared.close()
    assert not exists(name)
    name = SharedImages(1, 1, SHAPE)._memory.name
    gc.collect()
    assert not exists(name)


class Colours:
    """Image k has the colour k."""

    def __len__(self):
        return 200

    def __getitem__(self, index):
        pixels = np.asarray(Image.new("RGB", (9, 9), (index, 0, 0)))
        return {"image": pixels, "captions": ["a"], "image_id": index}


def test_batches_of_a_worker_have_places_and_stay_what_they_were():
    """However fast they are taken, and though its memory is used again."""
    part = Part(Colours(), Preprocess(("image", "image_id"), image_size_px=8))
    options = dict(batch_size=4, seed=0)
    with TrainBatches([part], num_workers=1, **options) as batches:
        places, next_batch = [], batches._next_batch
        batches._next_batch = lambda: places.append(batch := next_batch()) or batch
        found = []
        for batch in itertools.islice(batches, 30):
            found.append(batch)
            time.sleep(0.3 if len(found) in (5, 6) else 0)
        name = batches._shared._memory.name
        assert exists(name)
    assert not exists(name)
    assert all(len(batch["shared_place"]) == 2 for batch in places)
    with TrainBatches([part], **options) as batches:
        for batch, expected in zip(found, batches):
            np.testing.assert_array_equal(batch["image"], expected["image"])
            np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["image_id"])
