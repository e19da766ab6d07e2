"""Annotation files of COCO captions, Karpathy's splits, VQA v2 and LLaVA, one row an example."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from typing import Any

from jaxblip.data import storage
from jaxblip.errors import UserError


class AnnotationRows:
    """The examples of a JSON file (or two) in one of the forms that data sets are published in.

    - COCO captions, `{"images": [...], "annotations": [{"image_id", "caption"}]}`, and Karpathy's
      splits, `{"images": [{"filename", "split", "sentences"}]}`: an image with all its captions.
    - LAVIS, `[{"image", "caption", "image_id"}]`: an entry.
    - VQA v2, questions with the annotations as the second file: a question with its ten answers.
    - LLaVA, `[{"id", "image", "conversations": [{"from", "value"}]}]`: an answer, its instruction
      all that was said before.

    Args:
      spec: the path of the file; for VQA v2 "QUESTIONS.json,ANNOTATIONS.json".
      split: of Karpathy's file: "train" has "restval" as well, as in the papers; "" for all.

    Raises:
      UserError: a file is missing, no JSON, or of none of these forms.
    """

    def __init__(self, spec: str, split: str = ""):
        self._paths = [storage.absolute(path) for path in spec.split(",")]
        self.folder = os.path.dirname(self._paths[0])
        documents = [_read(path) for path in self._paths]
        self._rows = _rows(documents, self._paths, split)
        if not self._rows:
            raise UserError(
                f"{self._paths[0]} has no examples" + (f" of split {split}." if split else ".")
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]

    def place(self, index: int) -> str:
        return f"{self._paths[0]}, example {index}"


def _read(path: str) -> Any:
    try:
        return json.loads(storage.read_bytes(path))
    except OSError as error:
        raise storage.unreadable(path, error) from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}.") from error


def _rows(documents: list[Any], paths: list[str], split: str) -> list[dict[str, Any]]:
    first = documents[0]
    if len(documents) == 2:
        form, make = "VQA v2", lambda: _vqa(*documents)
    elif isinstance(first, list) and _has_turns(first):
        form, make = "LLaVA", lambda: _llava(first)
    elif isinstance(first, list):
        form, make = "LAVIS", lambda: [dict(entry) for entry in first]
    elif isinstance(first, dict) and "images" in first and "annotations" in first:
        form, make = "COCO captions", lambda: _coco(first)
    elif isinstance(first, dict) and "images" in first:
        form, make = "Karpathy's", lambda: _karpathy(first, split)
    elif isinstance(first, dict) and "questions" in first:
        raise UserError(
            f"{paths[0]} has questions without answers: name the annotations as well, as "
            "QUESTIONS.json,ANNOTATIONS.json."
        )
    else:
        raise UserError(
            f"{paths[0]} is in none of the forms that are known: COCO captions, Karpathy's splits, "
            "VQA v2, LLaVA conversations, or a list of objects with image and caption."
        )
    try:
        return make()
    except KeyError as error:
        what = f"an entry lacks {error}"
    except (TypeError, ValueError, AttributeError, IndexError):
        what = "an entry has another form"
    raise UserError(f"{' and '.join(paths)}: read as {form}, but {what}.")


def _has_turns(entries: list[Any]) -> bool:
    return bool(entries) and isinstance(entries[0], dict) and "conversations" in entries[0]


def _coco(document: dict[str, Any]) -> list[dict[str, Any]]:
    captions = defaultdict(list)
    for annotation in document["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"])
    return [
        {"image": image["file_name"], "captions": captions[image["id"]], "id": image["id"]}
        for image in document["images"]
        if image["id"] in captions
    ]


def _karpathy(document: dict[str, Any], split: str) -> list[dict[str, Any]]:
    wanted = {"train": ("train", "restval")}.get(split, (split,))
    return [
        {
            "image": os.path.join(image.get("filepath", ""), image["filename"]),
            "captions": [sentence["raw"] for sentence in image["sentences"]],
            "id": image.get("cocoid", image.get("imgid")),
        }
        for image in document["images"]
        if not split or image["split"] in wanted
    ]


def _vqa(questions: dict[str, Any], annotations: dict[str, Any]) -> list[dict[str, Any]]:
    answers = {
        annotation["question_id"]: [answer["answer"] for answer in annotation["answers"]]
        for annotation in annotations["annotations"]
    }
    subset = questions["data_subtype"]
    return [
        {
            "image": f"COCO_{subset}_{question['image_id']:012d}.jpg",
            "question": question["question"],
            "answers": answers[question["question_id"]],  # KeyError: it has no annotation
            "id": question["image_id"],
            "question_id": question["question_id"],
        }
        for question in questions["questions"]
    ]


def _llava(conversations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each answer; its instruction is all that was said before, a turn a line."""
    rows = []
    for conversation in conversations:
        said = []
        for turn in conversation["conversations"]:
            text = turn["value"].replace("<image>", "").strip()
            if turn["from"] == "gpt" and said:
                rows.append({
                    "image": conversation["image"], "instruction": "\n".join(said), "output": text,
                })  # fmt: skip
            said.append(text)
    return rows
