import pickle
import sys
from collections import Counter

import pytest

from jaxblip.data.sources import open_source
from jaxblip.errors import UserError

pytest.importorskip("easy_vqa")


@pytest.mark.parametrize(
    ("split", "questions", "images", "yes_or_no"),
    [("train", 38_575, 4000, 28_407), ("test", 9673, 1000, 7136)],
)
def test_the_counts_are_those_that_the_package_says(split, questions, images, yes_or_no):
    source = open_source(f"easy_vqa:{split}", image_size_px=8).without_images()
    assert len(source) == questions and source.has_instructions
    rows = [source[index] for index in range(questions)]
    assert {row["image_id"] for row in rows} == set(range(images))
    answers = Counter(answer for row in rows for answer in row["captions"])
    assert len(answers) == 13 and answers["yes"] + answers["no"] == yes_or_no


def answer_type(answer):
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in ("circle", "rectangle", "triangle") else "color"


def test_a_question_has_the_picture_that_it_is_about():
    easy_vqa = __import__("easy_vqa")
    source = open_source("easy_vqa:test", image_size_px=8, fields={"captions": "not of this"})
    source = pickle.loads(pickle.dumps(source))
    questions, answers, ids = easy_vqa.get_test_questions()
    for index in (0, 1, 5000, len(source) - 1):
        with open(easy_vqa.get_test_image_paths()[ids[index]], "rb") as file:
            image = file.read()
        assert source[index] == {
            "image": image, "instruction": questions[index], "captions": [answers[index]],
            "image_id": ids[index],
            "answer_type": answer_type(answers[index]),
        }  # fmt: skip
    assert len(pickle.dumps(source)) < 1000


@pytest.mark.parametrize(("split", "images"), [("train", 3542), ("test", 880)])
def test_captions_agree_with_every_question(split, images):
    """Each question about a picture is answered from its caption as the package answers it."""
    source = open_source(f"easy_vqa_captions:{split}", image_size_px=8).without_images()
    source = pickle.loads(pickle.dumps(source))
    rows = [source[index] for index in range(len(source))]
    captions = {row["image_id"]: row["captions"][0] for row in rows}
    assert len(captions) == len(rows) == images
    questions = open_source(f"easy_vqa:{split}", image_size_px=8).without_images()
    for index in range(len(questions)):
        row = questions[index]
        if row["image_id"] not in captions:
            continue
        color, shape = captions[row["image_id"]].split()
        words = row["instruction"].rstrip("?").split()
        if row["answer_type"] == "yes/no":
            shown = color in words or shape in words
            negated = not {"no", "not"}.isdisjoint(words)
            assert row["captions"] == ["yes" if shown != negated else "no"]
        else:
            assert row["captions"] == [{"color": color, "shape": shape}[row["answer_type"]]]


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(UserError, match=r"easy-vqa is missing; pip install 'jaxblip\[easy-vqa\]'"):
        open_source("easy_vqa:train", image_size_px=8)
