"""Every caption of an image as an example of its own (`data.captions = "all"`)."""

from __future__ import annotations

import itertools
import json
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxblip.cli import main
from jaxblip.config import default_config
from jaxblip.data import inputs, run_sources, run_tokenizers
from jaxblip.data.captions import EachCaption
from jaxblip.data.samples import BadSample
from jaxblip.data.shapes import ShapesSource
from jaxblip.data.sources import open_source
from jaxblip.data.tokenizers import train_wordpiece
from jaxblip.errors import UserError
from jaxblip.training.metrics import read_metrics

CONFIG = Path(__file__).parents[2] / "configs" / "demo" / "stage1.py"
FIELDS = ("text_ids", "text_mask", "image_id")
# Images with one to four captions, two of them equal, and one that is empty.
COUNTS = [1, 3, 2, 4, 1, 2, 1]
ROWS = [
    {"image": f"{image}.png", "captions": [f"image {image} text {n}" for n in range(count)]}
    for image, count in enumerate(COUNTS)
]
ROWS[3]["captions"][2] = ROWS[3]["captions"][1]
ROWS[5]["captions"][0] = ""
PAIRS = [(image, text) for image, row in enumerate(ROWS) for text in row["captions"]]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row | {"id": i}) + "\n" for i, row in enumerate(ROWS)))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([text for _, text in PAIRS], 100)


def make_config(path, **data):
    config = default_config("language_model")
    config.batch_size = 1
    config.data.train.source = path
    config.data.update(num_workers=0, captions="all", max_bad_share=1.0, **data)
    return config


def take(config, tokenizer, number, position=None, process=(0, 1)):
    sources = run_sources.open_train_sources(config)
    settings = config, FIELDS, sources, tokenizer, process, position
    with inputs.train_batches(*settings) as batches:
        taken = list(itertools.islice(batches, number))
        return {field: np.concatenate([b[field] for b in taken]) for field in FIELDS}, batches


def seen(tokenizer, batch):
    """The pairs of a batch, in their order."""
    return [
        (int(image), tokenizer.decode(ids[mask], skip_special_tokens=True))
        for image, ids, mask in zip(batch["image_id"], batch["text_ids"], batch["text_mask"])
    ]


def test_every_pair_is_an_example_with_the_id_of_its_image(path):
    source = EachCaption(open_source(path, image_size_px=24).without_images())
    assert len(source) == sum(COUNTS)
    found = [source[index] for index in range(len(source))]
    assert [(each["image_id"], *each["captions"]) for each in found] == PAIRS
    for index in (-1, len(source)):
        with pytest.raises(IndexError):
            source[index]


def test_an_epoch_has_every_pair_once(path, tokenizer):
    """But for the one without words: it is met once, counted, and another drawn in its place."""
    size = len(PAIRS)
    found, batches = take(make_config(path), tokenizer, 2 * size)
    pairs = seen(tokenizer, found)
    assert set(batches.skipped) == {"empty caption"}
    assert 2 <= batches.skipped.total() < 6  # it may be drawn in its own place
    epochs = pairs[:size], pairs[size:]
    good = Counter(pair for pair in PAIRS if pair[1])
    for epoch in epochs:
        replacement = Counter(epoch) - good
        assert replacement.total() == 1 and good - Counter(epoch) == Counter()
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("number", [1, 3, 5])
def test_going_on_is_exact_on_other_batches_workers_and_processes(path, tokenizer, number):
    config = make_config(path)
    straight, _ = take(config, tokenizer, 30)
    config.batch_size = 2
    _, batches = take(config, tokenizer, number)
    position = json.loads(json.dumps(batches.state()))
    config.data.num_workers = int(number == 5)
    for index in range(2):
        part, _ = take(config, tokenizer, 15 - number, position, (index, 2))
        for field in FIELDS:
            np.testing.assert_array_equal(part[field], straight[field][2 * number + index :: 2])


def test_answers_of_a_question_are_examples_too(tmp_path):
    path = tmp_path / "asked.jsonl"
    row = {"image": "a.png", "question": "what?", "answers": ["a cat", "a cat", "a dog"]}
    path.write_text(json.dumps(row) + "\n")
    config = make_config(str(path), prompt="Question: {} Answer:")
    (opened,) = run_sources.open_train_sources(config)
    assert opened.source.has_instructions
    examples = [opened.source.without_images()[index] for index in range(3)]
    assert [each["captions"] for each in examples] == [["a cat"], ["a cat"], ["a dog"]]
    assert {each["instruction"] for each in examples} == {"what?"}


