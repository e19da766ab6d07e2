"""Annotation files of COCO captions, Karpathy's splits, VQA v2, GQA, LLaVA, one row an example."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeVar

from jaxblip.data import storage
from jaxblip.data.conversations import Answer, answers, is_conversation
from jaxblip.data.json_text import parse_json, shown_json
from jaxblip.data.rows import BadRow
from jaxblip.data.samples import BadSample, LeftOut
from jaxblip.errors import UserError

T = TypeVar("T")
_TYPES = ("question_type", "answer_type")  # of VQA v2, by which its accuracy is divided


class AnnotationRows:
    """The examples of a JSON file (or two) in one of the forms that data sets are published in.

    - COCO captions, `{"images": [...], "annotations": [{"image_id", "caption"}]}`, and Karpathy's
      splits, `{"images": [{"filename", "split", "sentences"}]}`: an image with all its captions.
    - LAVIS, `[{"image", "caption", "image_id"}]`: an entry.
    - VQA v2, questions with the annotations as the second file: a question with its ten answers.
    - GQA, `{"00001": {"imageId", "question", "answer"}}`: a question with its answer.
    - LLaVA, `[{"id", "image", "conversations": [{"from", "value"}]}]`, or ShareGPT: an answer, its
      instruction all that was said before, see `conversations.Answer`.

    Args:
      spec: the path of the file; for VQA v2 "QUESTIONS.json,ANNOTATIONS.json".
      split: of Karpathy's file: "train" has "restval" as well, as in the papers; "" for all.

    Attributes:
      problems: what is left out because nothing belongs to it, a sentence each.

    Raises:
      UserError: a file is missing, no JSON, or of none of these forms.
    """

    def __init__(self, spec: str, split: str = ""):
        paths = [spec] if os.path.exists(spec) else spec.split(",")
        self._path, *others = (storage.absolute(path) for path in paths)
        self.folder = os.path.dirname(self._path)
        documents = [_read(path) for path in (self._path, *others)]
        left_out = LeftOut()
        names = " and ".join(map(storage.shown, (self._path, *others)))
        self._rows = _rows(documents, names, split, left_out)
        self.problems = left_out.sentences(names)
        if not self._rows:
            of_split = f" of split {split}" if split else ""
            raise UserError(". ".join([f"{names} has no examples{of_split}", *self.problems]) + ".")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        if not isinstance(row, Answer):
            return row
        try:
            return row.row()
        except BadRow as bad:
            raise BadSample("bad row", f"{self.place(index)}: {bad}") from bad

    def place(self, index: int) -> str:
        row, path = self._rows[index], storage.shown(self._path)
        if isinstance(row, Answer):
            return f"{path}, entry {row.number}, turn {row.turn}"
        return f"{path}, example {index}"


def _read(path: str) -> Any:
    try:
        return parse_json(storage.read_bytes(path))
    except OSError as error:
        raise storage.unreadable(path, error) from error
    except ValueError as error:
        raise UserError(f"{storage.shown(path)} is no JSON: {storage.phrase(error)}.") from error


def _rows(
    documents: list[Any], names: str, split: str, left_out: LeftOut
) -> list[dict[str, Any] | Answer]:
    first = documents[0]
    if len(documents) == 2:
        form, make = "VQA v2", lambda: _vqa(*documents, left_out)
    elif len(documents) > 2:
        raise UserError(f"{names} are {len(documents)} files: open one, or two of VQA v2.")
    elif isinstance(first, list) and any(map(is_conversation, first)):
        form, make = "LLaVA", lambda: _llava(first, left_out)
    elif isinstance(first, list):
        form, make = "LAVIS", lambda: _each(first, "the list", _lavis)
    elif isinstance(first, dict) and "images" in first and "annotations" in first:
        form, make = "COCO captions", lambda: _coco(first, left_out)
    elif isinstance(first, dict) and "images" in first:
        form, make = "Karpathy's", lambda: _karpathy(first, split)
    elif isinstance(first, dict) and _is_gqa(first):
        form, make = "GQA", lambda: _each(list(first.items()), "the object", _gqa)
    elif isinstance(first, dict) and "questions" in first:
        raise UserError(
            f"{names} has questions without answers: name the annotations as well, as "
            "QUESTIONS.json,ANNOTATIONS.json."
        )
    else:
        raise UserError(
            f"{names} is in none of the forms that are known: COCO captions, Karpathy's splits, "
            "VQA v2, GQA, LLaVA conversations, or a list of objects with image and caption."
        )
    if split and form != "Karpathy's":
        raise UserError(f"{names}, read as {form}, has no splits: leave out :{split}.")
    try:
        return make()
    except BadRow as bad:
        raise UserError(f"{names}: read as {form}, but {bad}.") from bad


def _each(entries: Any, name: str, make: Callable[[Any], T]) -> list[T]:
    """What `make` gives for each entry.

    Raises:
      BadRow: it fails, because an entry has another form.
    """
    if not isinstance(entries, list):
        raise BadRow(f"{name} is {shown_json(entries)}, not a list")
    made = []
    for number, entry in enumerate(entries):
        try:
            made.append(make(entry))
        except KeyError as error:
            raise BadRow(f"entry {number} of {name} lacks {error}") from error
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            shown = shown_json(entry)
            raise BadRow(f"entry {number} of {name} has another form: {shown}") from error
        except BadRow as bad:
            raise BadRow(f"entry {number} of {name}: {bad}") from bad
    return made


def _lavis(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise TypeError
    return entry


def _coco(document: dict[str, Any], left_out: LeftOut) -> list[dict[str, Any]]:
    captions = defaultdict(list)
    rows = {}

    def add_caption(annotation):
        captions[annotation["image_id"]].append(annotation["caption"])

    def add_image(image):
        key = image["id"]
        if key in rows:
            left_out.add("images with the id of another", f"id {key}")
        elif key in captions:
            rows[key] = {"image": image["file_name"], "captions": captions[key], "id": key}
            if "domain" in image:  # NoCaps
                rows[key]["domain"] = image["domain"]
        else:
            left_out.add("images without captions", f"id {key}")

    _each(document["annotations"], '"annotations"', add_caption)
    _each(document["images"], '"images"', add_image)
    for key in captions:
        if key not in rows:
            left_out.add("images that only captions name", f"id {key}")
    return list(rows.values())


def _karpathy(document: dict[str, Any], split: str) -> list[dict[str, Any]]:
    wanted = {"train": ("train", "restval")}.get(split, (split,))

    def row(image):
        if split and image["split"] not in wanted:
            return None
        return {
            "image": os.path.join(image.get("filepath", ""), image["filename"]),
            "captions": [sentence["raw"] for sentence in image["sentences"]],
            "id": image.get("cocoid", image.get("imgid")),
        }

    return list(filter(None, _each(document["images"], '"images"', row)))


def _vqa(questions: Any, annotations: Any, left_out: LeftOut) -> list[dict[str, Any]]:
    wanted = (questions, "questions"), (questions, "data_subtype"), (annotations, "annotations")
    for document, name in wanted:
        if not isinstance(document, dict) or name not in document:
            raise BadRow(f'there is no "{name}"')
    answers_of, subset = {}, questions["data_subtype"]

    def add_answers(annotation):
        key = annotation["question_id"]
        if key in answers_of:
            left_out.add("annotations of a question that has one", f"question {key}")
        else:
            answers_of[key] = {
                "answers": [answer["answer"] for answer in annotation["answers"]],
                **{name: annotation[name] for name in _TYPES if name in annotation},
            }

    def row(question):
        key, image = question["question_id"], question["image_id"]
        if key not in answers_of:
            raise BadRow(f"question {shown_json(key)} has no annotation")
        return {
            "image": f"COCO_{subset}_{image:012d}.jpg",
            "question": question["question"],
            "id": image,
            "question_id": key,
            **answers_of[key],
        }

    _each(annotations["annotations"], '"annotations"', add_answers)
    rows = _each(questions["questions"], '"questions"', row)
    asked = {row["question_id"] for row in rows}
    for key in answers_of:
        if key not in asked:
            left_out.add("annotations without a question", f"question {key}")
    return rows


def _is_gqa(document: dict[str, Any]) -> bool:
    first = next(iter(document.values()), None)
    return isinstance(first, dict) and "imageId" in first


def _gqa(question: tuple[str, Any]) -> dict[str, Any]:
    key, entry = question
    row = {"image": f"{entry['imageId']}.jpg", "question": entry["question"], "question_id": key}
    row |= {"answer": entry["answer"], "id": entry["imageId"]}
    if "types" in entry:
        row["question_type"] = entry["types"]["structural"]
    return row


def _llava(entries: list[Any], left_out: LeftOut) -> list[Answer]:
    found = []

    def add(numbered):
        number, entry = numbered
        if not is_conversation(entry):
            raise KeyError("conversations")
        turns, unused = answers(entry)
        found.extend(Answer(number, entry, turn) for turn in turns)
        for what in unused:
            left_out.add(what, f"entry {number}")

    _each(list(enumerate(entries)), "the list", add)
    return found
