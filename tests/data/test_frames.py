"""Several images of one example, such as the frames of a video: read, cut, drawn alike."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hostile import bad_sample, inspected
from PIL import Image

from jaxblip.config import default_config
from jaxblip.data import inputs, run_sources
from jaxblip.data.images import frame_numbers
from jaxblip.data.sources import open_source
from jaxblip.data.tokenizers import train_wordpiece
from jaxblip.errors import UserError
from jaxblip.overrides import apply_overrides
from jaxblip.tasks import make_task

SHADES = (10, 60, 110, 160, 210)


@pytest.mark.parametrize(("count", "wanted", "expected"), [
    (8, 4, [1, 3, 5, 7]), (5, 3, [0, 2, 4]), (4, 4, [0, 1, 2, 3]), (9, 1, [4]),
    (1, 3, [0, 0, 0]), (2, 4, [0, 0, 1, 1]), (300, 4, [37, 112, 187, 262]),
])  # fmt: skip
def test_frames_are_evenly_spaced(count, wanted, expected):
    assert frame_numbers(count, wanted) == expected


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A video of five frames, each of a shade of its own, an image, and a video of two frames."""
    folder = tmp_path_factory.mktemp("videos")
    for shade in SHADES:
        ramp = np.arange(20, dtype=np.uint8)[None, :, None] + np.uint8(shade)
        Image.fromarray(np.broadcast_to(ramp, (20, 20, 3)).copy()).save(folder / f"{shade}.png")
    of = [[f"{shade}.png" for shade in SHADES], "60.png", ["210.png", "10.png"]]
    lines = [{"image": image, "caption": f"number {n}"} for n, image in enumerate(of)] * 2
    (folder / "videos.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "videos.jsonl"


def shades(images):
    """The darkest value of each frame, which is its shade where it is seen whole."""
    return images.min(axis=(-3, -2, -1)).tolist()


def config_of(path, *overrides):
    config = default_config("stage2").lock()
    apply_overrides(config, [
        f"config.data.train.source={path}", f"config.eval.source={path}", "config.batch_size=6",
        "config.data.num_workers=0", "config.data.image_size_px=20", *overrides,
    ])  # fmt: skip
    return config


def batches(config, number=1):
    sources = run_sources.open_train_sources(config)
    tokenizer = train_wordpiece(["number 0 1 2"] * 3, 40)
    fields = make_task(with_vocabulary(config)).fields
    with inputs.train_batches(config, fields, sources, tokenizer, (0, 1), None) as made:
        found = [{name: array.copy() for name, array in batch.items()}
                 for batch in itertools.islice(made, number)]  # fmt: skip
    return found


def with_vocabulary(config):
    config = config.copy_and_resolve_references()
    config.model.vision.patch_size_px = 10
    config.model.language_model.update(vocab_size=40, width=8, num_layers=1, num_heads=2)
    return config


WHOLE = (
    "config.data.crop_scale=1,1", "config.data.crop_aspect=1,1", "config.data.flip_probability=0",
)  # fmt: skip


@pytest.mark.parametrize(("frames", "expected"), [
    (1, {110, 60, 10}), (2, {(60, 160), (60, 60), (210, 10)}),
    (3, {(10, 110, 210), (60, 60, 60), (210, 10, 10)}),
])  # fmt: skip
def test_a_batch_has_as_many_frames_of_each_video(path, frames, expected):
    config = config_of(path, f"config.data.frames={frames}", *WHOLE)
    (batch,) = batches(config)
    shape = make_task(with_vocabulary(config)).batch_shapes(6)["image"].shape
    assert batch["image"].shape == shape == (6, *((frames,) if frames > 1 else ()), 20, 20, 3)
    found = shades(batch["image"])
    assert {x if frames == 1 else tuple(x) for x in found} <= expected
    evaluated = run_sources.read_eval_set(config)
    assert evaluated.images.shape == (3, *shape[1:])
    assert {x if frames == 1 else tuple(x) for x in shades(evaluated.images)} == expected


def test_the_frames_of_a_video_are_cropped_and_mirrored_alike(path):
    """All have the same ramp from left to right, only of other shades."""
    config = config_of(path, "config.data.frames=5", "config.data.flip_probability=0.5")
    seen = set()
    for batch in batches(config, 4):
        images = batch["image"].astype(int)
        for frames in images:
            ramps = frames[..., 0] - frames[:, :1, :1, 0]
            assert (ramps == ramps[0]).all()
            seen.add(tuple(ramps[0, 0]))
    assert len(seen) > 6 and {ramp[-1] > 0 for ramp in seen} == {True, False}


def test_workers_make_the_same_batches_of_videos(path):
    here, there = (
        batches(config_of(path, "config.data.frames=3", f"config.data.num_workers={workers}"), 3)
        for workers in (0, 1)
    )
    for one, other in zip(here, there, strict=True):
        for field in one:
            np.testing.assert_array_equal(one[field], other[field])


def test_a_video_is_one_image_elsewhere(path, capsys):
    status, printed = inspected(path, capsys)
    assert status == 0 and "6 examples of 3 images" in printed


@pytest.mark.parametrize(("image", "message"), [
    ([], '"image" is \\[\\], not the path of an image, or those of a video'),
    (["a.png", 3], '"image" is 3, not the path of an image'),
    ([["a.png"]], "not a list of paths"),
])  # fmt: skip
def test_lists_that_are_no_videos(image, message, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"image": image, "caption": "a"}))
    with pytest.raises(UserError, match=message):
        open_source(str(path), image_size_px=8)


def test_a_frame_that_is_missing(tmp_path):
    path = tmp_path / "gone.jsonl"
    path.write_text(json.dumps({"image": ["a.png", "b.png"], "caption": "a"}))
    source = open_source(str(path), image_size_px=8, frames=2)
    assert "one of ['a.png', 'b.png'] in " in bad_sample(source, 0, "missing image")


@pytest.mark.parametrize(("overrides", "message"), [
    (["data.frames=0"], "data.frames=0 must be 1 or more"),
    (["data.frames=4", "data.features=there"], "one image an example, and data.frames=4"),
    (["data.frames=70"], "2240 visual tokens of data.frames=70 images and data.max_text_tokens=32"),
])  # fmt: skip
def test_settings_that_do_not_fit(path, overrides, message):
    config = with_vocabulary(config_of(path, *overrides))
    with pytest.raises(UserError, match=message):
        make_task(config)
