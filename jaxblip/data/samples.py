"""What a source hands over, and how a sample that cannot be used is named and counted."""

from __future__ import annotations

from collections import Counter
from typing import Any, Protocol

from jaxblip.data.storage import shown

SKIP_REASONS = (
    "bad row",
    "unreadable row",
    "truncated shard",
    "missing image",
    "zero-size image",
    "corrupt image",
    "truncated image",
    "gigantic image",
    "unsupported image",
    "no features",
    "empty caption",
    "empty instruction",
)
CONVERSIONS = (
    "converted CMYK",
    "converted 16-bit",
    "converted palette",
    "converted alpha",
    "converted grayscale",
    "converted colour space",
    "rotated by EXIF",
    "first frame of animation",
)


# What the work on an example is divided into, to tell which is slow.
STAGES = ("reading", "texts", "images")


class BadSample(Exception):
    """One sample cannot be used: `reason` is one of SKIP_REASONS, `detail` says which and why."""

    def __init__(self, reason: str, detail: str = ""):
        detail = shown(" ".join(detail.split())[:1000])  # of libraries, files and captions
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def counts_as_text(counts: Counter) -> str:
    """Reasons with their counts, the commonest first: `corrupt image 3, empty caption 1`."""
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


class LeftOut:
    """Counts what a source leaves out when it is opened, with the first of each kind."""

    def __init__(self):
        self._counts, self._first = Counter(), {}

    def add(self, what: str, where: str) -> None:
        """Counts one of `what`, in the plural, such as "images without captions"."""
        self._counts[what] += 1
        self._first.setdefault(what, shown(where)[:200])

    def sentences(self, source: str) -> list[str]:
        """One about each kind, for the `problems` of `source`."""
        return [
            f"{what}, left out of {source}: {count:,}, such as {self._first[what]}"
            for what, count in self._counts.items()
        ]


class Source(Protocol):
    """Random access to examples; small when pickled, because every worker gets a copy.

    An example is `{"image": bytes | uint8 [H, W, 3], "captions": [str, ...], "image_id": int}`.
    Of a video "image" is a list of its frames, where several are read.
    Examples with the same `image_id` show the same picture. Of the captions one is drawn each time;
    repeats are weights. `__getitem__` raises `BadSample` for an example that cannot be read.

    An example may also have "instruction": str, a question or what else the captions answer. Where
    all have one, `has_instructions` is True. What evaluation groups it by, or hands in with its
    answer, may stand beside that: `rows.FACTS`.

    A source may also have `without_images()`, which returns a copy of itself whose examples lack
    "image": what runs on text alone asks for it; `place(index)`, which says where an example
    stands; and `problems`, sentences about what was left out when it was opened.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...
