"""WebDataset shards: tar files, in which the members of one name, but its ending, are a sample."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxblip.data import storage
from jaxblip.data.json_text import parse_json
from jaxblip.data.rows import MAX_IMAGE_BYTES
from jaxblip.data.samples import BadSample, LeftOut
from jaxblip.errors import UserError

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
_ENDINGS = {**dict.fromkeys(IMAGE_ENDINGS, "image"), "txt": "caption", "json": "json"}
_KINDS = ("image", "caption", "json")
MAX_TEXT_BYTES = 1 << 20  # of a .txt or .json file: what is longer is no caption
_MAX_HEADER_BYTES = 1 << 15  # of a member
_LONG_NUMBER = re.compile(rb"\d{256}")  # which tarfile tries from each of its digits
_END_BYTES = 2 * tarfile.RECORDSIZE  # that are looked at behind the last member


class WebDatasetRows:
    """The samples of tar shards, read in place by position: random access, nothing is unpacked.

    A row has `image`, the bytes of the .jpg, .png or .webp member; `caption`, the text of the .txt
    member; the entries of the .json member; and `__key__`, the common name. The members of a sample
    may stand anywhere in a shard. Those that are no plain files (links, devices) or come a second
    time are left out; nothing is ever written to the paths that an archive names.

    Args:
      spec: a path, a glob, or a brace pattern such as "cc3m-{0000..0331}.tar".

    Attributes:
      problems: what is left out, and which shards are damaged, a sentence each.

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
        members = [row for shard in range(len(self._paths)) for row in self._index(shard)]
        if not self._keys:
            raise UserError(
                f"{storage.shown(self._paths[0])} has no samples; a sample is an image such as "
                "0001.jpg with 0001.txt or 0001.json beside it."
            )
        self._members = np.array(sorted(members), np.int64)
        self._first = np.searchsorted(self._members[:, 0], np.arange(len(self._keys) + 1))

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard, key = self._keys[index]
        row, entries = {"__key__": key}, {}
        for _, kind, start, length in self._members[
            self._first[index] : self._first[index + 1]
        ].tolist():
            if length > (MAX_IMAGE_BYTES if _KINDS[kind] == "image" else MAX_TEXT_BYTES):
                reason = "gigantic image" if _KINDS[kind] == "image" else "bad row"
                detail = f"{self.place(index)}: its {_KINDS[kind]} has {length >> 20} MiB"
                raise BadSample(reason, detail)
            try:
                content = storage.read_bytes(self._paths[shard], start, length)
            except OSError as error:
                detail = f"{self.place(index)}: {storage.phrase(error)}"
                raise BadSample("unreadable row", detail) from error
            if len(content) < length:
                raise BadSample("truncated shard", self.place(index))
            if _KINDS[kind] == "json":
                entries = self._entries(content, index)
            else:
                row[_KINDS[kind]] = content if _KINDS[kind] == "image" else _text(content)
        return {**entries, **row}

    def place(self, index: int) -> str:
        shard, key = self._keys[index]
        return f"{storage.shown(self._paths[shard])}, sample {storage.shown(key)}"

    def _entries(self, content: bytes, index: int) -> dict[str, Any]:
        try:
            entries = parse_json(content)
        except ValueError as error:
            detail = f"{self.place(index)}: its .json: {error}"
            raise BadSample("bad row", detail) from error
        if not isinstance(entries, dict):
            raise BadSample("bad row", f"{self.place(index)}: its .json is no object")
        return entries

    def _index(self, shard: int) -> list[tuple[int, int, int, int]]:
        """The members of a shard that are read; adds to `_keys` and `problems`."""
        path, shown = self._paths[shard], storage.shown(self._paths[shard])
        left_out, before = LeftOut(), len(self._keys)
        numbers: dict[str, int] = {}  # of the samples
        rows: dict[tuple[int, int], tuple[int, int, int, int]] = {}
        try:
            with storage.open_file(path) as file:
                for member in _members(file):
                    key, kind = _key_and_kind(member, left_out)
                    if kind is None:
                        continue
                    if key not in numbers:
                        numbers[key] = len(self._keys)
                        self._keys.append((shard, key))
                    part = numbers[key], _KINDS.index(kind)
                    if part in rows:
                        left_out.add(f"members that are a second {kind} of a sample", member.name)
                    else:
                        rows[part] = (*part, member.offset_data, member.size)
        except OSError as error:
            raise storage.unreadable(path, error) from error
        except _Damaged as error:
            if len(self._keys) == before:
                raise UserError(
                    f"{shown} is no plain tar file: {error}; unpack it if it is compressed."
                ) from error
            last = storage.shown(self._keys[-1][1])
            self.problems.append(f"{shown} is cut off or damaged behind sample {last}: {error}")
        self.problems += left_out.sentences(shown)
        return list(rows.values())


class _Damaged(Exception):
    """What is wrong with a tar file behind its last good member."""


class _Headers:
    """A tar file as `tarfile` may read it: of a damaged one it would read for ever, or all."""

    def __init__(self, file):
        self._file, self.tell, self.seek = file, file.tell, file.seek
        self.room = _MAX_HEADER_BYTES

    def read(self, size: int) -> bytes:
        self.room -= max(1, size)  # at the end of a file nothing is read again and again
        if size < 0 or self.room < 0:
            raise tarfile.ReadError("a header has an impossible length")
        content = self._file.read(size)
        if size > tarfile.BLOCKSIZE and _LONG_NUMBER.search(content):
            raise tarfile.ReadError("a header has an impossible number")
        return content


def _members(file) -> Iterator[tarfile.TarInfo]:
    """Those of a plain tar file.

    Raises:
      _Damaged: behind the last one that is whole.
      OSError: the file cannot be read.
    """
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    headers = _Headers(file)
    try:
        with tarfile.open(fileobj=headers, mode="r:") as archive:
            for member in archive:
                if member.size < 0 or member.offset_data + member.size > end:
                    raise tarfile.ReadError("unexpected end of data")
                yield member
                headers.room = _MAX_HEADER_BYTES
            begin = archive.offset
    except OSError:
        raise
    except Exception as error:  # tarfile raises nearly anything on hostile bytes
        raise _Damaged(storage.phrase(error)) from error
    # tarfile ends in silence where a header is damaged.
    file.seek(begin)
    rest = file.read(_END_BYTES)
    if not rest:
        raise _Damaged("it has no end mark")
    if any(rest):
        raise _Damaged("what follows is no header" if any(rest[:512]) else "another file follows")


def _key_and_kind(member: tarfile.TarInfo, left_out: LeftOut) -> tuple[str, str | None]:
    """The sample that a member belongs to, and what it is of it, None if it is left out."""
    folder, _, name = member.name.rpartition("/")
    stem, _, ending = name.partition(".")
    kind = _ENDINGS.get(ending.lower()) if stem else None
    if kind is None and stem and ending.rpartition(".")[2].lower() in _ENDINGS:
        left_out.add("members with several dots in their names", member.name)
    elif kind is not None and (not member.isreg() or member.issparse()):
        left_out.add("links, devices and the like", member.name)
        kind = None
    return (f"{folder}/{stem}" if folder else stem), kind


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
