"""`jaxblip data prepare`: what is kept, merged and dropped, and that the bytes are the same."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
from hashlib import sha256

import apache_beam as beam
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jaxblip.cli import main
from jaxblip.data.prepare import scan
from jaxblip.data.prepare.engine import Engine
from jaxblip.data.sources import open_source
from jaxblip.errors import UserError


def texture(seed, size=(96, 72)):
    """A picture unlike that of any other seed, smooth enough for JPEG."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def drawing(colour):
    image = Image.new("RGB", (96, 96), "white")
    image.paste(colour, (30, 30, 66, 66))
    return image


def encoded(image, form="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def write_pairs(folder, pairs):
    """A JSONL of (image bytes, fields of the line)."""
    folder.mkdir(exist_ok=True)
    lines = []
    for number, (image, fields) in enumerate(pairs):
        (folder / f"{number}.jpg").write_bytes(image)
        fields = fields if isinstance(fields, dict) else {"captions": fields}
        lines.append(json.dumps({"image": f"{number}.jpg", "id": number, **fields}) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines))
    return folder / "pairs.jsonl"


def prepare(source, to, *options):
    return main(["data", "prepare", str(source), f"--to={to}", "--workers=1", *options])


def read(folder, split="train"):
    builder = tfds.builder_from_directory(folder)
    return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})


def ids(folder, split="train"):
    return [example["id"] for example in read(folder, split)]


def dropped(folder, split="train"):
    report = json.loads((folder / "report.json").read_text())[split]
    return {reason: found["examples"] for reason, found in report["dropped"].items()}


def digests(folder):
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def bad_and_good(tmp_path_factory):
    """A source of which most is bad in some way, and the folder that was made of it."""
    folder = tmp_path_factory.mktemp("prepare")
    first, second = encoded(texture(1)), encoded(texture(2))
    pairs = [
        (first, ["one"]),
        (second, ["  two\t\x00 2 ", "\u200b", "x" * 3000, "two\u3000 2"]),
        (first, ["one", "one again"]),  # merged into 0
        (encoded(texture(1, (192, 144)), quality=80), ["one, larger"]),  # near 0
        (b"no picture", ["three"]),
        (encoded(texture(4))[:800], ["four"]),
        (b"", ["five"]),
        (encoded(texture(6)), ["", " \n "]),
        (encoded(texture(7)), ["x" * 3000]),
        (encoded(texture(8, (31, 64))), ["eight"]),
        (encoded(texture(9, (330, 32))), ["nine"]),
        (encoded(texture(10, (300, 300))), ["ten"]),
        (encoded(texture(11), "PNG"), ["café", "e\u0301", "نص عربي", "👩\u200d👧", "line\nbreak"]),
        (encoded(drawing("red"), "PNG"), ["a red square"]),
        (encoded(drawing("blue"), "PNG"), ["a blue square"]),
    ]
    source = write_pairs(folder / "source", pairs)
    assert prepare(source, folder / "made", "--max-pixels=80000") == 0
    return source, folder / "made"


def test_drops_by_reason_and_keeps_the_rest(bad_and_good):
    _, made = bad_and_good
    assert ids(made) == [0, 1, 12, 13, 14]
    assert dropped(made) == {
        "caption too long": 1, "corrupt image": 1, "empty caption": 1, "exact duplicate": 1,
        "gigantic image": 1, "narrow image": 1, "near duplicate": 1, "small image": 1,
        "truncated image": 1, "zero-size image": 1,
    }  # fmt: skip
    report = json.loads((made / "report.json").read_text())["train"]
    assert (report["read"], report["kept"], report["texts"]) == (15, 5, 11)
    assert report["dropped"]["small image"]["first"] == "example 9: 31 x 64 pixels"


def test_images_stay_as_they_are_and_texts_are_clean(bad_and_good):
    source, made = bad_and_good
    one, two, png, *_ = read(made)
    assert one["image"] == (source.parent / "0.jpg").read_bytes()
    assert png["image"] == (source.parent / "12.jpg").read_bytes()
    assert one["captions"] == [b"one", b"one again"]  # of the duplicate what is new
    assert two["captions"] == [b"two 2", b"two 2"]  # repeats of one example are weights
    texts = [text.decode() for text in png["captions"]]
    assert texts == ["café", "é", "نص عربي", "👩\u200d👧", "line break"]


def test_reads_back_as_a_source_with_no_field_map(bad_and_good):
    _, made = bad_and_good
    source = open_source(str(made), image_size_px=32)
    assert [source[index]["image_id"] for index in range(len(source))] == [0, 1, 12, 13, 14]
    assert source[0]["captions"] == ["one", "one again"]


