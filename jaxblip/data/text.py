"""Captions and questions brought into the form that BLIP-2 is trained on."""

from __future__ import annotations

import re
import unicodedata

INSTRUCTION = "{}"  # its place in a prompt
# BLIP-2's prompts for questions (arXiv 2301.12597, section 4.2), and how LAVIS decodes the answer.
QUESTION = "Question: {} Answer:"
QUESTION_FOR_ENCODER = "Question: {} Short answer:"
ANSWER_DECODING = {"max_new_tokens": 10, "min_new_tokens": 1, "length_penalty": -1.0}
_PUNCTUATION = '.!"()*#:;~'
_TO_SPACES = str.maketrans(_PUNCTUATION, " " * len(_PUNCTUATION))
_TO_NOTHING = str.maketrans("", "", _PUNCTUATION)
_INVISIBLE = ("Cc", "Cf", "Cs", "Zs", "Zl", "Zp")  # general categories of Unicode
_WHITESPACE_RUN = re.compile(r"\s{2,}")


def clean_caption(text: str, max_words: int = 50, prompt: str = "") -> str:
    """Lower-cases, drops some punctuation, keeps `max_words` words, and puts `prompt` in front.

    With `max_words` 0 a text stays as it is written, but for white space around it. One of nothing
    but spaces and invisible characters, such as marks of direction, is empty.

    Follows LAVIS `blip_caption`, in its order: the prompt is neither cleaned nor counted, and
    stands before the caption as it is, so it ends with a space where one is wanted. Commas,
    apostrophes, hyphens, slashes and question marks stay.
    """
    if not _is_visible(text):
        return prompt
    if not max_words:
        return prompt + text.strip()
    text = text.lower().translate(_TO_SPACES)
    text = _WHITESPACE_RUN.sub(" ", text).rstrip("\n").strip(" ")
    return prompt + " ".join(text.split(" ")[:max_words])


def clean_question(text: str, max_words: int = 50) -> str:
    """Like `clean_caption`, but punctuation is deleted, not replaced (LAVIS `blip_question`)."""
    if not _is_visible(text):
        return ""
    if not max_words:
        return text.strip()
    text = text.lower().translate(_TO_NOTHING).rstrip(" ")
    return " ".join(text.split(" ")[:max_words])


def _is_visible(text: str) -> bool:
    return any(unicodedata.category(character) not in _INVISIBLE for character in text)


def fill_prompt(prompt: str, instruction: str) -> str:
    """`prompt` with the instruction, or question, where it has {}; no other brace counts."""
    before, place, after = prompt.partition(INSTRUCTION)
    return before + instruction + after if place else prompt


def join_prompt(prompt: str, text: str) -> str:
    """The text behind the prompt, with one space between them, as a generated text follows it."""
    return f"{prompt.rstrip()} {text}" if prompt.strip() else text
