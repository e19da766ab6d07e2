"""JSON as files of any origin hold it: what is ambiguous or cannot be read is an error."""

from __future__ import annotations

import json
from typing import Any

from jaxblip.data.storage import shown

_MAX_DIGITS = 1000


def parse_json(raw: bytes) -> Any:
    """The value of a document in UTF-8 (or in UTF-16, UTF-32, or with a byte order mark).

    Raises:
      ValueError: it is no JSON, or an object has a key twice, of which one would get lost. The
        message is a phrase that says why.
    """
    try:
        return _DECODER.decode(raw.decode(json.detect_encoding(raw), "surrogatepass"))
    except json.JSONDecodeError as error:  # its "line 1 column 9" counts in a line as in a file
        raise ValueError(error.msg) from error
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def shown_json(value: Any) -> str:
    """The beginning of a value as JSON has it, for messages."""
    try:
        return shown(json.dumps(value, default=str, ensure_ascii=False)[:60])
    except (TypeError, ValueError, RecursionError):  # such as keys that are bytes
        return f"of type {type(value).__name__}"


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {shown_json(twice)} stands twice in an object")
    return found


# Kept, because `json.loads` makes one each time: twice the time of a line.
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)
