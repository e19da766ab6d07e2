"""Reading JSONL, and what is said about a file that cannot be read."""

import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from jaxblip.data.samples import BadSample
from jaxblip.data.shapes import ShapesSource
from jaxblip.data.rows import RowSource
from jaxblip.data.sources import open_source
from jaxblip.errors import UserError


def jsonl(path):
    return open_source(str(path), image_size_px=32)


def png(colour=(200, 30, 30), size=(8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def dense(ids):
    """Ids numbered in the order in which they come."""
    order = list(dict.fromkeys(ids))
    return [order.index(each) for each in ids]


def write(folder, lines, name="data.jsonl"):
    path = folder / name
    path.write_text("".join(
        (line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines
    ), encoding="utf-8")
    return path


def test_reads_bytes_captions_and_ids(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.png").write_bytes(png())
    absolute = tmp_path / "2.png"
    absolute.write_bytes(png((0, 0, 255)))
    path = write(tmp_path, [
        {"image": "pictures/1.png", "caption": "Ein Hündchen – 犬"},
        "   \r",
        {"image": str(absolute), "captions": ["b", "c"], "id": "x"},
        {"image": "pictures/1.png", "caption": "again the first"},
        {"image": "pictures/1.png", "caption": "known by its id", "id": "x"},
        {"image": str(absolute), "caption": "no id", "id": None},
    ])
    source = pickle.loads(pickle.dumps(jsonl(path)))
    assert len(source) == 5
    same = source[0]["image_id"]
    assert source[0] == {"image": png(), "captions": ["Ein Hündchen – 犬"], "image_id": same}
    assert source[1]["image"] == png((0, 0, 255))
    assert source[1]["captions"] == ["b", "c"]
    assert dense([source[i]["image_id"] for i in range(5)]) == [0, 1, 0, 1, 2]
    assert source.without_images()[2] == {"captions": ["again the first"], "image_id": same}


def test_is_light_to_send_to_workers(tmp_path):
    path = write(tmp_path, [{"image": "a.png", "caption": "word " * 200}] * 1000)
    assert len(pickle.dumps(jsonl(path))) < 40_000 < path.stat().st_size


def test_missing_image_is_a_bad_sample_that_names_the_file(tmp_path):
    path = write(tmp_path, [{"image": "gone.png", "caption": "a"}, {"image": "\0", "caption": "a"}])
    for index, name in enumerate(("gone.png", "")):
        with pytest.raises(BadSample) as caught:
            jsonl(path)[index]
        assert caught.value.reason == "missing image"
        assert name in caught.value.detail


def test_no_captions_is_a_bad_sample_and_not_a_defect_of_the_file(tmp_path):
    assert jsonl(write(tmp_path, [{"image": "a", "captions": []}])).without_images()[0][
        "captions"
    ] == [""]


def test_questions_and_instructions_are_read_with_what_answers_them(tmp_path):
    lines = [
        {"image": "a.png", "question": "What is it?", "answer": "A cat."},
        {"image": "a.png", "question": "how many", "answers": ["2", "2", "two"], "caption": "cats"},
        {"image": "b.png", "instruction": "Describe it.", "output": "It is\na dog."},
        {"image": "b.png", "instruction": "Shorter.", "outputs": ["A dog.", "Dog."], "id": 7},
    ]
    source = jsonl(write(tmp_path, lines)).without_images()
    assert source.has_instructions and pickle.loads(pickle.dumps(source)).has_instructions
    rows = [source[i] for i in range(4)]
    assert dense([row.pop("image_id") for row in rows]) == [0, 0, 1, 2]
    assert source[3]["image_id"] == 7
    assert rows == [
        {"captions": ["A cat."], "instruction": "What is it?"},
        {"captions": ["2", "2", "two"], "instruction": "how many"},
        {"captions": ["It is\na dog."], "instruction": "Describe it."},
        {"captions": ["A dog.", "Dog."], "instruction": "Shorter."},
    ]
    mixed = jsonl(write(tmp_path, [*lines, GOOD])).without_images()
    assert not mixed.has_instructions
    assert mixed[4] == {"captions": ["a"], "image_id": source[0]["image_id"]}


GOOD = {"image": "a.png", "caption": "a"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'image': 1}", r"data\.jsonl:2: no JSON .*\{'image': 1\}"),
        # The parser counts lines, too: its numbers would contradict ours.
        ('{"image": "a.png"', r"data\.jsonl:2: no JSON \(Expecting ',' delimiter\): \{\"image"),
        ("[1, 2]", r"data\.jsonl:2: no JSON object: \[1, 2\]"),
        ({"caption": "a"}, r'data\.jsonl:2: no "image", the line has "caption"'),
        ({"image": "a.png", "text": "a"}, r'data\.jsonl:2: no "caption".*has "image", "text"'),
        ({"image": 3, "caption": "a"}, r'data\.jsonl:2: "image" is 3'),
        ({"image": "a.png", "caption": None}, r'data\.jsonl:2: "caption" is null'),
        ({"image": "a.png", "captions": "a"}, r'data\.jsonl:2: "captions" is "a"'),
        ({"image": "a.png", "captions": [1]}, r'data\.jsonl:2: "captions" is \[1\]'),
        ({"image": "a.png", "caption": "a", "id": [1]}, r'data\.jsonl:2: "id" is \[1\]'),
        (
            {"image": "a.png", "question": "what"},
            r'data\.jsonl:2: no "answer" \(or "answers"\), the line has "image", "question"; '
            r'write it like {.*"question": .*"answer": ',
        ),
        (
            {"image": "a.png", "instruction": "what", "captions": 3},
            r'data\.jsonl:2: "captions" is 3',
        ),
        (
            {"image": "a.png", "instruction": "what", "answer": "a"},
            r'data\.jsonl:2: no "question", .*"question": .*"answer": ',
        ),
        (
            {"image": "a.png", "outputs": ["a"]},
            r'data\.jsonl:2: no "instruction", .*"instruction": .*"output": ',
        ),
        ({"question": "what", "answer": "a"}, r'data\.jsonl:2: no "image", .*"question": '),
        (
            {"image": "a.png", "question": 3, "answer": "a"},
            r'data\.jsonl:2: "question" is 3, not a text',
        ),
        (
            {"image": "a.png", "question": "a", "answers": [{"answer": "b"}]},
            r'data\.jsonl:2: "answers" is \[{"answer": "b"}\], not a list of texts',
        ),
        (
            {"image": "a.png", "instruction": "a", "output": None},
            r'data\.jsonl:2: "output" is null, not a text',
        ),
    ],
)
def test_a_bad_line_is_named_with_file_and_number(tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        jsonl(write(tmp_path, [GOOD, line, GOOD]))


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"image": "\xff\xfe", "caption": "a"}\n')
    with pytest.raises(UserError, match=r"data\.jsonl:1: no JSON \(it is not UTF-8\)"):
        jsonl(path)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*nowhere\.jsonl.*No such file"):
        jsonl(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match=r"empty\.jsonl is empty"):
        jsonl(write(tmp_path, [], "empty.jsonl"))
    with pytest.raises(UserError, match=r"blank\.jsonl is empty"):
        jsonl(write(tmp_path, ["", " "], "blank.jsonl"))


def test_open_source_knows_its_specs(tmp_path):
    shapes = open_source("shapes:heldout", image_size_px=32)
    assert isinstance(shapes, ShapesSource) and len(shapes) == 500
    assert np.shape(shapes[0]["image"]) == (32, 32, 3)
    assert isinstance(jsonl(write(tmp_path, [GOOD])), RowSource)
    for spec in ("shapes", "shapes:test", "coco", ""):
        with pytest.raises(UserError, match=r"shapes:train, shapes:heldout.*\.jsonl"):
            open_source(spec, image_size_px=32)
