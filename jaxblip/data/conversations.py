"""Conversations about an image, as LLaVA and ShareGPT have them: each answer is an example."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxblip.data.json_text import shown_json
from jaxblip.data.rows import BadRow

_TURNS = ("conversations", "messages")
_SPEAKER, _SAID = ("from", "role"), ("value", "content")
_ASKING, _ANSWERING = ("human", "user"), ("gpt", "assistant")
_IMAGE = re.compile(r" ?<image>")  # where the image stands in a text


class Answer(NamedTuple):
    """One answer of a conversation.

    Attributes:
      number: of the conversation in its file.
      entry: the conversation, `{"image", "conversations": [{"from", "value"}]}` or, as ShareGPT
        has it, `{"images": [one], "messages": [{"role", "content"}]}`.
      turn: number of the answer in it.
    """

    number: int
    entry: Mapping[str, Any]
    turn: int

    def row(self) -> dict[str, Any]:
        """Its instruction is all that was said before, a turn a line.

        It is made when it is wanted: of all answers at once they are the square of a conversation.

        Raises:
          BadRow: there is no such answer.
        """
        if not is_conversation(self.entry) or self.turn not in answers(self.entry)[0]:
            raise BadRow(f"turn {self.turn} is no answer")
        said = [text for _, text in _turns(self.entry)[: self.turn + 1]]
        [image] = _images(self.entry)
        instruction = "\n".join(filter(None, said[:-1]))
        return {"image": image, "instruction": instruction, "output": said[-1]}


def is_conversation(entry: Any) -> bool:
    return isinstance(entry, Mapping) and any(name in entry for name in _TURNS)


def answers(entry: Mapping[str, Any]) -> tuple[list[int], list[str]]:
    """The turns of a conversation that are examples, and what of it is left out.

    Raises:
      BadRow: it has another form.
    """
    turns, images = _turns(entry), _images(entry)
    if len(images) != 1:
        return [], [f"conversations {'with several images' if images else 'without an image'}"]
    found, left_out, asked = [], [], False
    for number, (speaker, _) in enumerate(turns):
        asked |= speaker in _ASKING
        if speaker in _ANSWERING and asked:
            found.append(number)
        elif speaker in _ANSWERING:
            left_out.append("answers before a question")
    if not found and not left_out:
        left_out.append("conversations without an answer")
    return found, left_out


def _turns(entry: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Who says what."""
    name = next(name for name in _TURNS if name in entry)
    turns = entry[name]
    if not isinstance(turns, list):
        raise BadRow(f'"{name}" is {shown_json(turns)}, not a list of turns')
    found = []
    for number, turn in enumerate(turns):
        values = turn if isinstance(turn, Mapping) else {}
        speaker = next((values[key] for key in _SPEAKER if key in values), None)
        text = _text(next((values[key] for key in _SAID if key in values), None))
        if speaker not in (*_ASKING, *_ANSWERING, "system") or text is None:
            raise BadRow(
                f"turn {number} is {shown_json(turn)}, not one like "
                '{"from": "human", "value": "..."} of human and gpt, or user and assistant'
            )
        found.append((speaker, _IMAGE.sub("", text).strip()))
    return found


def _text(content: Any) -> str | None:
    """What a turn says; None where it is no text, nor a list of texts and images."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind != "image":
            return None
    return "\n".join(texts)


def _images(entry: Mapping[str, Any]) -> list[Any]:
    image = entry.get("image") or entry.get("images") or []
    return image if isinstance(image, list) else [image]
