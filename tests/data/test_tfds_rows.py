"""Data sets of TFDS in array_record: what a row has, and what is said of damage."""

import gc
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
import toy_tfds
from array_record.python import array_record_module
from toy_tfds import COCO_CAPTIONS, coco_example, png

from jaxblip.data import storage
from jaxblip.data.rows import columns_of
from jaxblip.data.samples import BadSample
from jaxblip.data.sources import open_source
from jaxblip.data.tfds_rows import TfdsRows, data_set_folder, divide
from jaxblip.errors import UserError

COCO_FIELDS = {"captions": "captions.text", "image_id": "image/id"}
SIZES = {"train": 20, "val": 4}
SHARDS = 4


def opened(spec, **options):
    """A source as a worker gets it."""
    return pickle.loads(pickle.dumps(open_source(str(spec), image_size_px=8, **options)))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensorflow_datasets")
    examples = {split: [coco_example(i) for i in range(size)] for split, size in SIZES.items()}
    toy_tfds.write(
        folder, COCO_CAPTIONS, examples, name="coco_captions", config="2014", shards=SHARDS
    )
    return folder


@pytest.fixture
def coco(data_dir, tmp_path):
    """The folder of a copy, to be damaged."""
    return Path(shutil.copytree(data_dir, tmp_path / "data")) / "coco_captions/2014/1.0.0"


def shards(folder, split="train"):
    return sorted(folder.glob(f"*-{split}.array_record-*"))


