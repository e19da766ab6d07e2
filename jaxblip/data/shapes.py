"""A procedural set: pictures of two coloured shapes, and captions that say where they lie.

Pairs of objects (size, colour, shape) that `is_heldout` picks never occur in training, so the
held-out split asks for compositions that were never seen, made of parts that all were.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from jaxblip.errors import UserError

COLOURS = {
    "red": (214, 39, 40),
    "orange": (255, 140, 20),
    "yellow": (245, 222, 20),
    "green": (30, 140, 50),
    "cyan": (40, 205, 220),
    "blue": (35, 70, 215),
    "purple": (150, 50, 185),
    "pink": (250, 150, 200),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "ring", "square", "diamond", "triangle", "cross")
# Half of the side of the bounding box, as a share of the image's side.
SIZES = {"small": 0.145, "large": 0.215}
# (between the first object and the second, between the second and the first, where the first one
# is, where the second one is)
RELATIONS = {
    "left": ("left of", "right of", "to its left", "to its right"),
    "above": ("above", "below", "above it", "below it"),
}
SPLIT_SIZES = {"train": 30_000, "heldout": 500}

_RELATED_SCENES = 4  # of training: hard negatives of one another
_HELDOUT_SHARE = 0.2  # of the pairs
_SIZE_JITTER = 0.05  # relative; the two sizes stay far apart
_MARGIN = 0.02  # from the image's edge, as a share of its side
_MIN_GAP = 0.05  # between the two bounding boxes, along the relation's axis
_MAX_ALONG = 0.08  # room of each object along the relation's axis
_MAX_LINE_OFFSET = 0.05  # of the line on which both objects lie, from the middle of the image
_MAX_OFFSET = 0.03  # of each object across the relation's axis: far below the distance along it
_BACKGROUND = (205, 245)  # shade of grey
_SUPERSAMPLING = 4


@dataclasses.dataclass(frozen=True, order=True)
class Thing:
    """One object of a scene, as a caption names it."""

    colour: str
    shape: str
    size: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """`first` lies to the left of, or above, `second`: the description of one image."""

    first: Thing
    second: Thing
    relation: str  # "left" or "above"


def is_heldout(one: Thing, other: Thing) -> bool:
    """Whether this unordered pair of objects is kept out of training, as about a fifth is."""
    names = "|".join(sorted((str(one), str(other))))
    digest = hashlib.sha256(names.encode()).digest()
    return int.from_bytes(digest[:4], "big") < _HELDOUT_SHARE * 2**32


def scene_captions(scene: Scene) -> list[str]:
    """Four captions, each of which alone names both objects, their sizes and the relation."""
    relation, inverse, first_place, second_place = RELATIONS[scene.relation]
    first, second = scene.first, scene.second
    return [
        f"{first} {relation} {second}",
        f"{second} {inverse} {first}",
        f"{first} with {second} {second_place}",
        f"{second} with {first} {first_place}",
    ]


@functools.cache
def _compositions(heldout: bool) -> list[tuple[Thing, Thing]]:
    """All ordered pairs of objects of one split that differ in more than their size."""
    things = itertools.starmap(Thing, itertools.product(COLOURS, SHAPES, SIZES))
    return [
        (one, other)
        for one, other in itertools.permutations(things, 2)
        if (one.colour, one.shape) != (other.colour, other.shape)
        and is_heldout(one, other) == heldout
    ]


def _with_an_exchange(scene: Scene) -> list[Scene]:
    """Scenes of training that have all but one thing in common with this one.

    That is the relation, or an attribute of which each object has the other's.
    """
    one, other = scene.first, scene.second
    pairs = []
    for field in ("size", "colour", "shape"):
        of_one, of_other = getattr(one, field), getattr(other, field)
        pair = (
            dataclasses.replace(one, **{field: of_other}),
            dataclasses.replace(other, **{field: of_one}),
        )
        # Where nothing else differs, that exchanges the places.
        if of_one != of_other and pair != (other, one) and not is_heldout(*pair):
            pairs.append(pair)
    (relation,) = RELATIONS.keys() - {scene.relation}
    return [Scene(one, other, relation), *(Scene(*pair, scene.relation) for pair in pairs)]


@functools.cache
def _heldout_scenes() -> list[Scene]:
    """Every scene of the held-out compositions once, in a fixed order that looks random."""
    scenes = [
        Scene(one, other, relation)
        for one, other in _compositions(heldout=True)
        for relation in RELATIONS
    ]
    return sorted(scenes, key=lambda scene: hashlib.sha256(repr(scene).encode()).digest())


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points lie inside the shape that fills [-1, 1] x [-1, 1]; y points down."""
    radius = np.hypot(x, y)
    if shape == "circle":
        return radius <= 1
    if shape == "ring":
        return (radius <= 1) & (radius >= 0.55)
    if shape == "diamond":
        return abs(x) + abs(y) <= 1
    if shape == "square":  # of about the circle's area, so that its size does not mislead
        return np.maximum(abs(x), abs(y)) <= 0.9
    if shape == "triangle":
        return abs(x) <= (y + 1) / 2
    if shape == "cross":
        return np.minimum(abs(x), abs(y)) <= 0.3
    raise ValueError(f"no shape is called {shape!r}")


