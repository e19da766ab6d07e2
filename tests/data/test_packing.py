"""Packed rows: what stands in them, how full they are, and where a run goes on."""

from __future__ import annotations

import itertools
import json
import pickle
from collections import Counter

import numpy as np
import pytest

from jaxblip.config import default_config
from jaxblip.data import inputs, run_sources, run_tokenizers
from jaxblip.data.captions import EachCaption
from jaxblip.data.packing import PackedSource, PackTexts, plan_rows
from jaxblip.data.preprocess import Preprocess
from jaxblip.data.samples import BadSample
from jaxblip.data.tokenizers import TextEncoder, train_wordpiece
from jaxblip.errors import RunStopped, UserError
from jaxblip.tasks import make_task

WORDS = [f"{letter}{digit}" for letter in "abcdefghij" for digit in range(5)]
ROW = 24


class Texts:
    """Texts of all lengths, one an image but for every fifth, which has two; some are bad."""

    has_instructions = True

    def __init__(self, size=60, bad=(), empty=(), longest=12):
        self.size, self.bad, self.empty, self.longest = size, bad, empty, longest

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index in self.bad:
            raise BadSample("unreadable row", f"row {index}")
        rng = np.random.default_rng(index)
        captions = [
            # The first word tells texts apart.
            " ".join([WORDS[index % 50], *rng.choice(WORDS, rng.integers(self.longest)), f"{n}"])
            for n in range(1 + (index % 5 == 0))
        ]
        if index in self.empty:
            captions = ["..."]
        return {
            "captions": captions,
            "image_id": index,
            "instruction": " ".join(WORDS[: index % 4]),
        }


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(WORDS + ["0 1 ask: say ? x"], 200)


def make_config(**data):
    config = default_config("language_model")
    config.batch_size = 4
    config.data.update(
        train={"source": "shapes:train"}, num_workers=0, packing=True, max_text_tokens=ROW, **data
    )
    return config


def use(monkeypatch, source):
    monkeypatch.setattr(run_sources, "open_source", lambda *args, **kwargs: source)


def take(config, tokenizer, number, position=None, process=(0, 1)):
    fields = make_task(run_tokenizers.with_vocabulary(config, tokenizer)).fields
    sources = run_sources.open_train_sources(config)
    settings = config, fields, sources, tokenizer, process, position
    with inputs.train_batches(*settings) as batches:
        taken = list(itertools.islice(batches, number))
        return {f: np.concatenate([b[f] for b in taken]) for f in fields} if taken else {}, batches


def texts_of(batch):
    """The tokens of each text of some rows."""
    rows = zip(batch["text_ids"], batch["segment_ids"], strict=True)
    return [
        tuple(ids[segments == number].tolist())
        for ids, segments in rows
        for number in range(1, segments.max() + 1)
    ]


def alone(source, tokenizer, prompt=""):
    """The tokens of each text in a row of its own."""
    encoder = TextEncoder(tokenizer, ROW, "language_model")
    good = set(range(len(source))) - set(source.bad) - set(source.empty)
    captions = [prompt + text for index in sorted(good) for text in source[index]["captions"]]
    return [tuple(ids[mask].tolist()) for ids, mask in zip(*encoder(captions), strict=True)]


def test_every_text_stands_once_an_epoch_in_a_row_like_in_one_of_its_own(
    monkeypatch, tokenizer, capsys
):
    source = Texts()
    use(monkeypatch, source)
    config = make_config()
    config.batch_size = 1
    _, batches = take(config, tokenizer, 0)
    expected = alone(source, tokenizer)
    line = capsys.readouterr().out
    rows = int(line.partition(" texts in ")[2].partition(" rows")[0])
    used = sum(map(len, expected)) / (rows * ROW)
    assert line == (
        f"Packing: {len(expected)} texts in {rows} rows of {ROW} tokens, {used:.1%} of the "
        "positions used.\n"
    )
    assert used > 0.95
    found, _ = take(config, tokenizer, 2 * rows)
    for epoch in range(2):
        part = {field: array[epoch * rows : (epoch + 1) * rows] for field, array in found.items()}
        assert Counter(texts_of(part)) == Counter(expected)
    assert found["text_mask"].mean() == pytest.approx(used)
    # No text is divided, padding stands at the end, and all fields agree.
    segments = found["segment_ids"]
    np.testing.assert_array_equal(found["text_mask"], segments > 0)
    assert (found["text_ids"][segments == 0] == tokenizer.pad_token_id).all()
    steps = np.diff(segments, axis=1)
    assert set(np.unique(steps[segments[:, 1:] > 0])) <= {0, 1} and (segments[:, 0] == 1).all()
    assert ((segments[:, 1:] == 0) | (segments[:, :-1] > 0)).all()
    first = found["text_ids"][:, 1:][steps == 1]
    assert (first == tokenizer.cls_token_id).all()
    order = [tuple(row.tolist()) for row in found["text_ids"]]
    assert order[:rows] != order[rows:]


