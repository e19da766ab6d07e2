"""CSV, TSV and Parquet as other programs and accidents leave them."""

import io
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from hostile import PNG, bad_sample, inspected, opened
from jaxblip.errors import UserError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "1.png").write_bytes(PNG)
    return tmp_path


def captions(source):
    return [source[index]["captions"] for index in range(len(source))]


TEXTS = {
    "line breaks in cells": ('image,caption\n1.png,"a\nb\r\nc"\n', ["a\nb\r\nc"]),
    "quotes in cells": ('image,caption\n1.png,"a ""b"""\n1.png,a "b" c\n', ['a "b"', 'a "b" c']),
    "zero bytes": ("image,caption\n1.png,a\0b\n", ["a\0b"]),
    "line ends of an old Mac": ("image,caption\r1.png,a\r1.png,b\r", ["a", "b"]),
    "a byte order mark": ("\ufeffimage,caption\n1.png,a\n", ["a"]),
    "columns without names": ("image,caption,,\n1.png,a,,x\n", ["a"]),
    "blank lines": ("image,caption\n\n1.png,a\n\n\r\n1.png,b", ["a", "b"]),
    "other line ends in cells": ("image,caption\n1.png,a\u2028b\x0bc\x85\n", ["a\u2028b\x0bc\x85"]),
    "a long cell": (f"image,caption\n1.png,{'x' * 100_000}\n", ["x" * 100_000]),
}  # fmt: skip


@pytest.mark.parametrize("case", TEXTS)
def test_odd_tables_that_can_be_read(case, folder, capsys):
    text, expected = TEXTS[case]
    path = folder / "data.csv"
    path.write_bytes(text.encode())
    assert captions(opened(path)) == [[each] for each in expected]
    assert inspected(path, capsys)[0] == 0


BAD_TEXTS = {
    "too many cells": ("image,caption\n1.png,a,b\n", r"data\.csv:2: 3 cells under 2 column names"),
    "too few behind long ones": ('image,caption\n1.png,"a\nb"\n1.png\n', r"data\.csv:4: 1 cells"),
    "a huge cell": (f"image,caption\n1.png,{'x' * 200_000}\n", r"data\.csv:2: .* field larger"),
    # It would swallow the rows behind it.
    "a quote that is not closed": (
        'image,caption\n1.png,"a\n' + "1.png,b\n" * 20, r"data\.csv:\d+: no row of a table: unexp",
    ),
    "a quote that is closed too early": (
        'image,caption\n1.png,"a" b\n', r"data\.csv:2: no row of a table: .* quotes inside them",
    ),
    "a column twice": ("image,caption,caption\n1.png,a,b\n", "two columns called 'caption'"),
    "names alone": ("image,caption\n", "has no rows; it needs a line of column names"),
    "nothing": ("", "has no rows"),
    "other names": ("file\u202e\n1.png\n", r'no "caption" .* the line has "file\\u202e"'),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_tables_that_are_none(case, folder, capsys):
    text, message = BAD_TEXTS[case]
    path = folder / "data.csv"
    path.write_bytes(text.encode())
    with pytest.raises(UserError, match=message) as caught:
        opened(path)
    assert str(caught.value).isprintable()
    assert inspected(path, capsys)[0] == 2


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_tables_in_another_encoding(encoding, folder, capsys):
    path = folder / "data.tsv"
    path.write_text("image\tcaption\n1.png\tcafé\n", encoding=encoding)
    with pytest.raises(UserError, match=r"data\.tsv is not UTF-8: save it as UTF-8"):
        opened(path)
    assert inspected(path, capsys)[0] == 2


def test_a_table_that_changes_when_it_is_open_gives_no_garbage(folder):
    path = folder / "data.csv"
    path.write_text("image,caption\n1.png,aa\n1.png,bb\n1.png,cc\n")
    source = opened(path)
    path.write_text('image,caption\n1.png,"a\n1.png\n1.png,x\n1,')
    assert "data.csv:2: " in bad_sample(source, 0, "unreadable row")
    path.write_text("image,caption\n1.png aa\n")
    bad_sample(source, 0, "unreadable row")
    assert "data.csv:4: " in bad_sample(source, 2, "unreadable row")
    path.unlink()
    assert "No such file" in bad_sample(source, 1, "unreadable row")


def parquet(path, table, **options):
    pyarrow.parquet.write_table(pyarrow.table(table), path, **options)
    return path


def test_odd_columns_of_parquet(folder, capsys):
    table = {
        "image": [{"bytes": PNG, "path": "a/1.png"}] * 5 + [{"bytes": None, "path": None}],
        "captions": pyarrow.array(
            [["a", "b"], [], None, ["c", None], ["d"], ["e"]], pyarrow.large_list(pyarrow.string())
        ),
        # As pandas writes ids of which some are missing.
        "id": [1.0, 2.0, None, 3.0, 0.5, 4.0],
        "set": pyarrow.array(["x", "y"] * 3).dictionary_encode(),
        "when": pyarrow.array([1] * 6, pyarrow.timestamp("ns")),  # no Python value has that
        "boxes": [[{"x": 1.5}]] * 6,
        "attributes": pyarrow.array([[("a", 1)]] * 6, pyarrow.map_("string", pyarrow.int64())),
    }  # fmt: skip
    path = parquet(folder / "data.parquet", table, row_group_size=2)
    source = opened(path)
    assert source[0]["captions"] == ["a", "b"] and source[0]["image_id"] == 1
    assert source[1]["captions"] == [""]  # an empty caption, for the pipeline to count
    for index, message in [
        (2, 'no "caption"'), (3, '"captions" is ["c", null], not a list'),
        (4, '"id" is 0.5, not a whole number'), (5, '"image" is {"bytes": null'),
    ]:  # fmt: skip
        detail = bad_sample(source, index, "bad row")
        assert message in detail and f"data.parquet, row {index}: " in detail
    printed = inspected(path, capsys)[1]
    assert "bad row: 4, such as example 2" in printed and "empty caption: 1" in printed


def test_texts_of_a_dictionary_and_empty_row_groups(folder):
    schema = pyarrow.schema({
        "image": pyarrow.string(),
        "caption": pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
    })  # fmt: skip
    path = folder / "data.parquet"
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for texts in ([], ["a", "b"], [], ["c"], []):
            rows = [{"image": "1.png", "caption": text} for text in texts]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))
    source = opened(path)
    assert captions(source) == [["a"], ["b"], ["c"]]
    assert [source._rows.place(index)[-5:] for index in range(3)] == ["row 0", "row 1", "row 2"]


