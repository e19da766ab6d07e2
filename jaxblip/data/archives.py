"""WebDataset shards: tar files, in which the members of one name, but its ending, are a sample."""

from __future__ import annotations

import json
import os
import re
import tarfile
from typing import Any

import numpy as np

from jaxblip.data import storage
from jaxblip.data.samples import BadSample
from jaxblip.errors import UserError

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
_ENDINGS = {**dict.fromkeys(IMAGE_ENDINGS, "image"), "txt": "caption", "json": "json"}
_KINDS = ("image", "caption", "json")
_MAX_TEXT_BYTES = 1 << 20  # of a .txt or .json member: what is longer is no caption


class WebDatasetRows:
    """The samples of tar shards, read in place by position: random access, nothing is unpacked.

    A row has `image`, the bytes of the .jpg, .png or .webp member; `caption`, the text of the .txt
    member; the entries of the .json member; and `__key__`, the common name. Members that are no
    plain files (links, devices) and those of names with other endings are left out; nothing is
    ever written to the paths that an archive names.

    Args:
      spec: a path, a glob, or a brace pattern such as "cc3m-{0000..0331}.tar".

    Attributes:
      problems: what is wrong with shards that can be used in part, a sentence each.

    Raises:
      UserError: a shard is missing, no tar file, or there is no sample in any.
    """

    def __init__(self, spec: str | os.PathLike):
        self._paths = [
            path for each in expand_braces(os.fspath(spec)) for path in storage.files(each)
        ]
        self.folder = os.path.dirname(self._paths[0])
        self.problems: list[str] = []
        self._keys: list[tuple[int, str]] = []  # (shard, common name)
        # Rows of (sample, kind, first byte, length), kinds numbered as in _KINDS.
        members = [row for number in range(len(self._paths)) for row in self._index(number)]
        if not self._keys:
            raise UserError(
                f"{self._paths[0]} has no samples; a sample is an image such as 0001.jpg with "
                "0001.txt or 0001.json beside it."
            )
        self._members = np.array(members, np.int64)
        self._first = np.searchsorted(self._members[:, 0], np.arange(len(self._keys) + 1))

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard, key = self._keys[index]
        row, entries = {"__key__": key}, {}
        for _, kind, start, length in self._members[
            self._first[index] : self._first[index + 1]
        ].tolist():
            try:
                content = storage.read_bytes(self._paths[shard], start, length)
            except OSError as error:
                raise BadSample("unreadable row", f"{self.place(index)}: {error}") from error
            if len(content) < length:
                raise BadSample("truncated shard", self.place(index))
            if _KINDS[kind] == "json":
                entries = self._entries(content, index)
            else:
                row[_KINDS[kind]] = content if _KINDS[kind] == "image" else _text(content)
        return {**entries, **row}

    def place(self, index: int) -> str:
        shard, key = self._keys[index]
        return f"{self._paths[shard]}, sample {key}"

    def _entries(self, content: bytes, index: int) -> dict[str, Any]:
        try:
            entries = json.loads(content)
        except ValueError as error:
            raise BadSample("bad row", f"{self.place(index)}: {error}") from error
        if not isinstance(entries, dict):
            raise BadSample("bad row", f"{self.place(index)}: its .json is no object")
        return entries

    def _index(self, shard: int):
        path = self._paths[shard]
        try:
            with storage.open_file(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
                end = file.seek(0, os.SEEK_END)
                yield from self._samples(shard, archive, end)
                if end % tarfile.BLOCKSIZE:
                    raise tarfile.ReadError("unexpected end of data")
        except tarfile.TarError as error:
            if not any(number == shard for number, _ in self._keys[-1:]):
                raise UserError(f"{path} is no plain tar file: {error}.") from error
            self.problems.append(f"{path} is cut off behind sample {self._keys[-1][1]}")
        except OSError as error:
            raise storage.unreadable(path, error) from error

    def _samples(self, shard: int, archive: tarfile.TarFile, end: int):
        last = None
        for member in archive:
            folder, _, name = member.name.rpartition("/")
            stem, _, ending = name.partition(".")
            kind = _ENDINGS.get(ending.lower())
            if not member.isreg() or kind is None or not stem:
                continue
            if kind != "image" and member.size > _MAX_TEXT_BYTES:
                continue
            if member.offset_data + member.size > end:
                raise tarfile.ReadError("unexpected end of data")
            key = f"{folder}/{stem}" if folder else stem
            if key != last:  # members of a sample stand side by side
                self._keys.append((shard, key))
                last = key
            yield len(self._keys) - 1, _KINDS.index(kind), member.offset_data, member.size


def _text(content: bytes) -> str:
    return content.decode("utf-8-sig", errors="replace").strip()


def expand_braces(pattern: str) -> list[str]:
    """`a-{00..02}.tar` as its three names, and `{a,b}.tar` as its two; nested ones as well.

    Raises:
      UserError: a range is empty.
    """
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    before, inside, after = pattern[: found.start()], found[1], pattern[found.end() :]
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if bounds:
        low, high = bounds.groups()
        if int(low) > int(high):
            raise UserError(f"{pattern} names nothing: the first number of {{{inside}}} is larger.")
        width = len(low) if low.startswith("0") or len(low) == len(high) else 0
        parts = [str(number).zfill(width) for number in range(int(low), int(high) + 1)]
    else:
        parts = inside.split(",")
    return [name for part in parts for name in expand_braces(before + part + after)]
