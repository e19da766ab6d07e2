"""Every kind of file that a source can be, and what is said about one that cannot be read."""

import io
import json
import pickle
import tarfile

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from jaxblip.data import rows, storage
from jaxblip.data.archives import expand_braces
from jaxblip.data.samples import BadSample
from jaxblip.data.sources import open_source
from jaxblip.errors import UserError


def png(colour=(200, 30, 30), size=(8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


RED, BLUE = png(), png((0, 0, 255))


def opened(spec, **options):
    """A source as a worker gets it."""
    return pickle.loads(pickle.dumps(open_source(str(spec), image_size_px=8, **options)))


def examples(source):
    return [source[index] for index in range(len(source))]


def captions(source):
    return [example["captions"] for example in examples(source)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/1.png").write_bytes(RED)
    (tmp_path / "pictures/2.png").write_bytes(BLUE)
    return tmp_path


@pytest.mark.parametrize(("ending", "separator"), [("csv", ","), ("tsv", "\t")])
def test_tables_of_text(folder, ending, separator):
    cells = [
        ["image", "caption", "id"],
        ["pictures/1.png", '"a cat, or two\nof them"', "x"],
        ["pictures/2.png", '"say ""犬"""', "y"],
        ["pictures/1.png", "again", "x"],
    ]
    path = folder / f"data.{ending}"
    lines = "\r\n".join(separator.join(row) for row in cells)
    path.write_text("\ufeff" + lines + "\r\n", encoding="utf-8")
    source = opened(path)
    assert captions(source) == [["a cat, or two\nof them"], ['say "犬"'], ["again"]]
    assert [example["image"] for example in examples(source)] == [RED, BLUE, RED]
    first, second, third = (example["image_id"] for example in examples(source))
    assert first == third != second
    path.write_text(lines + "\r\none cell\r\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"data\.{ending}:6: 1 cells under 3 column names"):
        open_source(str(path), image_size_px=8)


def test_a_table_of_parquet_with_images_inside(folder):
    table = pyarrow.table({
        "image": [{"bytes": RED, "path": None}, {"bytes": None, "path": "pictures/2.png"}] * 3,
        "captions": [["one"], ["two", "three"]] * 3,
        "id": [5, 6, 7, 8, 9, None],
    })  # fmt: skip
    for name, part in ("a", table.slice(0, 4)), ("b", table.slice(4)):
        pyarrow.parquet.write_table(part, folder / f"{name}.parquet", row_group_size=1)
    source = opened(folder / "*.parquet")
    assert captions(source) == [["one"], ["two", "three"]] * 3
    assert [example["image"] for example in examples(source)] == [RED, BLUE] * 3
    assert [example["image_id"] for example in examples(source)][:5] == [5, 6, 7, 8, 9]
    assert source._rows.place(4).endswith("b.parquet, row 0")
    (folder / "bad.parquet").write_bytes(b"PAR0 not at all")
    with pytest.raises(UserError, match=r"bad\.parquet is no Parquet file"):
        opened(folder / "bad.parquet")


def tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                content = b""
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_webdataset_shards(tmp_path):
    for shard in range(2):
        tar(
            tmp_path / f"set-{shard}.tar",
            [
                ("a/0001.PNG", RED), ("a/0001.txt", "a cät\n".encode()),
                ("0002.jpg", BLUE),
                ("0002.json", json.dumps({"caption": "blue", "id": shard}).encode()),
                ("readme", b"not a sample"), ("0003.png", None),
            ],
        )  # fmt: skip
    source = opened(tmp_path / "set-{0..1}.tar")
    assert captions(source) == [["a cät"], ["blue"]] * 2
    assert [example["image"] for example in examples(source)] == [RED, BLUE] * 2
    assert [source[1]["image_id"], source[3]["image_id"]] == [0, 1]


def test_names_in_archives_are_never_paths(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    tar(inside / "evil.tar", [("../../out.png", RED), ("../../out.txt", b"a"), ("/abs.png", BLUE),
                              ("/abs.txt", b"b")])  # fmt: skip
    source = opened(inside / "evil.tar")
    assert captions(source) == [["a"], ["b"]]
    assert [path.name for path in tmp_path.rglob("*")] == ["inside", "evil.tar"]


@pytest.mark.parametrize("end", [4600, 5000, 5120])  # in a header, in data, and there at a block
def test_a_shard_that_is_cut_off_gives_what_is_whole(tmp_path, end):
    whole = tmp_path / "a.tar"
    big = png(size=(300, 300)) + b"\0" * 4096
    tar(
        whole,
        [("1.png", RED), ("1.txt", b"one"), ("2.png", RED), ("2.txt", b"two"), ("3.png", big)],
    )
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:end])
    source = opened(tmp_path / "cut.tar")
    assert captions(source) == [["one"], ["two"]]
    assert "cut.tar is cut off or damaged behind sample 2: " in source._rows.problems[0]
    (tmp_path / "none.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match=r"none\.tar is no plain tar file"):
        opened(tmp_path / "none.tar")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("a-{9..11}.tar", ["a-9.tar", "a-10.tar", "a-11.tar"]),
        ("{x,y}-{0..1}.tar", ["x-0.tar", "x-1.tar", "y-0.tar", "y-1.tar"]),
    ],
)
def test_brace_patterns(pattern, names):
    assert expand_braces(pattern) == names


def test_folders_of_images(folder):
    (folder / "pictures/1.txt").write_text("a red one\n", encoding="utf-8")
    source = opened(folder / "pictures")
    assert [(e["image"], e["captions"]) for e in examples(source)] == [(RED, ["a red one"])]
    assert source.problems == [
        f"images without a .txt beside them, left out of {folder}/pictures: 1, such as 2.png"
    ]
    lines = [{"file_name": "2.png", "text": "blue"}, {"file_name": "1.png", "text": "red"}]
    (folder / "pictures/metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = opened(folder / "pictures")
    assert [(e["image"], e["captions"]) for e in examples(source)] == [
        (BLUE, ["blue"]),
        (RED, ["red"]),
    ]
    empty = folder / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"empty has no images with captions: put a text"):
        opened(empty)


COCO = {
    "images": [{"id": 9, "file_name": "1.png"}, {"id": 4, "file_name": "2.png"},
               {"id": 5, "file_name": "-"}],
    "annotations": [{"image_id": 4, "caption": "b"}, {"image_id": 9, "caption": "a"},
                    {"image_id": 4, "caption": "c"}],
}  # fmt: skip
KARPATHY = {"images": [
    {"filename": "1.png", "split": "train", "cocoid": 9, "sentences": [{"raw": "a"}]},
    {"filename": "2.png", "split": "restval", "cocoid": 4,
     "sentences": [{"raw": "b"}, {"raw": "c"}]},
    {"filename": "1.png", "split": "test", "cocoid": 7, "sentences": [{"raw": "d"}]},
]}  # fmt: skip
LLAVA = [{"id": "1", "image": "1.png", "conversations": [
    {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A square."},
    {"from": "human", "value": "Which colour?"}, {"from": "gpt", "value": "Red."},
]}]  # fmt: skip


def test_annotation_files(folder):
    def read(document, suffix=""):
        (folder / "file.json").write_text(json.dumps(document))
        source = opened(f"{folder}/file.json{suffix}", image_folder=str(folder / "pictures"))
        return [
            (
                e["image_id"] if e["image_id"] < 100 else None,
                e["image"],
                e.get("instruction"),
                *e["captions"],
            )
            for e in examples(source)
        ]

    assert read(COCO) == [(9, RED, None, "a"), (4, BLUE, None, "b", "c")]
    assert read(KARPATHY, ":train") == [(9, RED, None, "a"), (4, BLUE, None, "b", "c")]
    assert read(KARPATHY, ":test") == [(7, RED, None, "d")]
    assert read([{"image": "2.png", "caption": "b", "id": 4}]) == [(4, BLUE, None, "b")]
    assert read(LLAVA) == [
        (None, RED, "What is it?", "A square."),
        (None, RED, "What is it?\nA square.\nWhich colour?", "Red."),
    ]


def test_vqa_of_two_files(tmp_path):
    questions = {"data_subtype": "val2014", "questions": [
        {"image_id": 42, "question": "how many?", "question_id": 420}]}  # fmt: skip
    answers = [{"answer": "2", "answer_id": i} for i in range(9)] + [{"answer": "two"}]
    types = {"question_type": "how many", "answer_type": "number"}
    (tmp_path / "COCO_val2014_000000000042.jpg").write_bytes(RED)
    (tmp_path / "q.json").write_text(json.dumps(questions))
    (tmp_path / "a.json").write_text(
        json.dumps({"annotations": [{"question_id": 420, "answers": answers, **types}]})
    )
    source = opened(f"{tmp_path}/q.json,{tmp_path}/a.json")
    assert source.has_instructions and len(source) == 1
    assert source[0] == {
        "image": RED, "image_id": 42, "instruction": "how many?", "captions": ["2"] * 9 + ["two"],
        "question_id": 420, "question_type": "how many", "answer_type": "number",
    }  # fmt: skip
    with pytest.raises(UserError, match=r"q\.json has questions without answers"):
        opened(tmp_path / "q.json")


def test_what_gqa_and_nocaps_say_beside_the_texts(folder):
    asked = {"imageId": "1", "question": "Is it red?", "answer": "yes"}
    typed = {key: asked | {"types": {"structural": kind}} for key, kind in
             (("00", "verify"), ("01", "query"))}  # fmt: skip
    (folder / "file.json").write_text(json.dumps(typed))
    (folder / "pictures/1.jpg").write_bytes(RED)
    source = opened(folder / "file.json", image_folder=str(folder / "pictures"))
    assert [(e["question_id"], e["question_type"]) for e in examples(source)] == [
        ("00", "verify"), ("01", "query"),
    ]  # fmt: skip
    assert (source[0]["instruction"], source[0]["captions"]) == ("Is it red?", ["yes"])
    nocaps = COCO | {"images": [image | {"domain": "near-domain"} for image in COCO["images"]]}
    (folder / "file.json").write_text(json.dumps(nocaps))
    source = opened(folder / "file.json", image_folder=str(folder / "pictures"))
    assert {e["domain"] for e in examples(source)} == {"near-domain"}


@pytest.mark.parametrize(
    "document",
    [{"a": 1}, {"images": [{}], "annotations": [{"image": 1}]}, [[1]], [], {"images": 3}],
)
def test_a_json_of_another_shape(tmp_path, document):
    (tmp_path / "file.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"file\.json"):
        opened(tmp_path / "file.json")


def test_a_field_map_names_the_columns(folder):
    line = {"img": "pictures/1.png", "text": "a", "caption": "not this", "key": 3}
    (folder / "data.jsonl").write_text(json.dumps(line))
    fields = {"image": "img", "captions": "text", "image_id": "key", "question": ""}
    source = opened(folder / "data.jsonl", fields=fields)
    assert source[0] == {"image": RED, "captions": ["a"], "image_id": 3}
    with pytest.raises(
        UserError, match=r"data\.fields\.capton is no field .* did you mean captions"
    ):
        opened(folder / "data.jsonl", fields={"capton": "text"})
    with pytest.raises(
        UserError, match=r'no "label", the line has "img", "text", "caption", "key"'
    ):
        opened(folder / "data.jsonl", fields={"image": "img", "captions": "label"})


def test_images_in_the_rows_and_on_other_storage(folder):
    fsspec.filesystem("memory").pipe("memory://store/1.png", BLUE)
    url = "data:image/png;base64," + __import__("base64").b64encode(RED).decode()
    lines = [{"image": url, "caption": "a"}, {"image": "memory://store/1.png", "caption": "b"},
             {"image": "data:image/png;base64,###", "caption": "c"}]  # fmt: skip
    text = "\n".join(map(json.dumps, lines)).encode()
    fsspec.filesystem("memory").pipe("memory://store/data.jsonl", text)
    source = opened("memory://store/data.jsonl")
    assert [source[index]["image"] for index in range(2)] == [RED, BLUE]
    with pytest.raises(BadSample, match="missing image"):
        source[2]


def test_reading_is_tried_again(monkeypatch):
    monkeypatch.setattr(storage, "_PAUSES_S", (0, 0))
    tries = []

    def read():
        tries.append(1)
        if len(tries) < 3:
            raise TimeoutError("for a while")
        return b"done"

    assert storage.retry(read) == b"done"

    def gone():
        tries.append(1)
        raise FileNotFoundError

    tries.clear()
    with pytest.raises(FileNotFoundError):
        storage.retry(gone)
    assert len(tries) == 1


def test_a_row_that_goes_bad_is_a_bad_sample(folder):
    table = pyarrow.table({"image": ["pictures/1.png", None], "caption": ["a", "b"]})
    pyarrow.parquet.write_table(table, folder / "data.parquet")
    source = opened(folder / "data.parquet")
    with pytest.raises(BadSample, match=r'data\.parquet, row 1: no \\"image\\"|no "image"'):
        source[1]


def test_ids_are_shared_by_rows_of_a_picture():
    columns = rows.columns_of({})
    same = [{"image": "a.png"}, {"image": "a.png", "id": None}]
    assert len({rows.image_id(row, columns) for row in same}) == 1
    others = [
        {"image": "b.png"},
        {"image": "a.png", "id": "1"},
        {"image": "a.png", "id": 1},
        {"image": b"a"},
    ]
    ids = [rows.image_id(row, columns) for row in same + others]
    assert len(set(ids)) == 5 and all(0 <= each < 2**63 for each in ids)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nope.csv", r"cannot read .*nope\.csv \(No such file or directory\): check the path"),
        ("nope.parquet", r"cannot read .*nope\.parquet"),
        ("nope-{0..1}.tar", r"cannot read .*nope-0\.tar"),
        ("nope-{3..1}.tar", r"names nothing: the first number of \{3\.\.1\} is larger"),
        ("nope.json", r"cannot read .*nope\.json"),
        ("nope-*.jsonl", r"no file is called .*nope-\*\.jsonl"),
        ("unknown://nope.csv", r"cannot read unknown://nope\.csv \(Protocol not known"),
        ("unknown://*.csv", r"cannot list unknown://\*\.csv \(Protocol not known"),
        ("nope.txt", r"no data source is called 'nope\.txt'"),
    ],
)
def test_what_cannot_be_found(spec, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        open_source(spec, image_size_px=8)


def test_a_folder_of_images_that_is_not_there(folder):
    (folder / "data.csv").write_text("image,caption\n1.png,a\n")
    with pytest.raises(UserError, match="there is no folder 'no/such'"):
        opened(folder / "data.csv", image_folder="no/such")


def test_a_cell_that_never_ends(tmp_path):
    (tmp_path / "data.csv").write_text('image,caption\n1.png,"' + "x" * 200_000)
    with pytest.raises(UserError, match=r"data\.csv:\d+: no row of a table: field larger"):
        opened(tmp_path / "data.csv")


def test_a_question_without_an_annotation(tmp_path):
    asked = {"image_id": 1, "question": "why?", "question_id": 7}
    (tmp_path / "q.json").write_text(json.dumps({"data_subtype": "v", "questions": [asked]}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": []}))
    with pytest.raises(UserError, match="read as VQA v2, but .* question 7 has no annotation"):
        opened(f"{tmp_path}/q.json,{tmp_path}/a.json")
