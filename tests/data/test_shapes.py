"""The procedural set: what it promises about splits, captions and pictures."""

import itertools
import pickle
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from jaxblip.data import shapes
from jaxblip.data.shapes import COLOURS, SHAPES, ShapesSource
from jaxblip.errors import UserError

INVERSE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def understand(caption: str) -> frozenset:
    """Reads a caption without the code that wrote it: each thing with where it lies."""
    things = re.findall(r"(small|large) (\w+) (\w+)", caption)
    assert len(things) == 2
    (place,) = [word for word in caption.split() if word in INVERSE]
    if " with " in caption:  # "A with B to its left": the word is the place of the thing named last
        places = [INVERSE[place], place]
    else:  # "A left of B": of the thing named first
        places = [place, INVERSE[place]]
    return frozenset(zip(things, places))


def test_every_caption_of_an_image_says_the_same_and_all_of_it():
    for split in shapes.SPLIT_SIZES:
        source = ShapesSource(split, 48)
        for index in range(200):
            captions = source[index]["captions"]
            scene = source.scene(index)
            where = ("left", "right") if scene.relation == "left" else ("above", "below")
            expected = frozenset(
                ((thing.size, thing.colour, thing.shape), place)
                for thing, place in zip((scene.first, scene.second), where)
            )
            assert len(set(captions)) == 4
            assert all(understand(caption) == expected for caption in captions)
            assert all(len(caption.split()) <= 10 for caption in captions)


def test_no_caption_of_a_heldout_image_is_true_of_another():
    source = ShapesSource("heldout", 48)
    meanings = [understand(source[index]["captions"][0]) for index in range(len(source))]
    assert len(meanings) == 500
    assert len(set(meanings)) == len(meanings)


def looks(caption: str) -> frozenset:
    return frozenset(re.findall(r"(small|large) (\w+) (\w+)", caption))


def test_heldout_compositions_never_occur_in_training_but_their_parts_do():
    train = ShapesSource("train", 48, size=60_000, images=False)  # enough to meet nearly all pairs
    seen, parts, sizes, relations = set(), set(), set(), set()
    for index in range(len(train)):
        caption = train[index]["captions"][0]
        pair = looks(caption)
        seen.add(pair)
        parts |= pair
        sizes |= set(re.findall("small|large", caption))
        relations |= {place for _, place in understand(caption)}
    heldout = ShapesSource("heldout", 48).without_images()
    unseen = {looks(heldout[index]["captions"][0]) for index in range(len(heldout))}
    assert not seen & unseen
    assert parts == set(itertools.product(shapes.SIZES, COLOURS, SHAPES))
    assert sizes == {"small", "large"}
    assert relations == set(INVERSE)
    things = list(itertools.product(shapes.SIZES, COLOURS, SHAPES))
    all_pairs = sum(a[1:] != b[1:] for a, b in itertools.combinations(things, 2))
    assert 0.15 < (all_pairs - len(seen)) / all_pairs < 0.25


def attributes(scene):
    return sorted(word for thing in (scene.first, scene.second) for word in str(thing).split())


def test_four_training_scenes_in_a_row_are_alike_but_for_what_is_where():
    source = ShapesSource("train", 48)
    changed = Counter()
    for start in range(0, 400, 4):
        base, mirrored, other, other_mirrored = map(source.scene, range(start, start + 4))
        for scene, mirror in ((base, mirrored), (other, other_mirrored)):
            assert mirror == shapes.Scene(scene.second, scene.first, scene.relation)
        assert attributes(other) == attributes(base)
        if other.relation != base.relation:
            assert (other.first, other.second) == (base.first, base.second)
            changed["relation"] += 1
        else:
            names = ("size", "colour", "shape")
            (name,) = [n for n in names if getattr(other.first, n) != getattr(base.first, n)]
            changed[name] += 1
        captions = [c for index in range(start, start + 4) for c in source[index]["captions"]]
        assert len(set(captions)) == 16
    assert set(changed) == {"relation", "size", "colour", "shape"}
    assert len({source.scene(start) for start in range(0, 400, 4)}) > 90


