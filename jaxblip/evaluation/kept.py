"""Results of an evaluation as they are made, from which one that was killed goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils


class Kept:
    """Batches of results, in a file to which each is added when it is made.

    Process 0 writes; all read what is there when they begin, so the file must be where all see it.
    The batches do not depend on how many there were, and so neither do the results.
    """

    def __init__(self, path: Path | None = None, key: Mapping[str, Any] | None = None):
        """Reads what is kept.

        Args:
          path: of the file; None keeps nothing.
          key: what the results depend on; those of another key are dropped.
        """
        self._path, self._values = path, {}
        if path is None:
            return
        key = json.loads(json.dumps(dict(key or {})))
        lines = complete_lines(path)
        if lines[:1] == [key]:
            for line in lines[1:]:
                self._values.setdefault(line["part"], []).extend(line["values"])
        else:
            lines = [key]
        if jax.process_count() > 1:  # nobody writes before all have read
            multihost_utils.sync_global_devices(f"kept results {path.name}")
        if jax.process_index() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_name(f".{path.name}.new")
            new.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            new.replace(path)

    def collect(self, part: str, batches: Callable[[int], Iterator[list[Any]]]) -> list[Any]:
        """All values of a part: those that are kept, and those of the batches behind them.

        Args:
          batches: yields lists of JSON values, from the batch on whose first value has the number
            that it is given.
        """
        values = self._values.pop(part, [])
        for batch in batches(len(values)):
            self._add({"part": part, "values": batch})
            values += batch
        return values

    def remove(self) -> None:
        """Removes the file, when the results are written elsewhere."""
        if self._path is not None and jax.process_index() == 0:
            self._path.unlink(missing_ok=True)

    def _add(self, line: dict[str, Any]) -> None:
        if self._path is None or jax.process_index() != 0:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def complete_lines(path: Path) -> list[Any]:
    """What the lines of a file hold, up to the first that is not whole; nothing without a file."""
    found = []
    if path.is_file():
        for line in path.read_bytes().split(b"\n")[:-1]:
            try:
                found.append(json.loads(line))
            except ValueError:
                break
    return found
