"""Evaluation sets: one entry an image or an instruction, in order, without bad examples."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from jaxblip.data.eval_set import iterate_eval_images
from jaxblip.data.shapes import ShapesSource
from jaxblip.data.sources import open_source
from jaxblip.errors import RunStopped


def photo(seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def jsonl(path):
    return open_source(str(path), image_size_px=24)


def test_eval_set_has_one_entry_an_image(tmp_path):
    (tmp_path / "a.png").write_bytes(png(photo()))
    (tmp_path / "b.png").write_bytes(png(photo(seed=1)[..., 0]))
    (tmp_path / "c.png").write_bytes(b"broken")
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, [
        {"image": "a.png", "captions": ["A cat.", "one two three four"], "id": 5},
        {"image": "c.png", "caption": "never seen"},
        {"image": "b.png", "caption": "a dog", "id": 2},
        {"image": "a.png", "captions": ["a cat", "", "a CAT on a mat"], "id": 5},
        {"image": "b.png", "caption": " !", "id": 2},
    ])))
    evalset = iterate_eval_images(jsonl(path), 24, max_pixels=10_000, max_words=3)
    assert evalset.captions == [["a cat", "one two three", "a cat on"], ["a dog"]]
    assert evalset.image_ids.tolist() == [5, 2]
    assert evalset.images.shape == (2, 24, 24, 3) and evalset.images.dtype == np.uint8
    expected = Image.fromarray(photo()).resize((24, 24), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(evalset.images[0], np.asarray(expected))
    assert evalset.skipped == {"corrupt image": 1, "empty caption": 1}
    assert evalset.converted == {"converted grayscale": 1}


def test_eval_set_has_one_entry_an_instruction(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(png(photo()))
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, [
        {"image": "a.png", "question": "What is it?", "answers": ["A Cat", "a cat", "Dog"]},
        {"image": "b.png", "question": "What is it?", "answer": "none"},
        {"image": "a.png", "question": "How many?", "answer": "2"},
        {"image": "b.png", "question": " ", "answer": "2"},
        {"image": "a.png", "question": "What is it?", "answer": "Fox"},
    ])))
    cleaned, written = (
        iterate_eval_images(jsonl(path), 24, 10_000, max_words, instructions=True)
        for max_words in (50, 0)
    )
    assert cleaned.instructions == ["what is it?", "what is it?", "how many?"]
    assert cleaned.captions == [["a cat", "dog", "fox"], ["none"], ["2"]]
    assert written.instructions == ["What is it?", "What is it?", "How many?"]
    assert written.captions == [["A Cat", "a cat", "Dog", "Fox"], ["none"], ["2"]]
    assert cleaned.rows.tolist() == [0, 1, 0]
    first, second, third = cleaned.image_ids.tolist()
    assert first == third != second
    assert len(cleaned.images) == 2 and cleaned.skipped == {"empty instruction": 1}
    ignored = iterate_eval_images(jsonl(path), 24, 10_000, 50)
    assert ignored.instructions == ["", ""] and ignored.rows.tolist() == [0, 1]
    assert ignored.captions == [["a cat", "dog", "2", "fox"], ["none", "2"]]


def test_eval_set_of_shapes_is_whole_and_in_order():
    source = ShapesSource("heldout", 24, size=30)
    evalset = iterate_eval_images(source, 24, max_pixels=10_000, max_words=50)
    assert evalset.image_ids.tolist() == list(range(30))
    np.testing.assert_array_equal(evalset.images[7], source[7]["image"])
    assert evalset.captions[7] == source[7]["captions"]


def test_eval_set_of_only_bad_examples(tmp_path):
    path = tmp_path / "data.jsonl"
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(b"broken")
    rows = ({"image": f"{name}.png", "caption": "a cat"} for name in "abc")
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(RunStopped, match="none of 3 examples .* corrupt image 3"):
        iterate_eval_images(jsonl(path), 24, 10_000, 50)
