"""Lists in text files: the names of classes, the answers of which one is chosen."""

from __future__ import annotations

from pathlib import Path

from jaxblip.errors import UserError


def read_lines(path: str, what: str) -> list[str]:
    """The lines of a file, such as the names of classes or a list of answers.

    Raises:
      UserError: it cannot be read, or has fewer than two lines, an empty one, or one twice.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what}={path!r} cannot be read: {error}.") from error
    first: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line:
            raise UserError(f"{path}:{number} is empty: write one name a line.")
        if line in first:
            raise UserError(
                f"{path}:{number} has {line!r} again, which line {first[line]} has: leave one out."
            )
        first[line] = number
    if len(first) < 2:
        raise UserError(f"{path} has {len(first)} line(s): {what} needs two or more, one a line.")
    return list(first)
