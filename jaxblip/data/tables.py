"""CSV, TSV and Parquet tables, one example a row."""

from __future__ import annotations

import bisect
import codecs
import csv
import io
import itertools
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from jaxblip.data import storage
from jaxblip.data.samples import BadSample
from jaxblip.errors import UserError

_MAX_LINE = 1 << 24  # characters; what csv reads is cut at the limit, and then no row
# Where a row of a CSV stands: its file, and in it the line, its first byte and length.
_SPAN = [("file", "i4"), ("line", "i8"), ("start", "i8"), ("length", "i4")]
_GROUPS_IN_MEMORY = 4  # row groups of Parquet files that each worker keeps


class CsvRows:
    """The rows of CSV or TSV files, whose first line names the columns.

    Cells are texts; where several captions belong to an image, write a row for each. What stays in
    memory is where each row begins.

    Args:
      spec: path or glob of UTF-8 files, local or a URL that fsspec reads.
      separator: of the cells.

    Raises:
      UserError: a file is missing, empty, not UTF-8, names a column twice, or a row has too many or
        too few cells.
    """

    def __init__(self, spec: str | os.PathLike, separator: str = ","):
        self._paths, self._separator = storage.files(spec), separator
        self.folder = os.path.dirname(self._paths[0])
        self._names: list[list[str]] = []  # of the columns of each file
        spans = (self._index(number) for number in range(len(self._paths)))
        self._spans = np.fromiter(itertools.chain.from_iterable(spans), _SPAN)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, _, start, length = self._spans[index].tolist()
        try:
            text = storage.read_bytes(self._paths[number], start, length).decode()
            [cells] = self._reader(io.StringIO(text, newline=""))
            return dict(zip(self._names[number], cells, strict=True))
        except (OSError, ValueError, csv.Error) as error:  # it was good when it was opened
            detail = f"{self.place(index)}: {storage.phrase(error)}"
            raise BadSample("unreadable row", detail) from error

    def place(self, index: int) -> str:
        number, line, *_ = self._spans[index].tolist()
        return f"{storage.shown(self._paths[number])}:{line}"

    def _reader(self, lines: Iterable[str]):
        # Strict, because a quote that is never closed would swallow the rows behind it.
        return csv.reader(lines, delimiter=self._separator, strict=True)

    def _index(self, number: int) -> Iterator[tuple[int, ...]]:
        """The span of each row of a file, whose column names it adds to the others."""
        path, end, count, line_num = self._paths[number], 0, 0, 0
        shown = storage.shown(path)

        def lines(file) -> Iterator[str]:
            nonlocal end, line_num
            end = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else file.seek(0)
            text = io.TextIOWrapper(file, "utf-8", newline="")
            for line in iter(lambda: text.readline(_MAX_LINE), ""):
                end, line_num = end + len(line.encode()), line_num + 1
                yield line

        try:
            with storage.open_file(path) as file:
                reader = self._reader(lines(file))
                names = next(reader, [])
                self._names.append(names)
                _check_names(names, shown)
                start, line = end, line_num + 1  # a cell may hold line breaks
                for cells in reader:
                    if cells:
                        _check_number(cells, names, f"{shown}:{line}")
                        yield number, line, start, end - start
                        count += 1
                    start, line = end, line_num + 1
        except OSError as error:
            raise storage.unreadable(path, error) from error
        except UnicodeDecodeError as error:
            raise UserError(f"{shown} is not UTF-8: save it as UTF-8.") from error
        except csv.Error as error:
            raise UserError(
                f"{shown}:{line_num}: no row of a table: {storage.phrase(error)}; put cells with "
                "quotes or line breaks in double quotes, and write quotes inside them twice."
            ) from error
        if not count:
            raise UserError(f"{shown} has no rows; it needs a line of column names and one a row.")


def _check_names(names: list[str], shown: str) -> None:
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise UserError(f"{shown} has two columns called {twice[0]!r}: rename one.")


def _check_number(cells: list[str], names: list[str], place: str) -> None:
    if len(cells) != len(names):
        raise UserError(
            f"{place}: {len(cells)} cells under {len(names)} column names; put cells with "
            "separators or line breaks in double quotes."
        )


class ParquetRows:
    """The rows of Parquet files, read by row groups, of which each worker keeps a few.

    Rows of a shuffled epoch lie in all groups: train from `jaxblip data prepare` instead where the
    images are in the table and it does not fit into memory.

    Args:
      spec: path or glob, local or a URL that fsspec reads.

    Raises:
      UserError: a file is missing, no Parquet, or without rows.
    """

    def __init__(self, spec: str | os.PathLike):
        self._paths = storage.files(spec)
        self.folder = os.path.dirname(self._paths[0])
        self._groups = []  # (file, group) of each row group
        sizes = []
        for number, path in enumerate(self._paths):
            for group, size in enumerate(self._group_sizes(path)):
                self._groups.append((number, group))
                sizes.append(size)
        self._ends = list(itertools.accumulate(sizes))
        if not len(self):
            raise UserError(f"{storage.shown(self._paths[0])} has no rows.")
        self._tables = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        group = bisect.bisect_right(self._ends, index)
        start = self._ends[group - 1] if group else 0
        try:
            [row] = self._table(group).slice(index - start, 1).to_pylist()
        except Exception as error:  # decoders raise nearly anything on hostile bytes
            detail = f"{self.place(index)}: {storage.phrase(error)}"
            raise BadSample("unreadable row", detail) from error
        return {name: value for name, value in row.items() if value is not None}

    def place(self, index: int) -> str:
        group = bisect.bisect_right(self._ends, index)
        number = self._groups[group][0]
        first = next(g for g, (file, _) in enumerate(self._groups) if file == number)
        start = self._ends[first - 1] if first else 0
        return f"{storage.shown(self._paths[number])}, row {index - start}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": OrderedDict()}

    def _table(self, group: int) -> pyarrow.Table:
        table = self._tables.get(group)
        if table is None:
            number, part = self._groups[group]
            path = self._paths[number]
            table = storage.retry(lambda: self._read(path, part))
            self._tables[group] = table
            while len(self._tables) > _GROUPS_IN_MEMORY:  # threads may each have added one
                self._tables.popitem(last=False)
        return table

    def _read(self, path: str, part: int) -> pyarrow.Table:
        """A row group, but for columns of times: of no use, and some are no Python values."""
        try:
            file = pyarrow.parquet.ParquetFile(storage.open_file(path))
            fields = [f for f in file.schema_arrow if not pyarrow.types.is_temporal(f.type)]
            return file.read_row_group(part, [field.name for field in fields])
        except OSError as error:
            if storage.is_url(path) or error.errno is not None:
                raise
            # The file's own damage, which trying again would not mend.
            raise pyarrow.ArrowInvalid(str(error)) from error

    def _group_sizes(self, path: str) -> list[int]:
        shown = storage.shown(path)
        try:
            file = storage.open_file(path)
        except OSError as error:
            raise storage.unreadable(path, error) from error
        try:
            parquet = pyarrow.parquet.ParquetFile(file)
            names, metadata = parquet.schema_arrow.names, parquet.metadata
            groups = range(metadata.num_row_groups)
            sizes = [metadata.row_group(group).num_rows for group in groups]
        except Exception as error:  # decoders raise nearly anything on hostile bytes
            raise UserError(f"{shown} is no Parquet file: {storage.phrase(error)}.") from error
        _check_names(names, shown)
        if min(sizes, default=0) < 0 or sum(sizes) != metadata.num_rows:
            raise UserError(f"{shown} is damaged: its numbers of rows disagree.")
        return sizes
