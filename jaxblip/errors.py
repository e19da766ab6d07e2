"""The errors that a user can act on; anything else that escapes is a defect of jaxblip."""

from __future__ import annotations

from collections.abc import Mapping


class UserError(Exception):
    """Bad input: one sentence with the wrong value, where it came from, and the fix."""


class UnreadableImages(UserError):
    """Some of the images given cannot be read: a line about each, with the file and the reason.

    Attributes:
      places: which, among the images given.
    """

    def __init__(self, reasons: Mapping[int, str]):
        super().__init__("\n".join(reasons.values()))
        self.places = frozenset(reasons)


class RunStopped(UserError):
    """A run that had to stop by itself: too many bad samples, or losses that are not finite."""
