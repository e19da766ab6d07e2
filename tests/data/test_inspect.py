"""`jaxblip data inspect`: what it says of good and of bad data."""

import json

import pytest
from PIL import Image

from jaxblip.cli import main
from jaxblip.data.inspect import inspect_source
from jaxblip.data.samples import BadSample


def picture(path, size, mode="RGB"):
    Image.new(mode, size).save(path)


@pytest.fixture
def folder(tmp_path):
    picture(tmp_path / "1.png", (40, 20))
    picture(tmp_path / "2.png", (10, 20), "L")
    (tmp_path / "3.png").write_bytes(b"broken")
    lines = [
        {"image": "1.png", "captions": ["a cat", "a cat on a mat"]},
        {"image": "2.png", "captions": ["a dog"]},
        {"image": "3.png", "captions": ["seen by nobody"]},
        {"image": "1.png", "captions": [" ! "]},
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def test_counts_lengths_sizes_and_problems(folder, capsys):
    sheet = folder / "sheet.png"
    assert main(["data", "inspect", str(folder / "pairs.jsonl"), f"--sheet={sheet}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4 examples of 3 images, 5 texts (1.2 an example, 5 different)"
    assert "  0: 40x20 PNG RGB; 'a cat', 'a cat on a mat'" in lines
    assert "texts, words:        least 1, 5 % 1, median 2, 95 % 5, most 5" in lines
    assert "  width, pixels:  least 10, 5 % 13, median 40, 95 % 40, most 40" in lines
    assert "  converted grayscale 1" in lines
    problems = lines[lines.index("problems:") + 1 :]
    pairs = folder / "pairs.jsonl"
    assert problems[0] == f"  empty caption: 1, such as example 3 ('1.png' in {pairs}:4)"
    assert problems[1].startswith(
        f"  corrupt image: 1, such as example 2 ('3.png' in {pairs}:3): its bytes are of no known"
    )
    with Image.open(sheet) as image:
        assert image.size == (8 * 160, 204)


def test_a_table_with_other_names(folder, capsys):
    (folder / "table.csv").write_text('file,title\n1.png,"one, two"\n2.png,three\n')
    verb = ["data", "inspect", str(folder / "table.csv"), "--images=1"]
    assert main(verb) == 2
    printed = capsys.readouterr().err
    assert ':2: no "caption" (or "captions"), the line has "file", "title"' in printed
    assert main([*verb, "--field=image=file", "--field=captions=title"]) == 0
    printed = capsys.readouterr().out
    assert "2 examples of 2 images" in printed and "problems: none" in printed
    assert "images read: 1 of 2 examples" in printed


def test_the_sets_of_the_package(capsys):
    assert main(["data", "inspect", "shapes:heldout", "--images=3"]) == 0
    assert "500 examples of 500 images, 2,000 texts (4 an example" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--images=-1", "-1 images cannot be read"),
        ("--field=image", "--field=image names no column: write --field=image=file"),
        ("--field=imge=file", "data.fields.imge is no field of an example, did you mean image?"),
        ("--sheet=no/such/sheet.png", "there is no folder for no/such/sheet.png"),
    ],
)
def test_options_that_cannot_be(option, message, folder, capsys):
    assert main(["data", "inspect", str(folder / "pairs.jsonl"), option]) == 2
    assert message in capsys.readouterr().err


def test_each_line_is_one_line_wherever_a_source_has_its_names_from():
    class Odd:
        def __len__(self):
            return 1

        def __getitem__(self, index):
            raise BadSample("missing image", "gone")

        def place(self, index):
            return "new\nline \u202eltr"

    lines = inspect_source(Odd())
    assert lines[-1] == r"  missing image: 1, such as example 0 (new\nline \u202eltr): gone"
