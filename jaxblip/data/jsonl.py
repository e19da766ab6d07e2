"""JSONL files: one example or conversation a line, images beside them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxblip.data import storage
from jaxblip.data.conversations import Answer, answers, is_conversation
from jaxblip.data.json_text import parse_json
from jaxblip.data.rows import EXAMPLES, BadRow, check_row
from jaxblip.data.samples import BadSample, LeftOut
from jaxblip.errors import UserError

_MAX_LINE_BYTES = 1 << 28  # of a file without line ends it would be all
_NO_TURN = -1
_WANTED = f"write one object a line, like {EXAMPLES[None]}"
# Where a row stands: its file, and in it the line, its first byte and length; of a conversation
# the turn.
_SPAN = [("file", "i4"), ("line", "i8"), ("start", "i8"), ("length", "i4"), ("turn", "i4")]


class JsonlRows:
    """The lines of JSONL files, which are all checked when they are opened.

    Blank lines are skipped. Of a conversation (see `conversations.Answer`) each answer is a row.
    What stays in memory is where each line begins.

    Args:
      spec: path or glob of UTF-8 files, local or a URL that fsspec reads.
      columns: of the example fields, see `rows.columns_of`.

    Attributes:
      has_instructions: whether all lines have a question or an instruction.
      problems: what of conversations is left out, a sentence each.

    Raises:
      UserError: a file is missing or empty, or a line is no example.
    """

    def __init__(self, spec: str | os.PathLike, columns: Mapping[str, tuple[str, ...]]):
        self._paths = storage.files(spec)
        self._columns = columns
        self.folder = os.path.dirname(self._paths[0])
        self.has_instructions = True
        left_out = LeftOut()
        spans = (self._index(number, left_out) for number in range(len(self._paths)))
        self._spans = np.fromiter(itertools.chain.from_iterable(spans), _SPAN)
        self.problems = left_out.sentences(storage.shown(storage.absolute(spec)))
        if not len(self):
            raise UserError(". ".join(["There is no example", *self.problems]) + ".")

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, line, start, length, turn = self._spans[index].tolist()
        try:
            row = parse_json(storage.read_bytes(self._paths[number], start, length))
            if turn != _NO_TURN:
                return Answer(line, row, turn).row()
        except (OSError, ValueError, BadRow) as error:  # it was good when it was opened
            detail = f"{self.place(index)}: {storage.phrase(error)}"
            raise BadSample("unreadable row", detail) from error
        return row

    def place(self, index: int) -> str:
        number, line, *_ = self._spans[index].tolist()
        return f"{storage.shown(self._paths[number])}:{line}"

    def _index(self, number: int, left_out: LeftOut) -> Iterator[tuple[int, ...]]:
        path, start, is_empty = self._paths[number], 0, True
        shown = storage.shown(path)
        try:
            with storage.open_file(path) as file:
                lines = iter(lambda: file.readline(_MAX_LINE_BYTES), b"")
                for line, raw in enumerate(lines, start=1):
                    if len(raw) == _MAX_LINE_BYTES:
                        what = f"longer than {len(raw):,} bytes"
                        raise UserError(f"{shown}:{line}: {what}; {_WANTED}")
                    if raw.strip():
                        is_empty = False
                        for turn in self._turns(raw, f"{shown}:{line}", left_out):
                            yield number, line, start, len(raw), turn
                    start += len(raw)
        except OSError as error:
            raise UserError(
                f"cannot read {shown} ({storage.phrase(error)}); give the path of a JSONL file "
                f"with lines like {EXAMPLES[None]}"
            ) from error
        if is_empty:
            raise UserError(f"{shown} is empty; it needs at least one line like {EXAMPLES[None]}")

    def _turns(self, raw: bytes, place: str, left_out: LeftOut) -> list[int]:
        """Those of a line that are examples; raises UserError where there is none in it."""
        try:
            line = _object(raw)
            # A field map that names texts makes other columns no texts.
            if not (is_conversation(line) and self._columns["output"]):
                self.has_instructions &= check_row(line, self._columns) is not None
                return [_NO_TURN]
            turns, unused = answers(line)
            for turn in turns[:1]:
                check_row(Answer(0, line, turn).row(), self._columns)
        except BadRow as bad:
            raise UserError(f"{place}: {bad}") from bad
        for what in unused:
            left_out.add(what, place)
        return turns


def _object(raw: bytes) -> dict[str, Any]:
    """The object of a line; raises BadRow where it is none."""
    try:
        line, what = parse_json(raw), "no JSON object"
    except ValueError as error:
        line, what = None, f"no JSON ({error})"
    if isinstance(line, dict):
        return line
    shown = raw[:1000].decode("utf-8", errors="replace").strip()
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    raise BadRow(f"{what}: {storage.shown(shown)}; {_WANTED}")