@pytest.mark.parametrize("number", [1, 4, 9])
def test_going_on_is_exact_on_other_batches_workers_and_processes(monkeypatch, tokenizer, number):
    use(monkeypatch, Texts())
    config = make_config()
    straight, _ = take(config, tokenizer, 12)
    config.batch_size = 2
    _, batches = take(config, tokenizer, number)
    position = json.loads(json.dumps(batches.state()))
    config.batch_size, config.data.num_workers = 4, int(number == 9)
    left = (48 - 2 * number) // 4
    for index in range(2):
        part, _ = take(config, tokenizer, left, position, (index, 2))
        for field, array in straight.items():
            expected = array[2 * number : 2 * number + 4 * left][index::2]
            np.testing.assert_array_equal(part[field], expected)


def test_the_seed_decides_what_shares_a_row(monkeypatch, tokenizer):
    use(monkeypatch, Texts(longest=4))
    config = make_config()
    rows = []
    for config.seed in (1, 1, 2):
        found, _ = take(config, tokenizer, 1)
        rows.append(found["text_ids"].tolist())
    assert rows[0] == rows[1] != rows[2]


def test_a_text_that_is_too_long_fills_a_row_without_end_token(monkeypatch, tokenizer):
    source = Texts(size=6, longest=80)
    use(monkeypatch, source)
    config = make_config()
    config.batch_size = 1
    expected = alone(source, tokenizer)
    assert sum(len(text) == ROW and text[-1] != tokenizer.sep_token_id for text in expected) > 1
    sources = run_sources.open_train_sources(config)
    found, _ = take(config, tokenizer, 6)
    assert set(texts_of(found)) <= set(expected) and len(sources[0].source) == len(expected) == 8


@pytest.mark.parametrize("templates", [(), ("ask: {} ?", "say", "x {} ? ask: say")])
def test_rows_have_room_for_the_longest_prompt(monkeypatch, tokenizer, templates):
    source = Texts(size=40, empty=range(0, 40, 4))  # without a word in their instruction
    use(monkeypatch, source)
    config = make_config(prompt="say", templates=templates, max_bad_share=0.5)
    found, _ = take(config, tokenizer, 30)
    if not templates:
        assert set(texts_of(found)) == set(alone(source, tokenizer, "say "))
        return
    encoder = TextEncoder(tokenizer, ROW, "language_model")
    expected, drawn = {}, Counter()
    for index in set(range(40)) - set(source.empty):
        for caption in source[index]["captions"]:
            for number, template in enumerate(templates):
                prompt = template.replace("{}", source[index]["instruction"])
                ids, mask = encoder.row([f"{prompt} {caption}"])
                expected[tuple(ids[mask].tolist())] = number
    for text in texts_of(found):
        drawn[expected[text]] += 1  # whole: none was cut for lack of room
    assert len(drawn) == 3 and min(drawn.values()) > 0.25 * drawn.total()


def test_bad_texts_are_left_out_and_counted(monkeypatch, tokenizer, capsys):
    source = Texts(bad=(3, 11), empty=(7,))
    use(monkeypatch, source)
    found, batches = take(make_config(), tokenizer, 30)
    assert "; left out: unreadable row 2, empty caption 1.\n" in capsys.readouterr().out
    assert set(texts_of(found)) == set(alone(source, tokenizer)) and not batches.skipped
    with pytest.raises(RunStopped, match=r"3 of 72 texts were bad: unreadable row 2, empty "
                       r"caption 1, above data.max_bad_share=0.01; one of them: unreadable row "
                       r"\(row 3\)"):  # fmt: skip
        take(make_config(max_bad_share=0.01), tokenizer, 1)


