"""JSON and JSONL of every wrong shape, and files that change while they are read."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from hostile import PNG, bad_sample, inspected, opened
from jaxblip.data import jsonl
from jaxblip.errors import UserError

GOOD = '{"image": "1.png", "caption": "a"}'
DEEP = "[" * 100_000


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "1.png").write_bytes(PNG)
    return tmp_path


def captions(source):
    return [source[index]["captions"] for index in range(len(source))]


LINES = {
    "deep nesting": (DEEP, r"no JSON \(it is nested too deeply\): \[\[\["),
    "deep nesting in a value": (
        f'{{"image": {"[" * 500 + "]" * 500}, "caption": "a"}}', r'"image" is \[\[\[',
    ),
    "a key twice": (
        '{"image": "1.png", "caption": "a", "caption": "b"}', 'the key "caption" stands twice',
    ),
    "a number of 5000 digits": (
        f'{{"image": "1.png", "caption": "a", "id": {"1" * 5000}}}', "a number has 5000 digits",
    ),
    "not a number": ('{"image": "1.png", "caption": "a", "id": NaN}', '"id" is NaN, not a whole'),
    "an infinite number": ('{"image": "1.png", "caption": "a", "id": 1e999}', '"id" is Infinity'),
    "an array": (f"[{GOOD}, {GOOD}]", r"no JSON object: \[\{"),
    "an array over lines": ("[\n" + GOOD, r"no JSON \(Expecting value\): \["),
    "two objects": (GOOD + GOOD, r"no JSON \(Extra data\)"),
    "a line end in a text": (GOOD[:-3] + "\n", r"no JSON \(Invalid control"),
    "marks of direction": ("\u202e" + GOOD, r"no JSON \(Expecting value\): \\u202e\{"),
    "no image at all": ('{"image": {}, "caption": "a"}', '"image" is {}, not bytes or the path'),
    "a million keys": (
        json.dumps({str(key): 1 for key in range(100_000)}), 'no "caption" .* the line has "0"',
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LINES)
def test_a_bad_line_is_one_sentence(case, folder, capsys):
    line, message = LINES[case]
    path = folder / "data.jsonl"
    path.write_text(f"{GOOD}\n{line}\n{GOOD}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"data\.jsonl:2: .*" + message) as caught:
        opened(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
    assert inspected(path, capsys)[0] == 2


BYTES = {
    "UTF-16": (GOOD.encode("utf-16"), r":1: no JSON \(it is not UTF-8\)|no JSON"),
    "latin-1": (GOOD.replace("a", "ä").encode("latin-1"), "no JSON"),
    "zero bytes": (b"\0" * 100, "no JSON"),
    "gzip": (gzip.compress(GOOD.encode() * 100), r"no JSON \(it is not UTF-8\)"),
    "a bomb of gzip": (gzip.compress(b" " * 10_000_000), r"no JSON \(it is not UTF-8\)"),
    "a picture": (PNG, "no JSON"),
    "nothing": (b"", "is empty"),
    "a byte order mark alone": (b"\xef\xbb\xbf", "no JSON"),
}


@pytest.mark.parametrize("case", BYTES)
@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_bytes_that_are_no_text(case, name, folder, capsys):
    data, message = BYTES[case]
    path = folder / name
    path.write_bytes(data + b"\n" if data and name == "data.jsonl" else data)
    if name == "data.json":
        message = r"data\.json(, read as|.* is no JSON| is in none of the forms)"
    with pytest.raises(UserError, match=message):
        opened(path)
    assert inspected(path, capsys)[0] == 2


def test_a_byte_order_mark_and_windows_line_ends(folder):
    path = folder / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{GOOD}\r\n\r\n{GOOD}".encode())
    assert captions(opened(path)) == [["a"], ["a"]]
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        (folder / "data.json").write_text(f"[{GOOD}]", encoding=encoding)
        assert captions(opened(folder / "data.json")) == [["a"]]


def test_a_line_of_ten_megabytes(folder):
    path = folder / "data.jsonl"
    path.write_text('{"image": "1.png", "caption": "%s"}\n%s\n' % ("word " * 2_000_000, GOOD))
    source = opened(path)
    assert len(source[0]["captions"][0]) == 10_000_000 and source[1]["captions"] == ["a"]


def test_a_line_without_end_is_not_read_to_its_end(folder, monkeypatch):
    monkeypatch.setattr(jsonl, "_MAX_LINE_BYTES", 1000)
    (folder / "data.jsonl").write_text(GOOD + "\n" + "[" * 2000)
    with pytest.raises(UserError, match=r"data\.jsonl:2: longer than 1,000 bytes; write one"):
        opened(folder / "data.jsonl")


def test_halves_of_characters_are_replaced(folder):
    path = folder / "data.jsonl"
    lines = [r'"\ud83d\ude00 whole"', r'"half \ud83d"', r'"\udc00\ud800"', r'"\u0000 zero"']
    path.write_text("\n".join(f'{{"image": "1.png", "caption": {line}}}' for line in lines))
    assert captions(opened(path)) == [
        ["\U0001f600 whole"], ["half \ufffd"], ["\ufffd\ufffd"], ["\0 zero"],
    ]  # fmt: skip


def test_numbers_as_ids(folder):
    path = folder / "data.jsonl"
    ids = ["5", "5.0", "-5", "1" * 900, "true", "1e3", "9223372036854775808", "0"]
    path.write_text("\n".join(GOOD[:-1] + f', "id": {each}}}' for each in ids))
    found = [opened(path)[index]["image_id"] for index in range(len(ids))]
    assert found[0] == found[1] == 5 and found[5] == 1000 and found[7] == 0
    assert all(0 <= each < 2**63 for each in found)


def test_a_file_that_changes_when_it_is_open_gives_no_garbage(folder):
    path = folder / "data.jsonl"
    path.write_text("\n".join([GOOD, GOOD, GOOD, GOOD]))
    source = opened(path)
    inner = '{"x":' + GOOD[:-6] + "}}"
    path.write_text("\n".join(["1" * len(GOOD), "1" * 5 + GOOD[:-6] + "]", inner, ""]))
    assert "data.jsonl:1: no object: 111" in bad_sample(source, 0, "bad row")
    for index in (1, 2, 3):
        detail = bad_sample(source, index, "unreadable row")
        assert f"data.jsonl:{index + 1}: " in detail
    path.unlink()
    assert "No such file" in bad_sample(source, 0, "unreadable row")


def test_a_row_that_loses_its_instruction_is_a_bad_sample_without_one(folder):
    """What is read of all rows is there in each, if only as an empty text."""
    (folder / "data.csv").write_text("image,question,answer,caption\n1.png,why?,so,x\n")
    assert opened(folder / "data.csv")[0]["instruction"] == "why?"
    table = pyarrow.table({
        "image": ["1.png"] * 2, "question": ["why?", None], "answer": ["so", None],
        "caption": ["x", "a caption"],
    })  # fmt: skip
    pyarrow.parquet.write_table(table, folder / "data.parquet")
    source = opened(folder / "data.parquet")
    assert source.has_instructions
    assert [source[index]["instruction"] for index in range(2)] == ["why?", ""]


DOCUMENTS = {
    "deep nesting": (DEEP, "is no JSON: it is nested too deeply"),
    "deep objects": ('{"a":' * 100_000, "is no JSON: it is nested too deeply"),
    "a key twice": ('[{"image": "a", "image": "b", "caption": "c"}]', '"image" stands twice'),
    "a number": ("3", "is in none of the forms that are known"),
    "nothing in it": ("[]", "has no examples"),
    "entries that are no objects": ("[[1]]", "entry 0 of the list has another form"),
    "images that are no list": (
        '{"images": {"a": 1}, "annotations": []}', '"images" is {"a": 1}, not a list',
    ),
    "a caption without an image": (
        '{"images": [], "annotations": [{"image_id": 1, "caption": "a"}]}',
        "has no examples.*images that only captions name, left out of .*: 1, such as id 1",
    ),
    "boxes, not captions": (
        '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "bbox": []}]}',
        "entry 0 of \"annotations\" lacks 'caption'",
    ),
    "ids of lists": (
        '{"images": [{"id": [1], "file_name": "a"}], "annotations": []}', "another form",
    ),
    "sentences of texts": (
        '{"images": [{"filename": "a", "sentences": ["b"]}]}', 'entry 0 of "images" has another',
    ),
    "a picture of objects": ('[{"image": {"a": NaN}, "caption": "a"}]', '"image" is {"a": NaN}'),
}  # fmt: skip


@pytest.mark.parametrize("case", DOCUMENTS)
def test_a_bad_document_is_one_sentence(case, folder, capsys):
    text, message = DOCUMENTS[case]
    (folder / "data.json").write_text(text)
    with pytest.raises(UserError, match=r"data\.json.*" + message) as caught:
        opened(folder / "data.json")
    assert str(caught.value).isprintable()
    assert inspected(folder / "data.json", capsys)[0] == 2


def test_what_belongs_to_nothing_is_counted(folder, capsys):
    document = {
        "images": [{"id": 1, "file_name": "1.png"}, {"id": 2, "file_name": "no"},
                   {"id": 1, "file_name": "twice"}],
        "annotations": [{"image_id": 1, "caption": "a"}, {"image_id": "3\n", "caption": "b"}],
    }  # fmt: skip
    path = folder / "data.json"
    path.write_text(json.dumps(document))
    source = opened(path)
    assert captions(source) == [["a"]]
    assert source.problems == [
        f"images without captions, left out of {path}: 1, such as id 2",
        f"images with the id of another, left out of {path}: 1, such as id 1",
        f"images that only captions name, left out of {path}: 1, such as id 3\\n",
    ]
    assert source.problems[1] in inspected(path, capsys)[1]
    (folder / "q.json").write_text(json.dumps({"data_subtype": "v", "questions": [
        {"image_id": 1, "question": "why?", "question_id": 7}]}))  # fmt: skip
    (folder / "a.json").write_text(json.dumps({"annotations": [
        {"question_id": key, "answers": [{"answer": "so"}]} for key in (7, 7, 8)]}))  # fmt: skip
    source = opened(f"{folder}/q.json,{folder}/a.json")
    assert [problem.partition(",")[0] for problem in source.problems] == [
        "annotations of a question that has one", "annotations without a question",
    ]  # fmt: skip


def test_a_later_bad_entry_is_a_bad_sample(folder, capsys):
    entries = [{"image": 3, "caption": "a"}, json.loads(GOOD), {"image": "1.png", "caption": [1]}]
    (folder / "data.json").write_text(json.dumps(entries))
    source = opened(folder / "data.json")
    assert 'example 0: "image" is 3' in bad_sample(source, 0, "bad row")
    assert source[1]["captions"] == ["a"]
    bad_sample(source, 2, "bad row")
    assert "bad row: 2, such as example 0" in inspected(folder / "data.json", capsys)[1]


def test_splits_and_lists_of_files_that_cannot_be(folder):
    (folder / "data.json").write_text(f"[{GOOD}]")
    with pytest.raises(UserError, match="read as LAVIS, has no splits: leave out :train"):
        opened(f"{folder}/data.json:train")
    path = folder / "data.json"
    with pytest.raises(UserError, match="are 3 files: open one, or two of VQA v2"):
        opened(f"{path},{path},{path}")
    with pytest.raises(UserError, match='read as VQA v2, but there is no "questions"'):
        opened(f"{path},{path}")
    (folder / "a,b.json").write_text(f"[{GOOD}]")
    assert len(opened(folder / "a,b.json")) == 1


def test_ids_that_stand_twice_are_the_same_picture(folder):
    """So it is said in the docs; it is no defect."""
    path = folder / "data.jsonl"
    path.write_text("\n".join(GOOD[:-1] + f', "id": {each}}}' for each in (1, 1, '"1"', 2)))
    ids = [opened(path)[index]["image_id"] for index in range(4)]
    assert ids[0] == ids[1] and len(set(ids)) == 3