def test_coco_captions_by_name(data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    source = opened("tfds:coco_captions/2014:train", fields=COCO_FIELDS)
    assert len(source) == SIZES["train"]
    for number, example in enumerate(source[index] for index in range(len(source))):
        assert example == {
            "image": png(number),
            "captions": [f"eine Katzé {number} {i}" for i in range(1 + number % 3)],
            "image_id": 1000 + number,
        }
    assert opened("tfds:coco_captions:val", fields=COCO_FIELDS)[0]["image"] == png(0)
    same = opened("tfds:coco_captions/2014:1.0.0:val", fields=COCO_FIELDS)
    assert len(same) == SIZES["val"]


def test_parts_of_splits(data_dir):
    def ids(split):
        source = opened(f"{data_dir}/coco_captions:{split}", fields=COCO_FIELDS)
        return [source[index]["image_id"] - 1000 for index in range(len(source))]

    assert ids("train[:50%]") == list(range(10))
    assert ids("train[3:12]") == list(range(3, 12))
    assert ids("train[-7:]") == list(range(13, 20))
    assert ids("val[1:]+train[18:]") == [1, 2, 3, 18, 19]


def test_rows_have_dotted_columns_and_nothing_is_decoded_but_text(data_dir):
    rows = TfdsRows(data_set_folder(str(data_dir)), "", columns_of(COCO_FIELDS))
    row = rows[1]
    assert row["image"] == png(1)
    assert row["image/filename"] == "COCO_1.jpg"
    assert row["captions.id"] == [0, 1]
    assert row["objects.label"] == [3] and row["objects.is_crowd"] == [False]
    assert np.allclose(row["objects.bbox"], [[0.1, 0.1, 0.5, 0.6]])
    assert rows[0]["objects.label"] == []
    assert type(row["image/id"]) is int


def test_images_of_bytes_paths_and_questions(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(png(7))
    text, bytes_of = tfds.features.Text(), tfds.features.Tensor(shape=(), dtype=np.object_)
    features = {
        "image": bytes_of, "path": text, "question": text, "answers": tfds.features.Sequence(text),
        "id": np.int64, "mask": tfds.features.Image(),
    }  # fmt: skip
    example = {
        "image": png(5) + b"\0\0", "path": "a.png", "question": "wo?", "answers": ["da", ""],
        "id": 3, "mask": io.BytesIO(png(4)),
    }  # fmt: skip
    folder = toy_tfds.write(tmp_path, features, {"every": [example]})
    assert TfdsRows(folder, "", columns_of({}))[0]["mask"] == png(4)
    wanted = {"instruction": "wo?", "captions": ["da", ""], "image_id": 3}
    source = opened(folder)
    assert source.has_instructions and source[0] == {**wanted, "image": png(5) + b"\0\0"}
    images = str(tmp_path / "pictures")
    source = opened(folder, fields={"image": "path"}, image_folder=images)
    assert source[0] == {**wanted, "image": png(7)}


def test_a_list_without_captions_is_a_row(tmp_path):
    features = {"image": tfds.features.Image(), "captions": tfds.features.Sequence(np.str_)}
    examples = [{"image": io.BytesIO(png(1)), "captions": []}]
    source = opened(toy_tfds.write(tmp_path, features, {"train": examples}))
    assert source[0]["captions"] == [""]  # an empty caption, which preprocessing counts


@pytest.mark.parametrize(
    ("spec", "name", "split"),
    [
        ("mnist", "mnist", ""),
        ("coco_captions/2014:train[:50%]", "coco_captions/2014", "train[:50%]"),
        ("a:1.0.0:train[:5]+val[1:]", "a:1.0.0", "train[:5]+val[1:]"),
        ("folder[0]", "folder[0]", ""),
    ],
)
def test_name_and_split(spec, name, split):
    assert divide(spec) == (name, split)


def test_the_folder_of_a_data_set(tmp_path):
    def make(name):
        (tmp_path / name).mkdir(parents=True)
        for file in ("dataset_info.json", "features.json"):
            (tmp_path / name / file).touch()

    def found(name="."):
        folder = data_set_folder(str(tmp_path / name))
        return folder and os.path.relpath(folder, tmp_path)

    assert found() is None and found("none") is None
    make("a/x/incomplete.3_1.0.0")
    assert found() is None
    make("a/x/1.9.0")
    assert found() == found("a") == found("a/x") == found("a/x/1.9.0") == "a/x/1.9.0"
    make("a/x/1.10.0")
    assert found("a") == "a/x/1.10.0"
    make("a/y/1.0.0")
    with pytest.raises(UserError, match=r"several data sets: name one of x/1\.10\.0, x/1\.9\.0, y"):
        found("a")
    make("b/one")
    make("b/two")
    with pytest.raises(UserError, match="several data sets: name one of one, two"):
        found("b")


CHILD = """
import pickle, sys
source = pickle.load(sys.stdin.buffer)
assert source[1]["captions"][0].startswith("eine Katz"), source[1]
assert "tensorflow" not in sys.modules
print(sorted(name for name in ("tensorflow", "torch") if name in sys.modules))
"""


def test_workers_read_without_tensorflow_even_where_it_is_installed(data_dir, tmp_path):
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow/__init__.py").write_text("raise SystemExit('imported')")
    source = pickle.dumps(open_source(str(data_dir), image_size_px=8, fields=COCO_FIELDS))
    assert len(source) < 10_000
    child = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=source,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert child.stdout.decode() == "[]\n", child.stderr.decode()


def test_nothing_is_imported_before_it_is_needed():
    code = "import sys, jaxblip.data.sources; print('tensorflow_datasets' in sys.modules)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert child.stdout == b"False\n"


def test_a_data_set_that_is_not_there(data_dir, tmp_path, monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    wanted = rf"tfds:nope/x is not in {tmp_path}/tensorflow_datasets, which TFDS_DATA_DIR sets"
    with pytest.raises(UserError, match=wanted) as error:
        opened("tfds:nope/x:train")
    assert '.builder("nope/x", file_format="array_record")' in str(error.value)
    assert "tfds build nope/x --file_format=array_record" in str(error.value)
    for spec in ("tfds:", "tfds::train"):
        with pytest.raises(UserError, match="is not in"):
            opened(spec)


def test_splits_and_columns_that_are_not_there(data_dir):
    for split in ("test", "train[", "train[:200%]", "train[:50%", "train[::2]"):
        message = rf"has no split '{re.escape(split)}'; its splits are train, val, and parts"
        with pytest.raises(UserError, match=message):
            opened(f"{data_dir}:{split}", fields=COCO_FIELDS)
    for split in ("train[5:2]", "train[3:1]", "val[:0]"):
        with pytest.raises(UserError, match="has no examples in"):
            opened(f"{data_dir}:{split}", fields=COCO_FIELDS)
    for field, column, hint in [
        ("captions", "captions.txt", r"did you mean captions\.text\?"),
        ("image_id", "picture", r"it has captions\.id, captions\.text, image, image/"),
    ]:
        message = rf"has no column {column} \(data\.fields\.{field}\): {hint}"
        with pytest.raises(UserError, match=message):
            opened(data_dir, fields={**COCO_FIELDS, field: column})
    with pytest.raises(UserError, match="the columns captions.id, .*: say in data.fields which"):
        opened(data_dir)


def test_a_split_must_be_named_where_none_is_called_train(tmp_path):
    examples = {"a": [coco_example(0)], "b": [coco_example(0)]}
    folder = toy_tfds.write(tmp_path, COCO_CAPTIONS, examples)
    with pytest.raises(UserError, match="no split 'train'; its splits are a, b"):
        opened(folder, fields=COCO_FIELDS)


def test_another_format(tmp_path):
    folder = toy_tfds.write(tmp_path, COCO_CAPTIONS, {"train": [coco_example(0)]})
    info = Path(folder) / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="in the format tfrecord, which has no random access") as e:
        opened(folder, fields=COCO_FIELDS)
    assert '.builder("toy", file_format="array_record")' in str(e.value)
    info.write_text(
        info.read_text().replace(
            '"fileFormat"', '"alternativeFileFormats": ["array_record"],\n"fileFormat"'
        )
    )
    assert len(opened(folder, fields=COCO_FIELDS)) == 1


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"pythonClassName": "os.system"}'])
def test_files_that_tfds_did_not_write(coco, file, text):
    (coco / file).write_text(text)
    with pytest.raises(UserError):
        opened(coco, fields=COCO_FIELDS)


def test_without_the_package(data_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match="is a data set of TFDS: pip install tensorflow-datasets"):
        opened(data_dir, fields=COCO_FIELDS)


def outcomes(source):
    """Of each example its id, or why there is none; no other exception may come."""
    found = []
    for index in range(len(source)):
        try:
            found.append(source[index]["image_id"] - 1000)
        except BadSample as bad:
            assert "array_record-0" in bad.detail, bad.detail
            found.append(bad.reason)
    return found


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


CUT = ", which is damaged or cut off"


@pytest.mark.parametrize(
    ("damage", "problem", "reason"),
    [
        (cut, CUT, "truncated shard"),
        (lambda path: os.truncate(path, 0), CUT, "truncated shard"),
        (lambda path: os.truncate(path, 65536), CUT, "truncated shard"),
        (lambda path: path.write_bytes(b"x" * 100_000), CUT, "truncated shard"),
        (os.remove, " (No such file or directory)", "unreadable row"),
    ],
)
def test_a_damaged_shard_is_noted_when_it_is_opened(coco, damage, problem, reason):
    path = shards(coco)[2]
    damage(path)
    source = opened(coco, fields=COCO_FIELDS)
    assert source.problems == [f"1 of 4 shards are bad, such as {path}{problem}"]
    numbers = list(range(SIZES["train"]))
    assert outcomes(source) == numbers[:10] + [reason] * 5 + numbers[15:]
    for path in shards(coco):
        if path.exists():
            damage(path)
    with pytest.raises(UserError, match="prepare the data set again"):
        opened(coco, fields=COCO_FIELDS)


def test_a_first_shard_that_is_damaged(coco):
    cut(shards(coco)[0])
    found = outcomes(opened(coco, fields=COCO_FIELDS))
    assert found == ["truncated shard"] * 5 + list(range(5, 20))


def test_a_shard_of_another_data_set(coco):
    shutil.copy(shards(coco, "val")[1], shards(coco)[2])
    [problem] = opened(coco, fields=COCO_FIELDS).problems
    assert problem.endswith("00002-of-00004 of 1 records, not 5")


def test_a_shard_that_is_lost_or_cut_while_it_is_read(coco):
    source = opened(coco, fields=COCO_FIELDS)
    fresh = pickle.dumps(source)
    assert source[10]["image_id"] == 1010
    os.truncate(shards(coco)[2], 0)
    shards(coco)[3].unlink()
    numbers = list(range(SIZES["train"]))
    lost = ["truncated shard"] * 5 + ["unreadable row"] * 5
    assert outcomes(source) == numbers[:10] + lost
    assert outcomes(pickle.loads(fresh)) == numbers[:10] + lost


def test_flipped_bytes_never_end_the_reading(coco):
    source = opened(coco, fields=COCO_FIELDS)
    path, rng = shards(coco)[1], np.random.default_rng(0)
    whole = path.read_bytes()
    numbers = list(range(SIZES["train"]))
    bad = 0
    for place in [*rng.integers(0, len(whole), 100).tolist(), *range(0, len(whole), 65_536)]:
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        found = outcomes(pickle.loads(pickle.dumps(source)))
        assert found[:5] + found[10:] == numbers[:5] + numbers[10:]
        for number, outcome in zip(numbers[5:10], found[5:10]):
            assert outcome in (number, "unreadable row", "truncated shard")
            bad += outcome != number
    assert bad


def test_a_record_that_is_no_example(coco):
    writer = array_record_module.ArrayRecordWriter(str(shards(coco)[2]), "group_size:1")
    for record in (b"not a proto", b"", b"\x0a\x00", b"\xff" * 1000, b"\0"):
        writer.write(record)
    writer.close()
    source = opened(coco, fields=COCO_FIELDS)
    assert source.problems == []
    found = outcomes(source)
    assert found[:10] + found[15:] == [*range(10), *range(15, 20)]
    assert set(found[10:15]) == {"unreadable row", "truncated shard", "bad row"}


def test_storage_that_fails_for_a_while(coco, monkeypatch):
    monkeypatch.setattr(storage, "_PAUSES_S", (0, 0))
    source = opened(coco, fields=COCO_FIELDS)
    failing = []

    class Reader:
        def __init__(self, *args, **options):
            self._reader = real(*args, **options)
            self.ok = self._reader.ok
            self._failed = False

        def read(self, positions):
            if failing or self._failed:  # for good: another one must be opened
                self._failed = True
                failing.pop()
                raise RuntimeError("pread() failed: Input/output error; reading x")
            return self._reader.read(positions)

    real = array_record_module.ArrayRecordReader
    monkeypatch.setattr(array_record_module, "ArrayRecordReader", Reader)
    failing += [1, 1]
    assert source[3]["image_id"] == 1003 and not failing
    failing += [1, 1, 1]
    with pytest.raises(BadSample, match="unreadable row.*Input/output error"):
        source[3]
    assert source[3]["image_id"] == 1003


def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxblip.data.array_records._OPEN_SHARDS", 2)
    examples = {"train": [coco_example(i) for i in range(12)]}
    folder = toy_tfds.write(tmp_path, COCO_CAPTIONS, examples, shards=6)
    source = opened(folder, fields=COCO_FIELDS)
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(12), 3))
    assert [source[index]["image_id"] - 1000 for index in order] == order.tolist()
    gc.collect()
    held = [os.readlink(each) for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
    assert sum(name.startswith(folder) for name in held) <= 2
