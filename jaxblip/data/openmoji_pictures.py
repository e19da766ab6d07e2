"""What the drawings of OpenMoji show: their skin tones and genders, captions from their Unicode
names, and a held-out part of new combinations. `openmoji.py` reads and writes the files."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

HELDOUT_SHARE = 0.15  # of the tone and gender variants
_SAME_DRAWING = 4  # of 255: differences up to here are rounding of the renderer, not of the drawing

# --- what a code point sequence shows -------------------------------------------------------------

_TONES = {
    0x1F3FB: "light",
    0x1F3FC: "medium-light",
    0x1F3FD: "medium",
    0x1F3FE: "medium-dark",
    0x1F3FF: "dark",
}
_MAN, _WOMAN, _PERSON = 0x1F468, 0x1F469, 0x1F9D1
_ADULTS = {_MAN: "man", _WOMAN: "woman", _PERSON: "person"}
_SIGNS = {0x2640: _WOMAN, 0x2642: _MAN}
_JOINER, _VARIATION_SELECTOR = 0x200D, 0xFE0F


def _pair(first: int, *middle: int, second: int) -> tuple[int, ...]:
    return (first, _JOINER, *(c for code in middle for c in (code, _JOINER)), second)


# Older single code points for pairs that Unicode spells out since each half can have its own tone.
# Without this table the same two people would count as two bases, and one could be in train while
# the other is held out.
_SPELLED_OUT = {
    0x1F46B: _pair(_WOMAN, 0x1F91D, second=_MAN),
    0x1F46C: _pair(_MAN, 0x1F91D, second=_MAN),
    0x1F46D: _pair(_WOMAN, 0x1F91D, second=_WOMAN),
    0x1F46F: _pair(_PERSON, 0x1F430, second=_PERSON),
    0x1F48F: _pair(_PERSON, 0x2764, 0x1F48B, second=_PERSON),
    0x1F491: _pair(_PERSON, 0x2764, second=_PERSON),
    0x1F91D: _pair(0x1FAF1, second=0x1FAF2),
    0x1F93C: _pair(_PERSON, 0x1FAEF, second=_PERSON),
}


class Combination(NamedTuple):
    """What of a picture can vary, taken apart; two codes that mean the same have equal values."""

    base: str  # code points in hex, without tones, every adult written as "person"
    genders: tuple[str, ...]  # "man", "woman" or "person" for each adult, in order; may be empty
    tones: tuple[str, ...]  # in order; one entry where all halves have the same tone

    @property
    def is_variant(self) -> bool:
        return bool(self.tones) or any(gender != "person" for gender in self.genders)


def combination(code: str) -> Combination:
    """Takes a hyphenated code such as "1F469-1F3FD-200D-1F4BB" apart.

    The base is the sequence without the skin-tone code points U+1F3FB-1F3FF, without the joined
    gender signs U+2640 and U+2642, and with U+1F468 man and U+1F469 woman replaced by U+1F9D1
    person. Words with a gender of their own (princess, old man, Santa Claus) stay bases of their
    own. Follows the emoji modifier and gender rules of Unicode Technical Standard 51, section 2.
    """
    points = [int(part, 16) for part in code.split("-")]
    points = [point for point in points if point != _VARIATION_SELECTOR]
    if all(point in _TONES for point in points):
        return Combination(code, (), ())  # the colour swatches: a tone that nothing carries
    tones = tuple(_TONES[point] for point in points if point in _TONES)
    if len(set(tones)) == 1:
        tones = tones[:1]
    points = [point for point in points if point not in _TONES]

    sign = next((point for point in points[1:] if point in _SIGNS), None)
    if sign is not None:
        at = points.index(sign, 1)
        del points[at - 1 : at + 1]
    points = list(_SPELLED_OUT.get(points[0], points[:1])) + points[1:]
    if sign is not None and _PERSON in points:
        points = [_SIGNS[sign] if point == _PERSON else point for point in points]
        sign = None
    genders = tuple(_ADULTS[point] for point in points if point in _ADULTS)
    if sign is not None:
        genders += (_ADULTS[_SIGNS[sign]],)
    base = "-".join(f"{_PERSON if point in _ADULTS else point:04X}" for point in points)
    return Combination(base, genders, tones)


# --- captions -------------------------------------------------------------------------------------

_TONE_IN_NAME = re.compile(r"((?:medium-)?(?:light|dark)|medium)_skin_tone_?")
_LOOKS = {
    "bald": "bald {}",
    "beard": "{} with a beard",
    "blond_hair": "{} with blond hair",
    "curly_hair": "{} with curly hair",
    "red_hair": "{} with red hair",
    "white_hair": "{} with white hair",
}
_GROUPS = {
    "couple_with_heart": "{} with a heart",
    "family": "family of {}",
    "kiss": "{} kissing",
}
_LOOK_NAME = re.compile(rf"(man|woman|person)_({'|'.join(_LOOKS)})")
_GROUP_NAME = re.compile(rf"({'|'.join(_GROUPS)})((?:_(?:man|woman|person|adult|child|boy|girl))+)")
_SPOKEN = {"&": "and", "’": "'", "#": "hash", "*": "asterisk", "_": " "}


def captions_from_name(name: str, code: str) -> list[str]:
    """The wordings for one name of `emoji`, such as ":waving_hand_medium_skin_tone:".

    First in natural order ("waving hand with medium skin tone"), then, where it differs, as Unicode
    writes the name ("waving hand: medium skin tone"). `emoji` drops the punctuation of the Unicode
    names, so that it is put back here.
    """
    name = name.strip(":")
    tones = _TONE_IN_NAME.findall(name)
    rest = _TONE_IN_NAME.sub("", name).strip("_")
    if not rest:  # the colour swatches
        tones, rest = [], name
    official_tones = [f"{tone} skin tone" for tone in tones]

    if _is_flag(code):
        natural, official = f"flag of {rest}", ["flag", rest]
    elif look := _LOOK_NAME.fullmatch(rest):
        natural = _LOOKS[look[2]].format(look[1])
        official = [look[1], *official_tones, look[2]]
    elif group := _GROUP_NAME.fullmatch(rest):
        members = group[2].strip("_").split("_")
        natural = _GROUPS[group[1]].format(_listed(members))
        official = [group[1], *members, *official_tones]
    else:
        natural, official = rest, [rest, *official_tones]

    if tones:
        spoken = f"{tones[0]} skin tone" if len(tones) == 1 else f"{_listed(tones)} skin tones"
        natural += f"{' and' if '_with_' in natural or ' with ' in natural else ' with'} {spoken}"
    wordings = [natural, official[0] + (": " if official[1:] else "") + ", ".join(official[1:])]
    for written, said in _SPOKEN.items():
        wordings = [wording.replace(written, said) for wording in wordings]
    return list(dict.fromkeys(wordings))


def _is_flag(code: str) -> bool:
    points = [int(part, 16) for part in code.split("-")]
    letters = len(points) == 2 and all(0x1F1E6 <= point <= 0x1F1FF for point in points)
    return letters or points[-1] == 0xE007F  # a pair of regional letters, or tagged (Scotland)


def _listed(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _words(caption: str) -> tuple[str, ...]:
    """What is left of a caption after any cleaning: its words in lower case."""
    return tuple(re.findall(r"\w+", caption.lower()))


# --- pictures: codes that are drawn alike are one picture -----------------------------------------


@dataclass(frozen=True)
class Picture:
    """One drawing with all that it may be called."""

    code: str  # the shortest of `codes`; names the file
    codes: tuple[str, ...]
    captions: tuple[str, ...]

    @property
    def combinations(self) -> frozenset[Combination]:
        return frozenset(combination(code) for code in self.codes)


def group_identical(
    drawings: Mapping[str, UInt8[np.ndarray, "height width 3"]],
) -> list[tuple[str, ...]]:
    """Groups the codes whose drawings nobody can tell apart; groups and codes come sorted.

    Alike means that no channel of any pixel differs by more than 4 of 255. Many professions are
    drawn alike for "man" and "person", and some flags are equal by law: as separate pictures they
    would make retrieval a guess.
    """
    codes = sorted(drawings)
    root = {code: code for code in codes}

    def find(code: str) -> str:
        while root[code] != code:
            code = root[code]
        return code

    # Where no pixel differs by more than 4, no mean over a block does: cheap to compare for all
    # pairs whose overall means are near, and what is left is compared pixel by pixel.
    blocks = np.array([_block_means(drawings[code]) for code in codes]).reshape(len(codes), -1)
    means = blocks.mean(axis=1)
    order = np.argsort(means, kind="stable")
    ends = np.searchsorted(means[order], means[order] + _SAME_DRAWING, side="right")
    for at, (first, end) in enumerate(zip(order, ends, strict=True)):
        near = order[at + 1 : end]
        near = near[np.abs(blocks[near] - blocks[first]).max(axis=1, initial=0) <= _SAME_DRAWING]
        for second in near:
            a, b = codes[first], codes[second]
            if np.abs(drawings[a].astype(np.int16) - drawings[b]).max() <= _SAME_DRAWING:
                a, b = sorted((find(a), find(b)))
                root[b] = a
    groups = defaultdict(list)
    for code in codes:
        groups[find(code)].append(code)
    return sorted(tuple(group) for group in groups.values())


def _block_means(
    drawing: UInt8[np.ndarray, "height width 3"],
) -> Float32[np.ndarray, "rows columns 3"]:
    height, width, _ = drawing.shape
    rows, columns = height // 9, width // 9
    cut = drawing[: rows * 9, : columns * 9].astype(np.float32)
    return cut.reshape(rows, 9, columns, 9, 3).mean(axis=(1, 3))


def make_pictures(
    groups: Iterable[tuple[str, ...]], names: Mapping[str, str]
) -> tuple[list[Picture], Counter[str]]:
    """Names each group of equal drawings; returns the pictures by code and what was left out.

    Where one drawing stands for several skin tones the tone is not in it (OpenMoji draws some
    pairs in plain yellow), so that only the names without a tone are true and kept. A wording
    that two pictures would share is dropped from both, and a picture left without any is dropped.
    """
    left_out: Counter[str] = Counter(tone_not_drawn=0, shared_caption=0, no_caption=0)
    kept: list[tuple[tuple[str, ...], list[str]]] = []
    for group in groups:
        if len({combination(code).tones for code in group}) > 1:
            untoned = tuple(code for code in group if not combination(code).tones)
            left_out["tone_not_drawn"] += len(group) - len(untoned)
            group = untoned
        captions = [c for code in group for c in captions_from_name(names[code], code)]
        kept.append((group, list(dict.fromkeys(captions))))

    owners: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for index, (_, captions) in enumerate(kept):
        for caption in captions:
            owners[_words(caption)].add(index)
    pictures = []
    for codes, captions in kept:
        own = tuple(c for c in captions if _words(c) and len(owners[_words(c)]) == 1)
        left_out["shared_caption"] += len(captions) - len(own)
        left_out["no_caption"] += not own
        if own:
            code = min(codes, key=lambda code: (len(code), code))
            pictures.append(Picture(code, codes, own))
    return sorted(pictures, key=lambda picture: picture.code), left_out


# --- the split ------------------------------------------------------------------------------------


def choose_heldout(pictures: Iterable[Picture], share: float = HELDOUT_SHARE) -> set[str]:
    """The codes of the held-out pictures: new combinations of parts that all occur in training.

    Held out are tone and gender variants only, about `share` of them, by a hash of the code (the
    choice hardly moves when a release adds pictures). For each of them, training keeps another
    picture of the same base, one with the same tones, one with the same genders, and every word
    of its captions; and its combination (base, genders, tones) does not occur in training.
    """
    pictures = list(pictures)
    owners = Counter(combo for picture in pictures for combo in picture.combinations)
    in_training: Counter[tuple[str, object]] = Counter()
    for picture in pictures:
        in_training.update(_parts(picture))

    def fraction(picture: Picture) -> float:
        return int.from_bytes(hashlib.sha256(picture.code.encode()).digest()[:8]) / 2**64

    heldout = set()
    for picture in sorted(pictures, key=lambda picture: (fraction(picture), picture.code)):
        if fraction(picture) >= share:
            break
        if not all(combo.is_variant and owners[combo] == 1 for combo in picture.combinations):
            continue
        parts = _parts(picture)
        if all(in_training[part] >= 2 for part in parts):
            in_training.subtract(parts)
            heldout.add(picture.code)
    return heldout


def _parts(picture: Picture) -> set[tuple[str, object]]:
    parts: set[tuple[str, object]] = set()
    for combo in picture.combinations:
        parts |= {("base", combo.base), ("genders", combo.genders), ("tones", combo.tones)}
    parts |= {("word", word) for caption in picture.captions for word in _words(caption)}
    return parts