class Failing:
    """A source whose second example cannot be read, or, as time goes on, is another one."""

    problems = ["a sentence"]

    def __init__(self):
        self.captions = None

    def __len__(self):
        return 3

    def __getitem__(self, index):
        if index == 1 and self.captions is None:
            raise BadSample("unreadable row", "a test")
        return {"captions": ["a", "b"] if index != 1 else self.captions, "image_id": index}


def test_an_example_that_cannot_be_read_counts_as_one():
    inner = Failing()
    source = EachCaption(inner)
    assert len(source) == 5 and source.problems == ["a sentence"]
    with pytest.raises(BadSample, match="unreadable row"):
        source[2]
    assert [source[index]["captions"] for index in (0, 1, 3, 4)] == [["a"], ["b"], ["a"], ["b"]]
    assert source.place(4) == "example 2"
    inner.captions = ["c", "d"]
    assert source[2]["captions"] == ["c"]
    inner.captions = []
    assert source[2]["captions"] == []  # a sample without a caption, like others
    assert len(EachCaption(inner)) == 5  # and such a one is met too


def test_images_are_read_only_where_they_are_asked_for():
    source = EachCaption(ShapesSource("train", 24, size=5))
    assert len(source) == 20 and source[7]["image"].shape == (24, 24, 3)
    texts = source.without_images()
    assert "image" not in texts[7] and "image" in source[7]
    assert texts[7]["captions"] == source[7]["captions"]
    assert len(pickle.dumps(texts)) < 1000 + 8 * 5


def test_a_tokenizer_is_trained_on_the_same_texts_either_way(path, tmp_path):
    config = make_config(path)
    vocabularies = []
    for config.data.captions in ("sample", "all"):
        sources = run_sources.open_train_sources(config)
        vocabularies.append(run_tokenizers.run_tokenizer(config, tmp_path, sources).get_vocab())
    assert vocabularies[0] == vocabularies[1]


def test_settings_that_do_not_go_together(path):
    with pytest.raises(UserError, match="data.captions='each' is none of sample, all"):
        config = make_config(path)
        config.data.captions = "each"
        run_sources.open_train_sources(config)
    with pytest.raises(UserError, match="shuffle_block=2 would keep captions of one image"):
        run_sources.open_train_sources(make_config(path, shuffle_block=2))
    config = make_config(path)
    config.batch_size = len(PAIRS)  # more than there are images
    run_sources.open_train_sources(config)
    config.data.captions = "sample"
    with pytest.raises(UserError, match="7 examples, fewer than batch_size=14"):
        run_sources.open_train_sources(config)


def test_stage1_trains_on_every_pair(tmp_path):
    """Eight of the twelve pairs of three images a batch, so that captions of one meet."""
    path = tmp_path / "pairs.jsonl"
    drawings = ShapesSource("train", 16, size=3)
    lines = []
    for index in range(len(drawings)):
        Image.fromarray(drawings[index]["image"]).save(tmp_path / f"{index}.png")
        lines.append({"image": f"{index}.png", "captions": drawings[index]["captions"]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tiny = {
        "steps": 3, "batch_size": 8, "log_every_steps": 1, "optimizer.warmup_steps": 1,
        "compute_dtype": "float32", "init.vision": "random", "eval.source": "",
        "data.train.source": path, "data.captions": "all", "data.shuffle_block": 1,
        "data.num_workers": 0, "data.image_size_px": 24,
        "model.vision.num_layers": 1, "model.vision.width": 16, "model.vision.num_heads": 2,
        "model.vision.mlp_width": 16, "model.qformer.num_layers": 2, "model.qformer.width": 16,
        "model.qformer.num_heads": 2, "model.qformer.mlp_width": 16,
        "model.qformer.num_query_tokens": 2,
    }  # fmt: skip
    workdir = tmp_path / "run"
    flags = [f"--config.{field}={value}" for field, value in tiny.items()]
    assert not main(["train", f"--config={CONFIG}", f"--workdir={workdir}", *flags])
    losses = [line["train/loss"] for line in read_metrics(workdir)]
    assert len(losses) == 3 and np.isfinite(losses).all()
