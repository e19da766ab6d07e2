"""Texts as they are kept on disk: every script and case as it is, without what is no text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from jaxblip.data.samples import BadSample

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # without tab and line break
# Zero-width space and no-break space, word joiner, half surrogates, non-characters. Joiners and
# direction marks stay: emoji, Persian and Indic scripts are written with them.
_INVISIBLE = re.compile("[\u200b\ufeff\u2060\ud800-\udfff\ufffe\uffff]")


def clean_text(text: str, lines: bool = False) -> str:
    """The text in Unicode's composed form (NFC), without control and invisible characters.

    White space, of any kind and length, becomes one space.

    Args:
      lines: line breaks and what indents a line stay; answers of assistants have code and lists.
    """
    text = _INVISIBLE.sub("", unicodedata.normalize("NFC", text))
    if not lines:
        return " ".join(_CONTROLS.sub(" ", text).split())
    text = "\n".join(_CONTROLS.sub(" ", line).rstrip() for line in text.splitlines())
    return text.strip("\n").rstrip()


def clean_texts(
    texts: Sequence[str], min_chars: int, max_chars: int, lines: bool = False
) -> list[str]:
    """Those texts that are left, clean.

    Raises:
      BadSample: there is none.
    """
    clean = [clean_text(text, lines) for text in texts]
    kept = [text for text in clean if min_chars <= len(text) <= max_chars]
    if not kept:
        longest = max(map(len, clean), default=0)
        if not longest:
            raise BadSample("empty caption")
        too = "long" if longest > max_chars else "short"
        raise BadSample(f"caption too {too}", f"{longest} characters")
    return kept