@functools.lru_cache(maxsize=4096)
def _coverage(shape: str, side: int, top: int, left: int) -> UInt8[np.ndarray, "height width"]:
    """How much of each pixel a shape covers, 0 to 255, in the pixels that it touches.

    `side` is that of the bounding box, `top` and `left` its place in the first pixel; all three
    count supersampled points, so that few different patches exist and most come from the cache.
    """
    per_pixel = _SUPERSAMPLING
    height, width = (-(-(start + side) // per_pixel) for start in (top, left))
    points = np.zeros((height * per_pixel, width * per_pixel), np.float32)
    grid = (2 * np.arange(side) + 1) / side - 1
    points[top : top + side, left : left + side] = _inside(shape, grid[None, :], grid[:, None])
    pixels = points.reshape(height, per_pixel, width, per_pixel).mean((1, 3))
    return np.round(255 * pixels).astype(np.uint8)


def _place(
    scene: Scene, rng: np.random.Generator
) -> tuple[Float[np.ndarray, "2 2"], Float[np.ndarray, "2"]]:
    """Centres (x, y) and half sides of both objects, as shares of the image's side."""
    draws = rng.random(7)
    jitter = 1 + _SIZE_JITTER * (2 * draws[:2] - 1)
    half = np.array([SIZES[scene.first.size], SIZES[scene.second.size]]) * jitter
    # Along the axis: each object near the middle of its half of the image.
    free = (1 - _MIN_GAP) / 2 - _MARGIN - 2 * half
    along = _MARGIN + half + free / 2 + (draws[2:4] - 0.5) * np.minimum(free, _MAX_ALONG)
    along[1] = 1 - along[1]
    # Across it: both near one line, itself near the middle.
    line = 0.5 + _MAX_LINE_OFFSET * (2 * draws[4] - 1)
    across = line + _MAX_OFFSET * (2 * draws[5:7] - 1)
    centres = np.stack([along, across], axis=1)
    return (centres if scene.relation == "left" else centres[:, ::-1]), half


class ShapesSource:
    """Scenes of two objects; example `index` is a function of (split, index) alone.

    In "train", each four examples from a multiple of four on are alike but for what is where: in
    the second and the fourth the objects of the first and the third have exchanged their places,
    and the third has the first's with an attribute exchanged, or another relation. Let batches keep
    them together (`data.shuffle_block = 4`), or contrast hardly ever asks for what is where.

    Args:
      split: "train", or "heldout": the compositions that training never shows, every scene with
        a description of its own, so that no caption of one image is true of another.
      image_size_px: side of the square images.
      size: number of examples, by default SPLIT_SIZES[split].
      images: without them only captions are made, for tasks on text.

    Raises:
      UserError: unknown split, or more held-out examples than there are held-out scenes.
    """

    def __init__(
        self, split: str, image_size_px: int = 64, size: int | None = None, images: bool = True
    ):
        if split not in SPLIT_SIZES:
            raise UserError(
                f"shapes has no split {split!r}; the splits are {', '.join(SPLIT_SIZES)}"
            )
        self.split = split
        self.image_size_px = image_size_px
        self.images = images
        self._size = SPLIT_SIZES[split] if size is None else size
        if split == "heldout" and self._size > len(_heldout_scenes()):
            raise UserError(
                f"shapes:heldout has {len(_heldout_scenes())} different scenes, "
                f"{self._size} were asked for; ask for fewer"
            )

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self._size:
            raise IndexError(f"index {index} of {self._size} examples")
        scene = self.scene(index)
        example = {"captions": scene_captions(scene), "image_id": int(index)}
        if self.images:
            example["image"] = self._render(scene, self._rng(index))
        return example

    def scene(self, index: int) -> Scene:
        """The description that example `index` shows."""
        if self.split == "heldout":
            return _heldout_scenes()[index]
        # From behind the stream of images, which draw for less than 2^32 examples.
        rng = self._rng(2**32 + index // _RELATED_SCENES)
        pairs = _compositions(heldout=False)
        one, other = pairs[rng.integers(len(pairs))]
        scene = Scene(one, other, list(RELATIONS)[rng.integers(len(RELATIONS))])
        exchanged = _with_an_exchange(scene)
        if index % _RELATED_SCENES >= 2:
            scene = exchanged[rng.integers(len(exchanged))]
        return Scene(scene.second, scene.first, scene.relation) if index % 2 else scene

    def layout(self, index: int) -> tuple[Float[np.ndarray, "2 2"], Float[np.ndarray, "2"]]:
        """Centres (x, y) and half sides of its two objects, as shares of the image's side."""
        return _place(self.scene(index), self._rng(index))

    def without_images(self) -> ShapesSource:
        return ShapesSource(self.split, self.image_size_px, self._size, images=False)

    def _rng(self, index: int) -> np.random.Generator:
        key = np.array([list(SPLIT_SIZES).index(self.split), index], np.uint64)
        return np.random.Generator(np.random.Philox(key=key))

    def _render(
        self, scene: Scene, rng: np.random.Generator
    ) -> UInt8[np.ndarray, "height width 3"]:
        side_px, per_pixel = self.image_size_px, _SUPERSAMPLING
        centres, half_sides = _place(scene, rng)
        background = int(rng.integers(*_BACKGROUND))
        image = np.full((side_px, side_px, 3), background, np.uint8)
        for thing, centre, half in zip((scene.first, scene.second), centres, half_sides):
            side = round(2 * half * side_px * per_pixel)
            left, top = (round((c - half) * side_px * per_pixel) for c in centre)
            (left_px, left), (top_px, top) = divmod(left, per_pixel), divmod(top, per_pixel)
            covered = _coverage(thing.shape, side, top, left)[..., None] / np.float32(255)
            height, width = covered.shape[:2]
            contrast = np.array(COLOURS[thing.colour], np.float32) - background
            # The boxes do not overlap, but their outermost pixels may touch nothing of the other:
            # the minimum gap is more than two pixels at any size that can be read.
            image[top_px : top_px + height, left_px : left_px + width] = (
                background + contrast * covered + 0.5
            )
        return image
