"""JSONL files: one example a line, images beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxblip.data import storage
from jaxblip.data.rows import EXAMPLES, BadRow, check_row
from jaxblip.data.samples import BadSample
from jaxblip.errors import UserError


class JsonlRows:
    """The lines of JSONL files, which are all checked when they are opened.

    Blank lines are skipped. What stays in memory is where each line begins.

    Args:
      spec: path or glob of UTF-8 files, local or a URL that fsspec reads.
      columns: of the example fields, see `rows.columns_of`.

    Attributes:
      has_instructions: whether all lines have a question or an instruction.

    Raises:
      UserError: a file is missing or empty, or a line is no example.
    """

    def __init__(self, spec: str | os.PathLike, columns: Mapping[str, tuple[str, ...]]):
        self._paths = storage.files(spec)
        self.folder = os.path.dirname(self._paths[0])
        self.has_instructions = True
        spans = [self._index(number, path, columns) for number, path in enumerate(self._paths)]
        # File, line, first byte and length of each.
        self._spans = np.concatenate(spans)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, _, start, length = self._spans[index].tolist()
        try:
            return json.loads(storage.read_bytes(self._paths[number], start, length))
        except (OSError, ValueError) as error:  # it was there and good when it was opened
            raise BadSample("unreadable row", f"{self.place(index)}: {error}") from error

    def place(self, index: int) -> str:
        number, line, *_ = self._spans[index].tolist()
        return f"{self._paths[number]}:{line}"

    def _index(self, number: int, path: str, columns: Mapping[str, tuple[str, ...]]) -> np.ndarray:
        spans, start = [], 0
        try:
            with storage.open_file(path) as file:
                for line, raw in enumerate(file, start=1):
                    if raw.strip():
                        self.has_instructions &= _check(raw, f"{path}:{line}", columns) is not None
                        spans.append((number, line, start, len(raw)))
                    start += len(raw)
        except OSError as error:
            raise UserError(
                f"cannot read {path} ({error.strerror or error}); give the path of a JSONL file "
                f"with lines like {EXAMPLES[None]}"
            ) from error
        if not spans:
            raise UserError(f"{path} is empty; it needs at least one line like {EXAMPLES[None]}")
        return np.array(spans, np.int64)


def _check(raw: bytes, place: str, columns: Mapping[str, tuple[str, ...]]) -> str | None:
    """The kind of instruction of a line; raises UserError where it is no example."""
    shown = raw.decode("utf-8", errors="replace").strip()
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    wanted = f"write one object a line, like {EXAMPLES[None]}"
    try:
        line = json.loads(raw)
    except ValueError as error:  # its own "line 1 column 9" would seem to be about the file
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "it is not UTF-8"
        raise UserError(f"{place}: no JSON ({reason}): {shown}; {wanted}") from error
    if not isinstance(line, dict):
        raise UserError(f"{place}: no JSON object: {shown}; {wanted}")
    try:
        return check_row(line, columns)
    except BadRow as bad:
        raise UserError(f"{place}: {bad}") from bad
