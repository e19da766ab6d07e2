"""Killed workers, files that vanish and storage that fails: nothing is lost, nothing hangs."""

import errno
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from jaxblip.data import storage
from jaxblip.data.pipeline import Part, TrainBatches
from jaxblip.data.preprocess import Preprocess
from jaxblip.data.shapes import ShapesSource
from jaxblip.data.sources import open_source
from jaxblip.errors import RunStopped

IMAGES = Preprocess(("image", "image_id"), 16)
SETTINGS = dict(batch_size=4, seed=5)


def photo(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_pairs(folder, number=40):
    """A JSONL of as many images, each in a file."""
    for i in range(number):
        (folder / f"{i}.png").write_bytes(photo(i))
    rows = ({"image": f"{i}.png", "caption": f"picture {i}", "id": i} for i in range(number))
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return open_source(str(folder / "pairs.jsonl"), image_size_px=16)


def workers():
    return [child for child in multiprocessing.active_children() if "grain" in child.name]


def assert_equal(batches, others):
    assert len(batches) == len(others) > 0
    for one, other in zip(batches, others):
        np.testing.assert_array_equal(one["image"], other["image"])


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_killed_worker_is_replaced_and_nothing_lost(num_workers):
    source = ShapesSource("train", 16, size=20)
    with TrainBatches([Part(source, IMAGES)], **SETTINGS) as batches:
        straight = [next(batches) for _ in range(28)]
    with TrainBatches([Part(source, IMAGES)], num_workers=num_workers, **SETTINGS) as batches:
        seen = [next(batches) for _ in range(4)]
        assert len(workers()) == num_workers
        os.kill(workers()[-1].pid, signal.SIGKILL)
        seen += [next(batches) for _ in range(24)]  # more than were made ahead
        assert batches.restarts == 1 and batches.state()["restarts"] == 1
        assert len(workers()) == num_workers
        assert batches.examined == {"": 112}
    assert_equal(straight, seen)
    assert not workers()


def test_workers_leave_signals_to_their_parent():
    source = ShapesSource("train", 16, size=20)
    with TrainBatches([Part(source, IMAGES)], num_workers=1, **SETTINGS) as batches:
        for number in (signal.SIGTERM, signal.SIGINT):
            next(batches)
            os.kill(workers()[0].pid, number)
        for _ in range(4):  # more than were made ahead
            next(batches)
        assert batches.restarts == 0


def test_a_program_that_forgets_to_close_ends_all_the_same():
    program = """
from jaxblip.data.pipeline import Part, TrainBatches
from jaxblip.data.preprocess import Preprocess
from jaxblip.data.shapes import ShapesSource

if __name__ == "__main__":
    part = Part(ShapesSource("train", 16, size=20), Preprocess(("image",), 16))
    batches = TrainBatches([part], batch_size=4, seed=0, num_workers=2)
    next(batches)
    print("seen")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "seen\n"), done.stderr


class Deadly(ShapesSource):
    """One example ends the process that reads it, as a defect of a decoder would."""

    def __getitem__(self, index):
        if index == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_workers_that_die_again_and_again_end_the_run():
    source = Deadly("train", 16, size=20)
    with TrainBatches([Part(source, IMAGES)], num_workers=1, **SETTINGS) as batches:
        with pytest.raises(RunStopped, match="killed 3 times in a row .* behind example") as stop:
            for _ in range(6):
                next(batches)
    assert "data.num_workers" in str(stop.value)


def test_a_file_that_vanishes_is_skipped_and_named(tmp_path):
    source = write_pairs(tmp_path)
    with TrainBatches([Part(source, IMAGES)], max_bad_share=0.5, **SETTINGS) as batches:
        next(batches)
        (tmp_path / "7.png").unlink()
        for _ in range(20):
            next(batches)
        assert batches.skipped.keys() == {"missing image"}
        assert 1 <= batches.skipped.total() <= 3  # once an epoch, and as a replacement perhaps
    (tmp_path / "pairs.jsonl").unlink()
    with TrainBatches([Part(source, IMAGES)], max_bad_share=0.5, **SETTINGS) as batches:
        with pytest.raises(RunStopped, match="none of 100 in a row .*pairs.jsonl"):
            next(batches)


def test_a_shard_that_is_cut_off_while_it_is_read(tmp_path):
    path = tmp_path / "shard.tar"
    end = 0
    with tarfile.open(path, "w") as shard:
        for i in range(40):
            end = shard.offset if i == 34 else end
            for name, content in ((f"{i:03}.png", photo(i)), (f"{i:03}.txt", b"a picture")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    source = open_source(str(path), image_size_px=16)
    os.truncate(path, end)
    with TrainBatches([Part(source, IMAGES)], max_bad_share=0.5, **SETTINGS) as batches:
        for _ in range(20):
            next(batches)
        assert batches.skipped.keys() == {"truncated shard"}
        assert 2 * 6 <= batches.skipped.total() <= 2 * 10  # two epochs, and as replacements


def test_storage_that_fails_for_a_while_is_waited_for(tmp_path, monkeypatch):
    source = write_pairs(tmp_path)
    with TrainBatches([Part(source, IMAGES)], **SETTINGS) as batches:
        straight = [next(batches) for _ in range(10)]
    monkeypatch.setattr(storage, "_PAUSES_S", (0.01, 0.02, 0.5))
    failed, down_until = [], time.monotonic() + 0.4
    for name, function in (("_open_regular", storage._open_regular), ("pread", os.pread)):

        def failing(*args, function=function):
            if time.monotonic() < down_until:
                failed.append(function)
                raise OSError(errno.ESTALE, "Stale file handle")
            return function(*args)

        # What is open already fails too, and is opened anew.
        monkeypatch.setattr(os if name == "pread" else storage, name, failing)
    with TrainBatches([Part(source, IMAGES)], **SETTINGS) as batches:
        assert_equal(straight, [next(batches) for _ in range(10)])
        assert not batches.skipped and len(failed) >= 3


def test_storage_that_stays_away_is_counted(tmp_path, monkeypatch):
    source = write_pairs(tmp_path)
    monkeypatch.setattr(storage, "_PAUSES_S", (0.0, 0.0))
    opened = storage._open_regular

    def open_regular(path, flags):
        if path.endswith("7.png"):
            raise OSError(5, "Input/output error")
        return opened(path, flags)

    monkeypatch.setattr(storage, "_open_regular", open_regular)
    with TrainBatches([Part(source, IMAGES)], max_bad_share=0.5, **SETTINGS) as batches:
        for _ in range(20):
            next(batches)
        assert batches.skipped.keys() == {"missing image"}
        assert 2 * 4 <= batches.skipped.total() <= 3 * 4
