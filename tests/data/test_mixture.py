"""Several sources in one run: shares, what each has of its own, and the position among them."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxblip.config import config_from_dict, default_config
from jaxblip.overrides import apply_overrides
from jaxblip.data import inputs, run_sources, run_tokenizers
from jaxblip.data.mixture import configs_of_sources, lines, shares
from jaxblip.data.pipeline import Part, TrainBatches
from jaxblip.data.preprocess import Preprocess
from jaxblip.data.samples import BadSample
from jaxblip.data.shapes import ShapesSource
from jaxblip.errors import RunStopped, UserError

# Of the image training of X-InstructBLIP in LAVIS: samples and published ratio of 11 sets.
LAVIS_SETS = {
    "cc12m": (6_029_862, 0.19438),
    "coco caption": (566_747, 0.05959),
    "capfilt-14m": (13_873_136, 0.29485),
    "vg caption": (821_774, 0.07176),
    "sbu": (859_739, 0.07340),
    "vg vqa": (1_440_069, 0.09499),
    "coco vqa": (658_104, 0.06422),
    "ocr-vqa": (1_002_146, 0.07925),
    "ok-vqa": (9_009, 0.00751),
    "a-okvqa": (17_056, 0.01034),
    "llava-150k dialogue": (394_276, 0.04971),
}
IMAGES = Preprocess(("image", "image_id"), 16)


def test_shares_by_square_root_are_the_published_ones():
    sizes, ratios = zip(*LAVIS_SETS.values(), strict=True)
    np.testing.assert_allclose(shares([1.0] * 11, sizes, 0.5), ratios, atol=5.1e-6)


def test_shares_by_size_by_weights_by_temperature_and_by_hand():
    np.testing.assert_allclose(shares([1, 1], [100, 300], 1.0), [0.25, 0.75])
    np.testing.assert_allclose(shares([3, 1], [100, 300], 0.0), [0.75, 0.25])
    np.testing.assert_allclose(shares([2, 1], [100, 400], 0.5), [0.5, 0.5])
    cubes = np.array([8.0, 27.0, 64.0])  # temperature 3
    np.testing.assert_allclose(shares([1] * 3, cubes, 1 / 3), np.array([2, 3, 4]) / 9)


class Sized(ShapesSource):
    """Any number of examples of any length, which tell their source by an offset in the id."""

    def __init__(self, size, offset=0):
        super().__init__("train", 16, size=min(size, 50))
        self.size, self.offset = size, offset

    def __len__(self):
        return self.size

    def without_images(self):
        return self

    def __getitem__(self, index):
        return {**super().__getitem__(index % 50), "image_id": self.offset + index}


def mix(sizes, weights, **kwargs):
    parts = [
        Part(Sized(size), IMAGES, name, share)
        for name, size, share in zip("abcdefghijk", sizes, weights)
    ]
    return TrainBatches(parts, **{"batch_size": 8, "seed": 3, **kwargs})


def take(number, *args, **kwargs):
    with mix(*args, **kwargs) as batches:
        found = [next(batches) for _ in range(number)]
        return found, batches.state(), batches.shares()


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for one, other in zip(batches, others):
        for field in one:
            np.testing.assert_array_equal(one[field], other[field])


def test_realised_shares_follow_the_wanted_ones():
    sizes, ratios = zip(*LAVIS_SETS.values(), strict=True)
    text_only = Preprocess(("image_id",), 16)
    parts = [
        Part(Sized(size), text_only, name, share)
        for (name, (size, share)) in LAVIS_SETS.items()
    ]
    with TrainBatches(parts, batch_size=500, seed=0) as batches:
        for _ in range(20):
            next(batches)
        found = batches.shares()
    assert sum(found.values()) == pytest.approx(1)
    for name, (_, ratio) in LAVIS_SETS.items():
        assert found[name] == pytest.approx(ratio, abs=2 / 10_000 + 0.01 * ratio)


def test_each_part_has_epochs_of_its_own():
    keys = [Part(None, None, name).key for name in "ab"]
    batches, state, _ = take(15, [10, 20], [0.5, 0.5])
    ids = np.concatenate([batch["image_id"] for batch in batches])
    unfolded = {
        part: {int(_fold(number ^ key)): number for number in range(size)}
        for part, key, size in zip("ab", keys, [10, 20])
    }
    of_a = [unfolded["a"][i] for i in ids.tolist() if i in unfolded["a"]]
    of_b = [unfolded["b"][i] for i in ids.tolist() if i in unfolded["b"]]
    assert len(of_a) == len(of_b) == 60  # no image of one is taken for one of the other
    epochs = [tuple(of_a[i : i + 10]) for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len(set(epochs)) == 6
    assert all(sorted(of_b[i : i + 20]) == list(range(20)) for i in range(0, 60, 20))
    assert state["drawn"] == {"a": 60, "b": 60}


def _fold(image_id):
    return (image_id ^ image_id >> 31 ^ image_id >> 62) & 0x7FFFFFFF


def test_another_part_does_not_change_the_order_of_the_first():
    alone, *_ = take(9, [10, 20], [0.5, 0.5])
    with_third, *_ = take(12, [10, 20, 5], [0.375, 0.375, 0.25])
    keys = [Part(None, None, name).key for name in "ab"]
    known = {int(_fold(n ^ key)) for key, size in zip(keys, [10, 20]) for n in range(size)}

    def order(batches, first):
        ids = np.concatenate([b["image_id"] for b in batches]).tolist()
        mine = {int(_fold(n ^ keys[first])) for n in range([10, 20][first])}
        return [i for i in ids if i in mine & known][:30]

    assert order(alone, 0) == order(with_third, 0)
    assert order(alone, 1) == order(with_third, 1)


@pytest.mark.parametrize("settings", [
    {"num_workers": 2}, {"batch_size": 4}, {"batch_size": 12, "num_workers": 1},
])  # fmt: skip
def test_a_mixture_goes_on_exactly(settings):
    sizes, weights = [7, 13, 5], [0.2, 0.5, 0.3]
    straight, state, _ = take(12, sizes, weights)
    _, half, _ = take(6, sizes, weights)
    number = 48 // settings.get("batch_size", 8)
    on, whole, _ = take(number, sizes, weights, start_example=48, counters=half, **settings)
    for field in ("image", "image_id"):
        np.testing.assert_array_equal(
            np.concatenate([b[field] for b in straight[6:]]),
            np.concatenate([b[field] for b in on]),
        )
    assert whole == state


def test_bad_samples_are_counted_and_judged_by_part():
    class Broken(Sized):
        def __getitem__(self, index):
            if index % 2:
                raise BadSample("corrupt image", "a test")
            return super().__getitem__(index)

    parts = [Part(Sized(500), IMAGES, "whole", 0.99), Part(Broken(40), IMAGES, "half", 0.01)]
    with TrainBatches(parts, batch_size=50, seed=0) as batches:
        with pytest.raises(RunStopped, match=r"of \d+ examples of half .*corrupt image") as stop:
            for _ in range(200):
                next(batches)
        # One in fifty of all is bad, which would pass: but half of those of one source are.
        assert batches.skipped.keys() == {"half/corrupt image"}
        assert batches.skipped.total() < 0.05 * batches.examined.total()
    assert "a test" in str(stop.value)


# From the config


def config_of(tmp_path, overrides=()):
    config = default_config("stage2")
    config.lock()
    for name, size in (("few", 10), ("many", 40)):
        rows = (
            {"image": f"{i}.png", "question": f"{name} {i}?", "answer": "yes"} for i in range(size)
        )
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    apply_overrides(config, [
        "config.batch_size=10",
        "config.data.num_workers=0",
        "config.data.max_words=0",
        "config.data.mixture_exponent=0.5",
        "config.data.prompt=Q: {} A:",
        f"config.data.mixture.few.train.source={tmp_path / 'few.jsonl'}",
        f"config.data.mixture.many.train.source={tmp_path / 'many.jsonl'}",
        "config.data.mixture.many.prompt=Say",
        "config.data.mixture.few.weight=2",
        *overrides,
    ])  # fmt: skip
    return config


def test_a_mixture_is_written_on_the_command_line(tmp_path):
    config = config_of(tmp_path, ["config.data.mixture.many.fields.captions=answer"])
    sources = run_sources.open_train_sources(config)
    assert [(each.name, len(each.source), each.share) for each in sources] == [
        ("few", 10, 0.5), ("many", 40, 0.5),
    ]  # fmt: skip
    assert list(lines(sources)) == ["Mixture: few 50.00% (10 examples), many 50.00% (40 examples)"]
    assert [each.config.data.prompt for each in sources] == ["Q: {} A:", "Say"]
    example = sources[1].source.without_images()[3]
    assert example["captions"] == ["yes"] and "instruction" not in example
    assert sources[0].source.has_instructions
    saved = json.loads(json.dumps(config.to_dict()))
    again = config_from_dict(saved)
    assert again.to_dict() == config.to_dict()
    assert isinstance(again.data.mixture.many.fields, ConfigDict)


def test_each_source_has_its_own_prompt(tmp_path):
    config = config_of(tmp_path)
    sources = run_sources.open_train_sources(config)
    tokenizer = run_tokenizers.run_tokenizer(config, tmp_path, sources)
    texts = Counter()
    fields = ("text_ids", "text_mask", "prompt_length")
    with inputs.train_batches(config, fields, sources, tokenizer, (0, 1), None) as batches:
        for batch in itertools.islice(batches, 10):
            for ids in batch["text_ids"]:
                texts[tokenizer.decode(ids, skip_special_tokens=True)] += 1
    ours = {text for text in texts if text.startswith("say")}
    assert ours == {"say yes"} and texts["say yes"] == 50
    others = {text for text in texts if text not in ours}
    assert others == {f"q : few {i}? a : yes" for i in range(10)}


@pytest.mark.parametrize("override, message", [
    ("config.data.mixture.few.vocab_size=7", "data.mixture.few.vocab_size is no field that a"),
    ("config.data.mixture.few.promt=7", "did you mean prompt?"),
    ("config.data.mixture.few.weight=much", "is no float"),
    ("config.data.mixture.few.weight=0", "weight=0.0"),
    ("config.data.mixture_exponent=-1", "mixture_exponent=-1.0"),
    ("config.data.train.source=other.jsonl", "'other.jsonl' is read by no source"),
    ("config.data.mixture.few=7", "is a section"),
    ("config.data.mixture.few.shuffle_block=3", "--config.data.mixture.few.shuffle_block=1"),
    ("config.data.mixture.other.prompt=a", "config.data.mixture.other names no source"),
])  # fmt: skip
def test_wrong_mixtures_are_refused(tmp_path, override, message):
    with pytest.raises(UserError) as error:
        run_sources.open_train_sources(config_of(tmp_path, [override]))
    assert message in str(error.value)


def test_a_source_has_its_own_templates(tmp_path):
    config = config_of(tmp_path, ["config.data.mixture.few.templates='{} one','{} two'"])
    few, many = run_sources.open_train_sources(config)
    assert few.config.data.templates == ("{} one", "{} two")
    assert many.config.data.templates == () and many.config.data.prompt == "Say"


def test_a_field_that_the_task_lacks_is_none_of_its_sources():
    config = default_config("blip_vqa").lock()
    with pytest.raises(UserError, match="no field 'data.templates'"):
        apply_overrides(config, ["config.data.mixture.few.templates=a"])


def test_a_section_leaves_the_rest_of_the_config_as_it_is(tmp_path):
    config = config_of(tmp_path)
    before = config.to_dict()
    of_few = configs_of_sources(config)["few"]
    assert of_few.data.train.source.endswith("few.jsonl") and of_few.data.max_words == 0
    assert config.to_dict() == before
