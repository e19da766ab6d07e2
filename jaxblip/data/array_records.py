"""Files of array_record as one sequence of bytes, read at random."""

from __future__ import annotations

import bisect
import functools
import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jaxblip.data import storage
from jaxblip.data.samples import BadSample
from jaxblip.errors import UserError

_OPEN_SHARDS = 256  # that a worker keeps open; many systems allow 1024 files


class ArrayRecords:
    """The records of several shards, one behind the other; small when pickled.

    Those of a shard that cannot be read are bad samples, each, and the others keep their places.

    Args:
      folder: that the shards lie in.
      shards: their names.
      takes: how many records of each there are to read.
      skips: how many stand before them; by default none.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        shards: Sequence[str],
        takes: Sequence[int],
        skips: Sequence[int] | None = None,
    ):
        self._folder, self._shards = os.path.abspath(folder), list(shards)
        self._skips = list(skips or itertools.repeat(0, len(takes)))
        self._ends = list(itertools.accumulate(takes))
        self._reader = functools.lru_cache(_OPEN_SHARDS)(self._open)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> bytes:
        try:
            return storage.retry(lambda: self._read(index))
        except OSError as error:
            raise BadSample("unreadable row", f"{self.place(index)}: {error}") from error

    def place(self, index: int) -> str:
        """Where a record stands."""
        shard, record = self._at(index)
        return f"{self._path(shard)}, record {record}"

    def problems(self, sizes: Sequence[int], remedy: str) -> list[str]:
        """A sentence about the shards that cannot be read, if there are any; all are looked at.

        Args:
          sizes: records that each shard should have.
          remedy: what to do where all are bad.

        Raises:
          UserError: all are.
        """
        with ThreadPoolExecutor(16) as threads:  # on storage far away each takes a while
            found = list(threads.map(self._problem, range(len(sizes)), sizes))
        bad = [problem for problem in found if problem]
        if not bad:
            return []
        sentence = f"{len(bad)} of {len(found)} shards are bad, such as {bad[0]}"
        if len(bad) == len(found):
            raise UserError(f"{sentence}: {remedy}.")
        return [sentence]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_reader"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reader = functools.lru_cache(_OPEN_SHARDS)(self._open)

    def _at(self, index: int) -> tuple[int, int]:
        """Shard and record in it."""
        shard = bisect.bisect_right(self._ends, index)
        start = self._ends[shard - 1] if shard else 0
        return shard, self._skips[shard] + int(index) - start

    def _path(self, shard: int) -> str:
        return os.path.normpath(os.path.join(self._folder, self._shards[shard]))

    def _read(self, index: int) -> bytes:
        """A record.

        Raises:
          OSError: of the storage, which may pass.
          BadSample: the file is damaged.
        """
        shard, position = self._at(index)
        try:
            [record] = self._reader(shard).read([position])
        except RuntimeError as error:
            if "() failed: " in str(error):  # a system call, of which Riegeli says the name
                self._reader.cache_clear()
                raise OSError(str(error)) from error
            raise BadSample("unreadable row", f"{self.place(index)}: {error}") from error
        if not record:  # what the reader gives behind the end of a file that has become shorter
            raise BadSample("truncated shard", self.place(index))
        return record

    def _open(self, shard: int):
        from array_record.python.array_record_module import ArrayRecordReader

        path = self._path(shard)
        try:
            os.stat(path)  # raises where it is missing, of which the reader says nothing
        except ValueError as error:  # a zero byte in the name
            raise FileNotFoundError(str(error)) from error
        reader = ArrayRecordReader(
            path, options="readahead_buffer_size:0", file_reader_buffer_size=1 << 15
        )
        if not reader.ok():
            raise BadSample("truncated shard", f"{path}, which is damaged or cut off")
        return reader

    def _problem(self, shard: int, size: int) -> str:
        """What is wrong with a shard of so many records; "" for nothing."""
        try:
            found = self._open(shard).num_records()
        except OSError as error:
            return f"{self._path(shard)} ({error.strerror or error})"
        except BadSample as bad:
            return bad.detail
        return "" if found == size else f"{self._path(shard)} of {found} records, not {size}"