def test_tensorflow_is_not_needed(bad_and_good):
    """Nor imported where it is installed."""
    _, made = bad_and_good
    code = (
        "import sys\n"
        "import tensorflow_datasets as tfds\n"
        "data = tfds.builder_from_directory(sys.argv[1]).as_data_source(\n"
        "    'train', decoders={'image': tfds.decode.SkipDecoding()})\n"
        "print([example['id'] for example in data], 'tensorflow' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code, made], capture_output=True, text=True)
    assert run.stdout.strip() == "[0, 1, 12, 13, 14] False", run.stderr


def test_a_second_run_does_nothing_and_another_one_is_refused(bad_and_good, capsys):
    source, made = bad_and_good
    before = digests(made)
    assert prepare(source, made, "--max-pixels=80000") == 0
    assert "has the split train already" in capsys.readouterr().out
    assert prepare(source, made, "--max-pixels=80000", "--resize=50") == 2
    assert "has split train of --resize=0, not 50" in capsys.readouterr().err
    assert prepare("shapes:heldout", made, "--max-pixels=80000") == 2
    assert f"has split train of {source}: name another folder" in capsys.readouterr().err
    assert digests(made) == before


@pytest.mark.parametrize("what", ["exact", "keep"])
def test_duplicates_can_stay(what, tmp_path, capsys):
    pairs = [
        (encoded(texture(1)), ["one"]),
        (encoded(texture(1)), ["two"]),
        (encoded(texture(1), quality=95), ["three"]),
    ]
    source = write_pairs(tmp_path / "source", pairs)
    assert prepare(source, tmp_path / "made", f"--duplicates={what}") == 0
    assert "Steps: min-side 32, max-aspect 10.0, " in (said := capsys.readouterr().out)
    assert f"duplicates {what}, " in said
    assert ids(tmp_path / "made") == {"exact": [0, 2], "keep": [0, 1, 2]}[what]


def test_questions_about_one_picture_are_no_duplicates(tmp_path):
    image, larger = encoded(texture(1)), encoded(texture(1, (192, 144)))
    cat, dog = {"question": "A  cat?", "answers": ["yes", "yes"]}, {"question": "A dog?"}
    pairs = [
        (image, cat),
        (image, dog | {"answers": ["no"]}),
        (image, {"question": "A cat?", "answers": ["yes", "sure"]}),
        (larger, dog | {"answers": ["no"]}),
        (larger, {"question": " ", "answers": ["no"]}),
    ]
    source = write_pairs(tmp_path / "source", pairs)
    assert prepare(source, tmp_path / "made", "--block=2") == 0
    data = read(tmp_path / "made")
    assert [example["question"] for example in data] == [b"A cat?", b"A dog?"]
    assert [example["answers"] for example in data] == [[b"yes", b"yes", b"sure"], [b"no"]]
    assert dropped(tmp_path / "made") == {
        "empty instruction": 1, "exact duplicate": 1, "near duplicate": 1,
    }  # fmt: skip


def test_instructions_keep_their_lines(tmp_path):
    fields = {"instruction": "Write\r\n\tcode. ", "output": "def f():\x07\n    pass  \n"}
    source = write_pairs(tmp_path / "source", [(encoded(texture(1)), fields)])
    assert prepare(source, tmp_path / "made") == 0
    [example] = read(tmp_path / "made")
    assert example["instruction"] == b"Write\n\tcode."
    assert example["outputs"] == [b"def f():\n    pass"]


def test_the_perceptual_hash_alone_would_take_drawings_for_each_other():
    """So the two squares above are there for a reason."""
    (one, thumbnail), (other, second) = (scan.looks(drawing(name)) for name in ("red", "blue"))
    assert (one ^ other).bit_count() <= 4
    assert np.abs(thumbnail.astype(int) - second).max() > 100


def test_resizes_larger_images_only_and_upright(tmp_path):
    """And writes to a URL of storage."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pairs = [
        (encoded(texture(1, (200, 100))), ["wide"]),
        (encoded(texture(2, (60, 40))), ["small"]),
        (encoded(texture(3, (200, 100)), exif=exif), ["turned"]),
    ]
    source = write_pairs(tmp_path / "source", pairs)
    assert prepare(source, f"file://{tmp_path}/made", "--resize=50", "--jpeg-quality=80") == 0
    wide, small, turned = (example["image"] for example in read(tmp_path / "made"))
    assert small == pairs[1][0]
    for image, size in ((wide, (100, 50)), (turned, (50, 100))):
        with Image.open(io.BytesIO(image)) as opened:
            assert (opened.format, opened.size) == ("JPEG", size)
    before = np.asarray(texture(1, (200, 100)).resize((100, 50)), float)
    assert np.abs(np.asarray(Image.open(io.BytesIO(wide))) - before).mean() < 6


def test_several_splits_and_a_procedural_source(tmp_path, capsys):
    source = write_pairs(tmp_path / "source", [(encoded(texture(1)), ["one"])])
    assert prepare("shapes:heldout", tmp_path / "made", "--duplicates=exact") == 0
    assert prepare(source, tmp_path / "made", "--split=validation") == 0
    assert len(read(tmp_path / "made")) == 500 and ids(tmp_path / "made", "validation") == [0]
    report = json.loads((tmp_path / "made/report.json").read_text())
    assert list(report) == ["train", "validation"]
    asked = write_pairs(
        tmp_path / "asked", [(encoded(texture(1)), {"question": "What?", "answer": "it"})]
    )
    assert prepare(asked, tmp_path / "made", "--split=test") == 2
    assert "split train with captions, and the source has question and answers" in (
        capsys.readouterr().err
    )
    assert len(read(tmp_path / "made")) == 500


def many_pairs(folder, count=40):
    pairs = []
    for number in range(count):
        copied = number - 7 if number % 10 == 9 else number
        size = (192, 144) if number % 10 == 8 else (96, 72)
        near = number - 5 if number % 10 == 8 else copied
        pairs.append((encoded(texture(near, size), quality=95), [f"picture {number}"]))
    return write_pairs(folder, pairs)


SMALL = ("--block=4", "--shard-mb=0.02")


def test_the_same_bytes_for_any_number_of_workers(tmp_path):
    source = many_pairs(tmp_path / "source")
    assert prepare(source, tmp_path / "one", *SMALL) == 0
    command = [sys.executable, "-m", "jaxblip.cli", "data", "prepare", str(source)]
    subprocess.run([*command, f"--to={tmp_path}/two", "--workers=2", *SMALL], check=True)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert len(digests(tmp_path / "one")) > 5  # several shards
    expected = [number for number in range(40) if number % 10 < 8]
    assert ids(tmp_path / "one") == expected
    assert dropped(tmp_path / "one") == {"exact duplicate": 4, "near duplicate": 4}
    texts = {example["id"]: example["captions"] for example in read(tmp_path / "one")}
    assert texts[2] == [b"picture 2", b"picture 9"] and texts[3] == [b"picture 3"]


def test_killed_and_started_again(tmp_path):
    """At several moments; what was finished is not done again, and the bytes are the same."""
    source = many_pairs(tmp_path / "source")
    assert prepare(source, tmp_path / "whole", *SMALL) == 0
    made = tmp_path / "made"
    work = made / ".prepare-train"
    # It waits where files of this name appear, and is killed there.
    code = (
        "import sys, time\n"
        "from jaxblip.cli import main\n"
        "from jaxblip.data.prepare import folder\n"
        "write, stop, count = folder.os.replace, sys.argv[1], int(sys.argv[2])\n"
        "def replace(path, to):\n"
        "    global count\n"
        "    count -= stop in to\n"
        "    if count < 0: print('stopped', flush=True); time.sleep(60)\n"
        "    write(path, to)\n"
        "folder.os.replace = replace\n"
        "sys.exit(main(sys.argv[3:]))"
    )
    command = ["data", "prepare", str(source), f"--to={made}", "--workers=1", *SMALL]
    seen = {}
    for stop, count in (("scan/", 11), ("plan/", 3), ("array_record", 2), ("dataset_info", 0)):
        process = subprocess.Popen(
            [sys.executable, "-c", code, stop, str(count), *command],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert any("stopped" in line for line in process.stdout)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with pytest.raises(Exception, match="dataset_info"):
            tfds.builder_from_directory(made)
        finished = [*(work / "scan").glob("*.jsonl"), *made.glob("*array_record-*-of-?????")]
        finished = {path: path.stat().st_mtime_ns for path in finished}
        assert len(finished) > len(seen) - 1 and seen.items() <= finished.items()
        seen = finished
    assert prepare(source, made, *SMALL) == 0
    assert digests(made) == digests(tmp_path / "whole")
    shards = {path: when for path, when in seen.items() if path.parent == made}
    assert shards and all(path.stat().st_mtime_ns == when for path, when in shards.items())


def test_a_full_disk_and_a_source_that_changed_meanwhile(tmp_path, capsys, monkeypatch):
    source = many_pairs(tmp_path / "source", 10)

    def full(*_):  # as ArrayRecordWriter says it
        raise RuntimeError("write() failed: No space left on device; writing x; at byte 9")

    with monkeypatch.context() as patch:
        patch.setattr("jaxblip.data.prepare.shards.ArrayRecordWriter", full)
        assert prepare(source, tmp_path / "made") == 2
    assert "no space is left for " in capsys.readouterr().err
    (tmp_path / "source/3.jpg").write_bytes(encoded(texture(99)))
    assert prepare(source, tmp_path / "made") == 2
    assert "example 3 of " in (said := capsys.readouterr().err) and "has changed since" in said
    (tmp_path / "source/pairs.jsonl").write_text(source.read_text().splitlines()[0])
    assert prepare(source, tmp_path / "made") == 2
    assert f"has an unfinished split train of {source} as it was then" in capsys.readouterr().err


def missing_package(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "imagehash", None)


def foreign_files(monkeypatch, folder):
    (folder / "made").mkdir()
    (folder / "made/thesis.txt").write_text("")


def a_file(monkeypatch, folder):
    (folder / "made").write_text("")


def all_bad(monkeypatch, folder):
    for path in folder.glob("source/*.jpg"):
        path.write_bytes(b"broken")


CASES = {
    "package": (missing_package, [], "needs the package imagehash: pip install 'jaxblip[prepare]'"),
    "folder": (foreign_files, [], "made has other files in it: name an empty folder with --to."),
    "no folder": (a_file, [], "made is a file: name a folder with --to."),
    "nothing left": (all_bad, [], "nothing is left of 2 examples: corrupt image 2."),
    "side": (None, ["--min-side=0"], "--min-side=0 must be 1 or more."),
    "aspect": (None, ["--max-aspect=nan"], "--max-aspect=nan must be 1 or more."),
    "chars": (None, ["--min-chars=9", "--max-chars=8"], "--max-chars=8 must be 9 or more."),
    "bits": (None, ["--near-bits=20"], "--near-bits=20 must be 8 or less"),
    "quality": (None, ["--jpeg-quality=101"], "--jpeg-quality=101 must lie between 1 and 100."),
    "shards": (None, ["--shard-mb=0"], "--shard-mb=0.0 must be above 0."),
    "split": (None, ["--split=a/b"], "--split=a/b must be a name such as train"),
    "workers": (None, ["--workers=0"], "--workers=0 must be 1 or more."),
    "field": (None, ["--field=image"], "--field=image names no column"),
    "runner": (None, ["--runner=FlinkRunnr"], "Unexpected pipeline runner: FlinkRunnr."),
    "Beam": (None, ["--", "--flink_mastr=x"], "Beam has no option --flink_mastr"),
    "Beam's value": (None, ["--direct_num_workers=x"], "Beam refuses its options: "),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_sentence(case, tmp_path, capsys, monkeypatch):
    change, options, message = CASES[case]
    pairs = [(encoded(texture(number)), ["a caption"]) for number in range(2)]
    source = write_pairs(tmp_path / "source", pairs)
    if change:
        change(monkeypatch, tmp_path)
    assert prepare(source, tmp_path / "made", *options) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


def test_a_misspelt_option_gets_its_neighbour(tmp_path, capsys):
    with pytest.raises(SystemExit):
        prepare("shapes:train", tmp_path, "--rezise=3")
    assert "there is no option --rezise: did you mean --resize?" in capsys.readouterr().err


def test_an_empty_source(tmp_path, capsys):
    (tmp_path / "pairs.jsonl").write_text("")
    assert prepare(tmp_path / "pairs.jsonl", tmp_path / "made") == 2
    said = capsys.readouterr().err
    assert "pairs.jsonl is empty" in said and "while running" not in said
    source = write_pairs(tmp_path / "source", [(encoded(texture(1)), ["one"])])
    assert prepare(source, tmp_path / "made") == 0  # nothing is left of the first attempt


def test_a_worker_that_dies_is_an_error_and_no_hang(monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # is restored

    def build(pipeline):
        pipeline | beam.Create([9, 9]) | beam.Reshuffle() | beam.Map(lambda code: os._exit(code))

    with pytest.raises(UserError, match="a worker process died"):
        Engine(workers=2).run(build, doing="dying", tasks=2)


def test_another_engine_through_its_option(tmp_path):
    """Beam's own job service, over the interface that Flink and Spark are spoken to."""
    source = many_pairs(tmp_path / "source", 20)
    assert prepare(source, tmp_path / "one", *SMALL) == 0
    options = ["--runner=PortableRunner", "--job_endpoint=embed", "--environment_type=LOOPBACK"]
    assert prepare(source, tmp_path / "made", *SMALL, *options) == 0
    assert digests(tmp_path / "made") == digests(tmp_path / "one")
