"""CSV, TSV and Parquet tables, one example a row."""

from __future__ import annotations

import bisect
import csv
import io
import itertools
import os
from collections import OrderedDict
from typing import Any

import pyarrow
import pyarrow.parquet

from jaxblip.data import storage
from jaxblip.data.samples import BadSample
from jaxblip.errors import UserError

_GROUPS_IN_MEMORY = 4  # row groups of Parquet files that each worker keeps


class CsvRows:
    """The rows of CSV or TSV files, whose first line names the columns.

    Cells are texts; where several captions belong to an image, write a row for each. Workers get
    the paths and read the files themselves.

    Args:
      spec: path or glob of UTF-8 files, local or a URL that fsspec reads.
      separator: of the cells.

    Raises:
      UserError: a file is missing, empty, not UTF-8, or a row has too many or too few cells.
    """

    def __init__(self, spec: str | os.PathLike, separator: str = ","):
        self._paths, self._separator = storage.files(spec), separator
        self.folder = os.path.dirname(self._paths[0])
        self._read()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]

    def place(self, index: int) -> str:
        return self._places[index]

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_paths", "_separator", "folder")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._read()

    def _read(self) -> None:
        self._rows, self._places = [], []
        for path in self._paths:
            try:
                text = storage.read_bytes(path).decode("utf-8-sig")
            except OSError as error:
                raise storage.unreadable(path, error) from error
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8: save it as UTF-8.") from error
            reader = csv.reader(io.StringIO(text, newline=""), delimiter=self._separator)
            try:
                self._add(path, reader)
            except csv.Error as error:
                raise UserError(f"{path}:{reader.line_num}: no row of a table: {error}.") from error

    def _add(self, path: str, reader) -> None:
        names = next(reader, None)
        before = len(self._rows)
        while True:
            line = reader.line_num + 1  # a cell may hold line breaks
            cells = next(reader, None)
            if cells is None:
                break
            if not cells:
                continue
            if len(cells) != len(names):
                raise UserError(
                    f"{path}:{line}: {len(cells)} cells under {len(names)} column names; put cells "
                    "with separators or line breaks in double quotes."
                )
            self._rows.append(dict(zip(names, cells)))
            self._places.append(f"{path}:{line}")
        if len(self._rows) == before:
            raise UserError(f"{path} has no rows; it needs a line of column names and one a row.")


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
            metadata = self._open(path).metadata
            for group in range(metadata.num_row_groups):
                self._groups.append((number, group))
                sizes.append(metadata.row_group(group).num_rows)
        self._ends = list(itertools.accumulate(sizes))
        if not len(self):
            raise UserError(f"{self._paths[0]} has no rows.")
        self._tables = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        group = bisect.bisect_right(self._ends, index)
        start = self._ends[group - 1] if group else 0
        try:
            [row] = self._table(group).slice(index - start, 1).to_pylist()
        except (OSError, pyarrow.ArrowException, UserError) as error:
            raise BadSample("unreadable row", f"{self.place(index)}: {error}") from error
        return {name: value for name, value in row.items() if value is not None}

    def place(self, index: int) -> str:
        group = bisect.bisect_right(self._ends, index)
        number = self._groups[group][0]
        first = next(g for g, (file, _) in enumerate(self._groups) if file == number)
        return f"{self._paths[number]}, row {index - (self._ends[first - 1] if first else 0)}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": OrderedDict()}

    def _table(self, group: int) -> pyarrow.Table:
        table = self._tables.get(group)
        if table is None:
            number, part = self._groups[group]
            path = self._paths[number]
            table = storage.retry(lambda: self._open(path).read_row_group(part))
            self._tables[group] = table
            while len(self._tables) > _GROUPS_IN_MEMORY:  # threads may each have added one
                self._tables.popitem(last=False)
        return table

    def _open(self, path: str) -> pyarrow.parquet.ParquetFile:
        try:
            return pyarrow.parquet.ParquetFile(storage.open_file(path))
        except OSError as error:
            raise storage.unreadable(path, error) from error
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{path} is no Parquet file: {error}.") from error
