"""The input pipeline: exact positions, and bad samples."""

import dataclasses
import io
import itertools
import json
from collections import Counter

import grain
import numpy as np
import pytest
from PIL import Image

from jaxblip.data.draws import generator
from jaxblip.data.pipeline import Part, TrainBatches, _draws
from jaxblip.data.preprocess import Preprocess
from jaxblip.data.samples import BadSample
from jaxblip.data.shapes import ShapesSource
from jaxblip.data.sources import open_source
from jaxblip.data.tokenizers import TextEncoder, train_wordpiece
from jaxblip.errors import RunStopped


def photo(seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


SOURCE = ShapesSource("train", 24, size=20)
ALL = ("image", "text_ids", "text_mask", "image_id", "prompt_length")


@pytest.fixture(scope="module")
def encoder():
    texts = [c for i in range(20) for c in SOURCE[i]["captions"]] + ["a photo of"]
    return TextEncoder(train_wordpiece(texts, 300), 24, "qformer")


@pytest.fixture(scope="module")
def preprocess(encoder):
    # Everything random is on, so that a difference in any generator shows.
    return Preprocess(
        ALL, 24, encoder, prompt="a photo of ", flip_probability=0.5, randaugment=True
    )


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_draws_are_those_of_the_random_map_of_grain(preprocess, seed, block):
    """So they were from the first run on, and runs that go on must see what they would have."""
    each = [grain.MapDataset.range(j, 20, block).shuffle(seed=seed) for j in range(block)]
    grains = grain.MapDataset.mix(each).seed(seed).repeat()
    grains = grains.random_map(lambda index, rng: (index, rng.random(), int(rng.integers(99))))
    draws = _draws(Part(SOURCE, preprocess, shuffle_block=block), 3, seed)
    for place in (0, 1, 19, 20, 12345, 2**40):
        number, index, state = draws[place]
        rng = generator(state)
        assert (number, (index, rng.random(), int(rng.integers(99)))) == (3, grains[place])



def batches_of(source, preprocess, shuffle_block=1, **kwargs):
    return TrainBatches([Part(source, preprocess, shuffle_block=shuffle_block)], **kwargs)


def take(number, *args, **kwargs):
    with batches_of(*args, **kwargs) as batches:
        return list(itertools.islice(batches, number)), batches.state()


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for one, other in zip(batches, others):
        assert one.keys() == other.keys()
        for field in one:
            np.testing.assert_array_equal(one[field], other[field])


def rows(batches):
    """All examples of some batches, as one dict of arrays."""
    return {field: np.concatenate([b[field] for b in batches]) for field in batches[0]}


@pytest.fixture(scope="module")
def straight(preprocess):
    """Twelve batches of 4, more than two epochs of 20, made in one go."""
    return take(12, SOURCE, preprocess, batch_size=4, seed=7)[0]


def test_fields_have_their_shapes_and_types(straight, preprocess):
    shapes = {field: (array.shape, array.dtype.name) for field, array in straight[0].items()}
    assert shapes == {
        "image": ((4, 24, 24, 3), "uint8"),
        "text_ids": ((4, 24), "int32"),
        "text_mask": ((4, 24), "bool"),
        "image_id": ((4,), "int32"),
        "prompt_length": ((4,), "int32"),
    }
    assert all(type(array) is np.ndarray for array in straight[0].values())
    assert (straight[0]["prompt_length"] == 4).all()  # [CLS] a photo of


def test_every_epoch_shows_everything_once_in_an_order_of_its_own(straight):
    ids = rows(straight)["image_id"]
    epochs = ids[:20], ids[20:40]
    for epoch in epochs:
        assert sorted(epoch) == list(range(20))
    assert list(epochs[0]) != list(epochs[1])
    assert list(range(20)) not in (list(epochs[0]), list(epochs[1]))


@pytest.mark.parametrize("block", [2, 4])
def test_neighbours_keep_together_in_blocks(preprocess, block):
    batches, _ = take(12, SOURCE, preprocess, batch_size=5, seed=3, shuffle_block=block)
    ids = rows(batches)["image_id"]
    first = ids[::block]
    np.testing.assert_array_equal(ids.reshape(-1, block), first[:, None] + np.arange(block))
    epochs = first.reshape(3, -1).tolist()
    for epoch in epochs:
        assert sorted(epoch) == list(range(0, 20, block))
    assert len({*map(tuple, epochs)}) == 3


def test_an_example_is_augmented_anew_in_each_epoch(straight):
    everything = rows(straight)
    same = 0
    for image_id in range(20):
        first, second = np.flatnonzero(everything["image_id"] == image_id)[:2]
        same += np.array_equal(everything["image"][first], everything["image"][second])
    assert same == 0


def test_captions_of_an_image_are_all_drawn(preprocess):
    one = ShapesSource("train", 24, size=1)
    batches, _ = take(10, one, preprocess, batch_size=20, seed=0)
    counts = Counter(map(tuple, rows(batches)["text_ids"]))
    assert len(counts) == 4 and min(counts.values()) > 25


def test_the_seed_decides(straight, preprocess):
    assert_equal(straight[:3], take(3, SOURCE, preprocess, batch_size=4, seed=7)[0])
    other = take(3, SOURCE, preprocess, batch_size=4, seed=8)[0]
    assert not np.array_equal(rows(straight[:3])["image_id"], rows(other)["image_id"])


@pytest.mark.parametrize("number", [1, 5, 7])  # within, at the end of, and after an epoch
def test_going_on_is_exact(straight, preprocess, number):
    _, state = take(number, SOURCE, preprocess, batch_size=4, seed=7)
    state = json.loads(json.dumps(state))
    assert state["examples_seen"] == 4 * number
    more, _ = take(
        12 - number, SOURCE, preprocess, batch_size=4, seed=7,
        start_example=state["examples_seen"], counters=state,
    )  # fmt: skip
    assert_equal(straight[number:], more)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing_also_when_going_on(straight, preprocess, num_workers):
    batches, state = take(
        9, SOURCE, preprocess, batch_size=4, seed=7, start_example=12, num_workers=num_workers
    )
    assert_equal(straight[3:], batches)
    assert state["examples_seen"] == 48
    assert all(type(array) is np.ndarray for array in batches[0].values())


def test_another_batch_size_sees_the_same_examples(straight, preprocess):
    batches, _ = take(4, SOURCE, preprocess, batch_size=10, seed=7, start_example=8)
    assert_equal([rows(straight[2:])], [rows(batches)])


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_each_global_batch(straight, preprocess, process_count):
    parts = []
    for process_index in range(process_count):
        batches, state = take(
            10, SOURCE, preprocess, batch_size=4, seed=7, start_example=8,
            process_index=process_index, process_count=process_count,
        )  # fmt: skip
        parts.append(batches)
        assert state["examples_seen"] == 48  # global
        assert len(batches[0]["image_id"]) == 4 // process_count
    for step, batch in enumerate(straight[2:]):
        for process_index in range(process_count):
            for field, array in parts[process_index][step].items():
                np.testing.assert_array_equal(array, batch[field][process_index::process_count])


def test_processes_must_divide_the_batch(preprocess):
    with pytest.raises(ValueError, match="3 processes do not divide batch_size=4"):
        batches_of(SOURCE, preprocess, batch_size=4, seed=0, process_count=3)


@dataclasses.dataclass(frozen=True)
class Broken:
    """Shapes of which some are bad, in a way of choice."""

    size: int = 40
    bad: frozenset = frozenset()
    error: Exception = BadSample("corrupt image", "a test")

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index in self.bad:
            raise self.error
        return ShapesSource("train", 24, size=self.size)[index]


# Instructions


COLOURS = "red orange yellow green cyan blue purple".split()


class Asked(ShapesSource):
    """Shapes with an instruction each, some long and one empty, and captions of unequal weight."""

    def __getitem__(self, index):
        words = [COLOURS[index % 7], *("circle square ring".split() * (index % 3))]
        captions = ["large blue", "small red", "small red", "small red"]
        return super().__getitem__(index) | {
            "instruction": "" if index == 13 else f"What? A {' '.join(words)}",
            "captions": [f"{caption} {COLOURS[index % 7]}" for caption in captions],
        }

    def without_images(self):
        return self


ASKED = Asked("train", 24, size=20)
ASKING = ("text_ids", "text_mask", "prompt_length", "instruction_ids", "instruction_mask")


@pytest.fixture(scope="module")
def asking(encoder):
    """An instruction of up to 8 tokens here, and up to 6 in front of its text."""
    texts = [" ".join(COLOURS), "circle square ring", "what ? a : large small red blue"]
    wordpiece = train_wordpiece(texts, 300)
    return Preprocess(
        (*ASKING, "image_id"),
        encoder=TextEncoder(wordpiece, 16, "language_model"),
        prompt="ask: {} ?",
        instruction_encoder=TextEncoder(wordpiece, 8, "qformer", truncation="left"),
        max_instruction_tokens=6,
    ), wordpiece


def test_each_text_stands_behind_the_instruction_of_its_example(asking):
    preprocess, wordpiece = asking
    everything = rows(take(30, ASKED, preprocess, batch_size=10, seed=5, max_bad_share=1.0)[0])
    assert set(everything["image_id"].tolist()) == set(range(20)) - {13}
    lengths, outputs = set(), Counter()
    for row, index in enumerate(everything["image_id"].tolist()):
        ids, mask = everything["instruction_ids"][row], everything["instruction_mask"][row]
        colour, repeats = COLOURS[index % 7], index % 3
        words = f"ask: what? a {colour} {'circle square ring ' * repeats}?"
        tokens = wordpiece(words, add_special_tokens=False).input_ids
        assert ids[mask].tolist() == [2, *tokens[-6:], 3]
        assert not ids[~mask].any() and (mask == (np.arange(8) < mask.sum())).all()
        text, counts = everything["text_ids"][row], everything["text_mask"][row]
        length = everything["prompt_length"][row]
        assert text[:length].tolist() == [2, *tokens[-5:]]
        output = wordpiece.decode(text[counts][length:], skip_special_tokens=True)
        assert output.endswith(f" {colour}") and text[counts][-1] == 3
        outputs[output.removesuffix(f" {colour}")] += 1
        lengths.add(int(length))
    assert max(lengths) == 6 and set(outputs) == {"large blue", "small red"}
    assert 2 < outputs["small red"] / outputs["large blue"] < 4.5  # repeats are weights


def test_the_position_is_exact_with_instructions_too(asking):
    preprocess, _ = asking
    settings = dict(batch_size=4, seed=7, max_bad_share=1.0)
    straight, state = take(12, ASKED, preprocess, **settings)
    assert state["skipped"] == {"empty instruction": state["examined"][""] - 48}
    on, _ = take(7, ASKED, preprocess, start_example=20, num_workers=1, **settings)
    assert_equal(straight[5:], on)
    for index in range(2):
        part, _ = take(
            7, ASKED, preprocess, start_example=20, process_index=index, process_count=2, **settings
        )
        halves = [{field: x[index::2] for field, x in batch.items()} for batch in straight[5:]]
        assert_equal(halves, part)


def test_an_instruction_alone_stands_in_no_text(asking, encoder):
    """Where the prompt is empty, one part of the task reads the instruction, another the text."""
    preprocess, _ = asking
    batches, _ = take(
        2, ASKED, dataclasses.replace(preprocess, prompt=""), batch_size=4, seed=0, max_bad_share=1
    )
    asked = rows(batches)
    assert not asked["prompt_length"].any() and set(asked["text_mask"].sum(axis=1)) == {5}
    assert (asked["instruction_mask"].sum(axis=1) > 4).all()


def test_a_prompt_without_a_place_is_the_instruction_of_all(asking):
    preprocess, wordpiece = asking
    fixed = dataclasses.replace(preprocess, prompt="what?")
    ids = rows(take(2, SOURCE, fixed, batch_size=4, seed=0)[0])["instruction_ids"]
    assert (ids[:, :4] == wordpiece("what?").input_ids).all()


def test_text_tasks_never_ask_for_an_image(encoder):
    class NoPicture(ShapesSource):
        def _render(self, scene, rng):
            raise AssertionError("drawn for a task on text")

    preprocess = Preprocess(("text_ids", "text_mask"), encoder=encoder)
    batches, _ = take(2, NoPicture("train", 24, size=8), preprocess, batch_size=4, seed=0)
    assert set(batches[0]) == {"text_ids", "text_mask"}


def test_bad_samples_are_replaced_and_counted(preprocess):
    bad = frozenset({3, 17})
    source = Broken(bad=bad)
    arguments = dict(batch_size=8, seed=1, max_bad_share=0.5)
    batches, state = take(20, source, preprocess, **arguments)
    ids = rows(batches)["image_id"]
    assert len(ids) == 160 and not bad & set(ids.tolist())
    # Four epochs of 40, each of which meets both; a replacement may be bad again.
    assert 8 <= state["skipped"]["corrupt image"] < 16
    assert state["examined"][""] == 160 + state["skipped"]["corrupt image"]
    # The same again, with the counts carried over a stop.
    first, half = take(9, source, preprocess, **arguments)
    second, whole = take(
        11, source, preprocess, **arguments, start_example=72, counters=half, num_workers=1
    )
    assert_equal(batches, first + second)
    assert whole == state


def test_too_many_bad_samples_stop_the_run(preprocess):
    source = Broken(bad=frozenset(range(0, 40, 10)))
    with batches_of(source, preprocess, batch_size=8, seed=1) as batches:
        with pytest.raises(RunStopped) as caught:
            for _ in range(50):
                next(batches)
        assert 32 <= batches.examples_seen <= 40  # once as many as the set has were examined
    message = str(caught.value)
    bad, examined = batches.skipped["corrupt image"], batches.examined[""]
    assert f"{bad} of {examined} examples ({bad / examined:.1%}) were bad" in message
    assert f"corrupt image {bad}" in message and "data.max_bad_share=0.05" in message
    assert "a test" in message


@pytest.mark.parametrize("num_workers", [0, 1])
def test_only_bad_samples_end_at_once(preprocess, num_workers):
    source = Broken(bad=frozenset(range(40)))
    with batches_of(
        source, preprocess, batch_size=2, seed=1, num_workers=num_workers, max_bad_share=1.0
    ) as batches:
        with pytest.raises(RunStopped, match=r"200 of 20\d examples .* were bad: corrupt image"):
            next(batches)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_defects_of_the_program_are_not_taken_for_bad_data(preprocess, num_workers):
    source = Broken(bad=frozenset({5}), error=ZeroDivisionError("a defect"))
    with batches_of(source, preprocess, batch_size=8, seed=1, num_workers=num_workers) as batches:
        with pytest.raises(ZeroDivisionError, match="a defect"):
            for _ in range(50):
                next(batches)


def jsonl(path):
    return open_source(str(path), image_size_px=24)


def test_images_and_captions_of_all_kinds_from_a_jsonl(tmp_path, preprocess):
    grey = Image.fromarray(photo()).convert("L")
    files = {
        "good.png": encode(Image.fromarray(photo())),
        "grey.png": encode(grey),
        "cmyk.jpg": encode(Image.fromarray(photo()).convert("CMYK"), "JPEG"),
        "corrupt.png": b"nothing",
        "empty.png": b"",
        "large.png": encode(Image.new("RGB", (300, 300))),
    }
    lines = [{"image": "missing.png", "caption": "a"}, {"image": "good.png", "caption": " ... "}]
    for number, (name, data) in enumerate(files.items(), start=1):
        (tmp_path / name).write_bytes(data)
        lines.append({"image": name, "captions": ["", "a red circle", "!"], "id": number})
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    limited = dataclasses.replace(preprocess, max_image_pixels=50_000)
    batches, state = take(
        20, jsonl(path), limited, batch_size=8, seed=0, max_bad_share=0.9
    )
    everything = rows(batches)
    assert set(everything["image_id"].tolist()) == {1, 2, 3}  # good, grey and cmyk
    words = limited.encoder([limited.prompt + "a red circle"])[0][0]
    assert (everything["text_ids"] == words).all()  # never one of the empty captions
    assert set(state["skipped"]) == {
        "missing image", "empty caption", "corrupt image", "zero-size image", "gigantic image"
    }  # fmt: skip
    assert set(state["converted"]) == {"converted grayscale", "converted CMYK"}
    json.dumps(state)
    with batches_of(jsonl(path), limited, batch_size=8, seed=0) as stopped:
        with pytest.raises(RunStopped, match="missing image"):
            for _ in range(50):
                next(stopped)


def test_all_image_files_missing_names_one(tmp_path, preprocess):
    path = tmp_path / "data.jsonl"
    path.write_text('{"image": "wrong/folder/1.png", "caption": "a"}\n')
    with batches_of(jsonl(path), preprocess, batch_size=2, seed=0) as batches:
        with pytest.raises(RunStopped, match=r"missing image \(.*wrong/folder/1\.png"):
            next(batches)


def test_preprocess_refuses_what_it_cannot_make(encoder):
    with pytest.raises(ValueError, match="pixels"):
        Preprocess(("pixels",), encoder=encoder)
    with pytest.raises(ValueError, match="encoder"):
        Preprocess(("image", "text_ids"))
    with pytest.raises(ValueError, match="encoder for the instruction"):
        Preprocess(("text_ids", "instruction_ids"), encoder=encoder)