def test_a_text_that_becomes_bad_costs_its_row(tokenizer):
    source = EachCaption(Texts(size=30))
    encoder = TextEncoder(tokenizer, ROW, "language_model")
    preprocess = Preprocess(("text_ids", "text_mask", "segment_ids"), encoder=encoder)
    packed, pack = PackedSource(source, preprocess, seed=0), PackTexts(preprocess)
    assert len(pickle.dumps(packed)) < 2000
    reasons = []
    source.examples.bad = [5]  # an image with two captions, which are in different rows
    for index in range(len(packed)):
        try:
            row = pack.texts(packed[index], np.random.default_rng(index))
        except BadSample as bad:
            reasons.append(bad.reason)
            continue
        assert [(array.shape, array.dtype.name) for array in row.values()] == [
            ((ROW,), "int32"), ((ROW,), "bool"), ((ROW,), "int32")
        ]  # fmt: skip
    assert reasons == ["unreadable row"] * 2


def test_rows_are_never_longer_than_planned(tokenizer):
    """Also where a text has become longer since."""
    encoder = TextEncoder(tokenizer, 6, "language_model")
    preprocess = Preprocess(("text_ids", "text_mask", "segment_ids"), encoder=encoder)
    texts = [{"captions": ["a1 a2 a3"]}, {"captions": ["b1 b2"]}]
    row = PackTexts(preprocess).texts({"texts": texts}, np.random.default_rng(0))
    assert row["segment_ids"].tolist() == [1] * 5 + [2] and row["text_mask"].all()
    assert row["text_ids"][5] == tokenizer.cls_token_id


@pytest.mark.parametrize(
    "capacity, shortest, longest, least",
    [(32, 1, 32, 0.99), (128, 9, 12, 0.99), (1024, 5, 60, 0.98), (12, 5, 5, 0.83)],
)
def test_rows_are_nearly_full(capacity, shortest, longest, least):
    rng = np.random.default_rng(0)
    for size in (0, 1, 7, 4000):
        lengths = rng.integers(shortest, longest + 1, size).astype(np.int32)
        lengths[::50] = 0
        rows = plan_rows(lengths, capacity, seed=1)
        placed = [text for row in rows for text in row]
        assert sorted(placed) == np.flatnonzero(lengths).tolist()
        filled = [lengths[row].sum() for row in rows]
        assert max(filled, default=0) <= capacity and all(rows)
    assert sum(filled) > least * capacity * len(rows)


def test_each_row_has_the_longest_text_and_is_filled_as_well_as_can_be():
    """By trying all sums of what is left."""
    rng = np.random.default_rng(3)
    for seed in range(20):
        capacity = int(rng.integers(10, 40))
        lengths = rng.integers(1, rng.integers(3, 11), 40)
        left = Counter(lengths.tolist())
        for row in plan_rows(lengths, capacity, seed):
            taken = Counter(lengths[row].tolist())
            longest = max(left)
            assert taken <= left and longest in taken
            sums = {longest}
            for length in (left - Counter([longest])).elements():
                sums |= {total + length for total in sums}
            assert lengths[row].sum() == max(total for total in sums if total <= capacity)
            left -= taken
        assert not left


def test_too_few_rows_and_blocks_are_refused(monkeypatch, tokenizer):
    use(monkeypatch, Texts(size=10, longest=2))
    config = make_config()
    config.batch_size = 12  # as many as there are texts
    with pytest.raises(UserError, match=r"fill 3 rows of data.max_text_tokens=24, fewer than "
                       r"batch_size=12.*batch_size to 3 or less"):  # fmt: skip
        take(config, tokenizer, 1)
    with pytest.raises(UserError, match="shuffle_block=2 .* where data.packing=True"):
        take(make_config(shuffle_block=2), tokenizer, 1)


def test_texts_of_a_mixture_keep_their_share(monkeypatch, tokenizer):
    """Long texts take more rows for the same share."""
    monkeypatch.setattr(
        run_sources,
        "open_source",
        lambda spec, **_: Texts(200, longest=18 if spec == "long" else 2),
    )
    config = make_config()
    config.data.train.source = ""
    with config.unlocked():
        config.data.mixture = {name: {"train": {"source": name}} for name in ("long", "short")}
    config.batch_size = 100
    found, _ = take(config, tokenizer, 3)
    lengths = np.array(list(map(len, texts_of(found))))
    # Of the short ones all have up to 7 tokens.
    assert 0.5 < np.mean(lengths <= 7) < 0.75