def test_example_depends_on_split_and_index_alone():
    source = ShapesSource("train", 48)
    again = pickle.loads(pickle.dumps(ShapesSource("train", 48, size=50)))
    for index in (49, 3, 0):
        np.testing.assert_array_equal(source[index]["image"], again[index]["image"])
        assert source[index]["captions"] == again[index]["captions"]
        assert source[index]["image_id"] == index
    assert not np.array_equal(source[0]["image"], source[1]["image"])
    # Neither on the process: Python's own hash of a text is another one in each.
    code = (
        "from jaxblip.data.shapes import ShapesSource as S;"
        "print(S('heldout', 48)[7]['captions'][0], S('heldout', 48)[7]['image'].sum())"
    )
    shown = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    }
    example = ShapesSource("heldout", 48)[7]
    assert shown == {f"{example['captions'][0]} {example['image'].sum()}\n"}


def _cut_out(image: np.ndarray, colour: str) -> np.ndarray:
    """Pixels that are fully of a colour."""
    return (abs(image.astype(int) - COLOURS[colour]) <= 1).all(-1)


@pytest.mark.parametrize("size_px", [48, 64])
def test_the_picture_shows_what_the_caption_says(size_px):
    source = ShapesSource("train", size_px)
    extents = {(size, shape): [] for size in shapes.SIZES for shape in SHAPES}
    for index in range(400):
        scene, image = source.scene(index), source[index]["image"]
        assert image.shape == (size_px, size_px, 3) and image.dtype == np.uint8
        if scene.first.colour == scene.second.colour:
            continue
        boxes = []
        for thing in (scene.first, scene.second):
            rows, columns = np.nonzero(_cut_out(image, thing.colour))
            boxes.append((columns.min(), columns.max(), rows.min(), rows.max()))
            extents[thing.size, thing.shape].append(max(np.ptp(rows), np.ptp(columns)) / size_px)
        (left, right, top, bottom), (left2, right2, top2, bottom2) = boxes
        along = left2 - right if scene.relation == "left" else top2 - bottom
        assert along >= 2  # apart, in the right order
        dx, dy = left2 + right2 - left - right, top2 + bottom2 - top - bottom
        dominant, other = (dx, dy) if scene.relation == "left" else (dy, dx)
        assert dominant > 1.7 * abs(other)  # of the whole boxes; no second relation to speak of
    for shape in SHAPES:
        for smaller, larger in itertools.pairwise(shapes.SIZES):
            assert max(extents[smaller, shape]) < 0.9 * min(extents[larger, shape])


def test_objects_stay_apart_and_inside():
    for split in shapes.SPLIT_SIZES:
        source = ShapesSource(split, 64)
        for index in range(500):
            centres, half = source.layout(index)
            axis = 0 if source.scene(index).relation == "left" else 1
            assert (centres - half[:, None] > 0).all() and (centres + half[:, None] < 1).all()
            assert centres[1, axis] - centres[0, axis] >= half.sum() + 0.049
            across = abs(centres[1, 1 - axis] - centres[0, 1 - axis])
            assert across <= 0.1 + 1e-9


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", np.pi / 4),
        ("ring", np.pi / 4 * (1 - 0.55**2)),
        ("diamond", 0.5),
        ("square", 0.81),
        ("triangle", 0.5),
        ("cross", 0.3 * 2 - 0.09),
    ],
)
def test_shapes_cover_the_area_of_their_formula(shape, area):
    side = 160
    coverage = shapes._coverage(shape, side, 1, 2)
    covered = coverage.sum() / 255 * shapes._SUPERSAMPLING**2 / side**2
    assert covered == pytest.approx(area, rel=0.02)


def test_shapes_are_antialiased():
    coverage = shapes._coverage("circle", 48, 1, 2)
    assert 5 < len(np.unique(coverage))
    assert coverage.max() == 255 and coverage.min() == 0


def test_without_images_keeps_the_captions():
    source = ShapesSource("train", 48)
    text = source.without_images()
    assert "image" not in text[5]
    assert text[5]["captions"] == source[5]["captions"]
    assert len(text) == len(source) == 30_000


def test_wrong_split_and_size_are_errors():
    with pytest.raises(UserError, match="'test'.*train, heldout"):
        ShapesSource("test")
    with pytest.raises(UserError, match="9999"):
        ShapesSource("heldout", size=9999)
    with pytest.raises(IndexError):
        ShapesSource("train", size=3)[3]
