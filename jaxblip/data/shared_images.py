"""Images of batches on their way out of worker processes, in memory that is used again and again.

Fresh memory costs its pages, in the worker and in the process that reads it: with 224x224 pixels a
quarter of a millisecond an image, nearly as much as to resize it.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Sequence
from multiprocessing.shared_memory import SharedMemory

import numpy as np
from jaxtyping import Bool, UInt8

Images = UInt8[np.ndarray, "batch *frames height width 3"]


class SharedImages:
    """A few places for batches of each worker; the same ones wherever this is unpickled.

    A worker takes its places, and only the reader gives them back: nothing is overwritten before it
    is read. Where none is left, a worker makes an array of its own, which Grain brings across.

    Args:
      workers: number of processes that write, each in one thread.
      places: of each of them.
      shape: of a batch.
    """

    def __init__(self, workers: int, places: int, shape: tuple[int, ...]):
        self._places, self._shape = (workers, places), shape
        size = workers * places * (1 + math.prod(shape))
        self._memory = SharedMemory(create=True, size=size)  # of zeros
        weakref.finalize(self, _unlink, self._memory)

    def close(self) -> None:
        """The memory goes when the last process that has it does."""
        _unlink(self._memory)

    def take(self, worker: int) -> tuple[Images, list[int]]:
        """What to write into, and its place; [] where it is an array of its own."""
        free = np.flatnonzero(~self._taken[worker]).tolist()
        if not free:
            return np.empty(self._shape, np.uint8), []
        # The first one, so that no more memory is used than is needed.
        self._taken[worker, free[0]] = True
        return self._images[worker, free[0]], [worker, free[0]]

    def read(self, place: Sequence[int]) -> Images:
        """A copy of what is in a place, which is given back."""
        images = np.array(self._images[*place])
        self._taken[*place] = False
        return images

    # Made anew each time, because an array as an attribute would be pickled with its contents.

    @property
    def _taken(self) -> Bool[np.ndarray, "worker place"]:
        return np.ndarray(self._places, np.bool_, self._memory.buf)

    @property
    def _images(self) -> UInt8[np.ndarray, "worker place batch height width 3"]:
        shape = (*self._places, *self._shape)
        return np.ndarray(shape, np.uint8, self._memory.buf, offset=math.prod(self._places))


def _unlink(memory: SharedMemory) -> None:
    with contextlib.suppress(FileNotFoundError):  # it has been done
        memory.unlink()
