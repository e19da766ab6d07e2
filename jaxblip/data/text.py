"""Captions and questions brought into the form that BLIP-2 is trained on."""

from __future__ import annotations

import re

_PUNCTUATION = '.!"()*#:;~'
_TO_SPACES = str.maketrans(_PUNCTUATION, " " * len(_PUNCTUATION))
_TO_NOTHING = str.maketrans("", "", _PUNCTUATION)
_WHITESPACE_RUN = re.compile(r"\s{2,}")


def clean_caption(text: str, max_words: int = 50, prompt: str = "") -> str:
    """Lower-cases, drops some punctuation, keeps `max_words` words, and puts `prompt` in front.

    Follows LAVIS `blip_caption`, in its order: the prompt is neither cleaned nor counted, and
    stands before the caption as it is, so it ends with a space where one is wanted. Commas,
    apostrophes, hyphens, slashes and question marks stay.
    """
    text = text.lower().translate(_TO_SPACES)
    text = _WHITESPACE_RUN.sub(" ", text).rstrip("\n").strip(" ")
    return prompt + " ".join(text.split(" ")[:max_words])


def clean_question(text: str, max_words: int = 50) -> str:
    """Like `clean_caption`, but punctuation is deleted, not replaced (LAVIS `blip_question`)."""
    text = text.lower().translate(_TO_NOTHING).rstrip(" ")
    return " ".join(text.split(" ")[:max_words])