def test_texts_of_no_encoding_in_parquet(folder):
    """Parquet does not check that its texts are UTF-8."""
    texts = pyarrow.array([b"good", b"caf\xe9"])
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 2, texts.buffers())
    path = parquet(folder / "data.parquet", {"image": ["1.png"] * 2, "caption": texts})
    source = opened(path)
    assert source[0]["captions"] == ["good"]
    assert "data.parquet, row 1: 'utf-8' codec" in bad_sample(source, 1, "unreadable row")


def file_of_parquet(**options) -> bytes:
    buffer = io.BytesIO()
    rng = np.random.default_rng(0)
    table = {"image": ["1.png"] * 40, "caption": [str(rng.bytes(50)) for _ in range(40)]}
    pyarrow.parquet.write_table(
        pyarrow.table(table), buffer, row_group_size=20, use_dictionary=False, **options
    )
    return buffer.getvalue()


GOOD = file_of_parquet()
FILES = {
    "nothing": b"",
    "its mark alone": b"PAR1",
    "cut off": GOOD[:-100],
    "no middle": GOOD[:100] + GOOD[-100:],
    "a length of the footer": GOOD[:-8] + b"\xff\xff\xff\x7fPAR1",
    "a damaged footer": GOOD[:-400] + b"\xff" * 300 + GOOD[-100:],
    "a picture": PNG,
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_no_parquet(case, folder, capsys):
    path = folder / "data.parquet"
    path.write_bytes(FILES[case])
    with pytest.raises(UserError, match=r"data\.parquet is no Parquet file: ") as caught:
        opened(path)
    assert str(caught.value).isprintable()
    assert inspected(path, capsys)[0] == 2


@pytest.mark.parametrize("codec", ["none", "snappy", "zstd", "gzip"])
def test_a_damaged_row_group_is_bad_samples_at_once(codec, folder, capsys):
    """Nothing is tried again, for seconds each time, as where storage fails for a while."""
    path = folder / "data.parquet"
    good = bytearray(file_of_parquet(compression=codec))
    good[100:300] = b"\xee" * 200
    path.write_bytes(good)
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"data\.parquet, row 0: "):
        opened(path)
    assert time.monotonic() - begin < 5
    assert inspected(path, capsys)[0] == 2
    path.write_bytes(file_of_parquet(compression=codec))
    source = opened(path)
    path.write_bytes(good)
    assert "data.parquet, row 0: " in bad_sample(source, 0, "unreadable row")
    assert source[30]["captions"]  # of the other group


def test_columns_of_one_name_and_no_rows(folder):
    path = folder / "data.parquet"
    one = pyarrow.array(["1.png"])
    pyarrow.parquet.write_table(pyarrow.table([one, one], names=["image", "image"]), path)
    with pytest.raises(UserError, match=r"data\.parquet has two columns called 'image'"):
        opened(path)
    parquet(path, {"image": pyarrow.array([], pyarrow.string())})
    with pytest.raises(UserError, match=r"data\.parquet has no rows"):
        opened(path)


def test_parquet_that_vanishes_or_is_cut_when_it_is_open(folder):
    path = folder / "data.parquet"
    path.write_bytes(GOOD)
    source = opened(path)
    path.write_bytes(GOOD[:1000])
    bad_sample(source, 39, "unreadable row")
    path.unlink()
    assert "No such file" in bad_sample(source, 39, "unreadable row")
