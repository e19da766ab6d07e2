"""The text of an example: prompts, where a row is cut, and what carries a loss."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jaxblip.config import default_config, load_config
from jaxblip.data import inputs, run_sources, run_tokenizers
from jaxblip.data.preprocess import Preprocess
from jaxblip.data.samples import BadSample
from jaxblip.data.tokenizers import TextEncoder, train_wordpiece
from jaxblip.errors import UserError

CONFIG = Path(__file__).parents[2] / "configs" / "demo" / "stage2.py"
WORDS = [f"{letter}{digit}" for letter in "abcdefgh" for digit in range(4)]
# Of one, three and two tokens behind the start, and 2 more of the instruction.
TEMPLATES = ("say", "what is it", "{} ask")
TEXT = ("text_ids", "text_mask", "prompt_length")


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([*WORDS, "say what is it ask"] * 3, 200)


def words(rng, least, most):
    return " ".join(rng.choice(WORDS, rng.integers(least, most + 1)))


def tokens(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def arrays_of(preprocess, seed=0, captions=("a1 b2",), instruction="c3 d0"):
    example = {"captions": list(captions), "instruction": instruction, "image_id": 0}
    return preprocess(example, np.random.default_rng(seed), Counter())


def row(arrays, name="text"):
    return arrays[f"{name}_ids"][arrays[f"{name}_mask"]].tolist()


# Where a row is cut


@pytest.mark.parametrize("kind", ["language_model", "qformer"])
def test_a_text_is_cut_on_the_right_and_its_prompt_carries_no_loss(tokenizer, kind):
    """Whatever the lengths: what is behind `prompt_length` is the caption, from its first word."""
    rng = np.random.default_rng(0)
    at_the_limit = 0
    for trial in range(300):
        limit = int(rng.integers(3, 16))
        prompt, caption = words(rng, 0, 6), words(rng, 1, 8)
        encoder = TextEncoder(tokenizer, limit, kind)
        preprocess = Preprocess(TEXT, encoder=encoder, prompt=prompt)
        arrays = arrays_of(preprocess, trial, [caption])
        of_prompt, of_caption = tokens(tokenizer, prompt), tokens(tokenizer, caption)
        whole = [encoder.start_id, *of_prompt, *of_caption, encoder.stop_id]
        length = int(arrays["prompt_length"])
        assert length == (min(limit, 1 + len(of_prompt)) if prompt else 0)
        found = row(arrays)
        if len(whole) <= limit:
            assert found == whole  # with its end, also where it just fits
            at_the_limit += len(whole) == limit
        elif kind == "language_model":
            assert found == whole[:limit]  # without an end: it is not there that the text stops
        else:
            assert found == [*whole[: limit - 1], encoder.stop_id]
        if kind == "language_model":
            targets = found[length:] if prompt else found[1:]
            assert targets == [*of_caption, encoder.stop_id][: len(targets)]
            assert encoder.start_id not in targets
    assert at_the_limit > 5


def test_of_an_instruction_the_last_tokens_are_kept(tokenizer):
    """LLaVA's and InstructBLIP's way; the output behind it is cut on the right."""
    rng = np.random.default_rng(1)
    for trial in range(300):
        limit, of_instruction = int(rng.integers(6, 20)), int(rng.integers(2, 7))
        question, answer = words(rng, 1, 8), words(rng, 1, 8)
        encoder = TextEncoder(tokenizer, limit, "language_model")
        reader = TextEncoder(tokenizer, of_instruction + 1, "qformer", truncation="left")
        preprocess = Preprocess(
            (*TEXT, "instruction_ids", "instruction_mask"),
            encoder=encoder,
            prompt="{}",
            instruction_encoder=reader,
            max_instruction_tokens=of_instruction,
        )
        arrays = arrays_of(preprocess, trial, [answer], question)
        asked, answered = tokens(tokenizer, question), tokens(tokenizer, answer)
        kept = asked[-(of_instruction - 1) :]
        read = row(arrays, "instruction")
        assert read == [reader.start_id, *asked[-(of_instruction - 1) :], reader.stop_id]
        length = int(arrays["prompt_length"])
        assert row(arrays)[:length] == [encoder.start_id, *kept]
        targets = row(arrays)[length:]
        assert targets == [*answered, encoder.stop_id][: limit - length]


def test_input_and_text_of_an_encoder_are_the_two_ends_of_a_whole(tokenizer):
    """The input is cut on the left and the text on the right, away from where they meet."""
    rng = np.random.default_rng(2)
    places = set()
    for trial in range(300):
        limit, room = int(rng.integers(2, 12)), int(rng.integers(2, 12))
        prompt, caption = words(rng, 0, 4), words(rng, 1, 8)
        encoder = TextEncoder(tokenizer, limit, "language_model")
        encoder.start_id = None
        preprocess = Preprocess(
            ("text_ids", "text_mask", "input_ids", "input_mask"),
            encoder=encoder,
            prompt=prompt,
            max_input_tokens=room,
            prefix_lm=True,
        )
        arrays = arrays_of(preprocess, trial, [caption])
        read, text = row(arrays, "input"), row(arrays)
        assert read[-1] == encoder.stop_id and read.count(encoder.stop_id) == 1
        of_prompt, of_caption = tokens(tokenizer, prompt), tokens(tokenizer, caption)
        whole = [*of_prompt, *of_caption, encoder.stop_id]
        # Where the input ends: at least behind the prompt, at most before the last word.
        divisions = [
            place
            for place in range(len(of_prompt), len(whole) - 1)
            if [*whole[:place], encoder.stop_id][-room:] == read and whole[place:][:limit] == text
        ]
        assert divisions
        places.add(divisions[0] - len(of_prompt))
    assert len(places) > 5


# Several templates


def choose(tokenizer, **fields):
    encoder = TextEncoder(tokenizer, 16, "language_model")
    return Preprocess(TEXT, encoder=encoder, templates=TEMPLATES, **fields)


def test_every_template_is_drawn_and_its_length_known(tokenizer):
    preprocess, drawn = choose(tokenizer, prompt="never"), Counter()
    prompts = {"say": 2, "what is it": 4, "c3 d0 ask": 1 + len(tokens(tokenizer, "c3 d0 ask"))}
    for seed in range(300):
        arrays = arrays_of(preprocess, seed)
        length = int(arrays["prompt_length"])
        prompt = tokenizer.decode(row(arrays)[1:length])
        assert prompts[prompt] == length
        assert tokenizer.decode(row(arrays)[length:], skip_special_tokens=True) == "a1 b2"
        drawn[prompt] += 1
    assert len(drawn) == 3 and min(drawn.values()) > 70


def test_an_instruction_is_needed_where_any_template_has_a_place_for_it(tokenizer):
    for seed in range(5):
        with pytest.raises(BadSample, match="empty instruction"):
            arrays_of(choose(tokenizer), seed, instruction="...")
    fixed = Preprocess(TEXT, encoder=TextEncoder(tokenizer, 16, "qformer"), templates=TEMPLATES[:2])
    arrays_of(fixed, instruction="...")


def test_one_template_is_the_prompt_and_none_draws_nothing(tokenizer):
    """So that runs without templates see what they have always seen."""
    encoder = TextEncoder(tokenizer, 16, "language_model")
    captions = [f"{word} {word}" for word in WORDS]
    for seed in range(10):
        one = arrays_of(Preprocess(TEXT, encoder=encoder, templates=("say",)), seed, captions)
        other = arrays_of(Preprocess(TEXT, encoder=encoder, prompt="say"), seed, captions)
        for field in TEXT:
            np.testing.assert_array_equal(one[field], other[field])


def test_the_one_that_is_read_is_the_one_that_stands_before_the_text(tokenizer):
    """By the Q-Former of InstructBLIP, or the encoder of T5, and the language model alike."""
    reader = TextEncoder(tokenizer, 16, "qformer", truncation="left")
    asked = dataclasses.replace(
        choose(tokenizer, instruction_encoder=reader, max_instruction_tokens=16),
        fields=(*TEXT, "instruction_ids", "instruction_mask"),
    )
    divided = dataclasses.replace(
        choose(tokenizer, max_input_tokens=16),
        fields=("text_ids", "text_mask", "input_ids", "input_mask"),
    )
    seen = set()
    for seed in range(30):
        arrays = arrays_of(asked, seed)
        length = int(arrays["prompt_length"])
        assert row(arrays, "instruction")[1:-1] == row(arrays)[1:length]
        seen.add(length)
        arrays = arrays_of(divided, seed)
        prompt = tokenizer.decode(row(arrays, "input"), skip_special_tokens=True)
        assert prompt in ("say", "what is it", "c3 d0 ask")
        assert tokenizer.decode(row(arrays), skip_special_tokens=True) == "a1 b2"
    assert len(seen) > 1


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "asked.jsonl"
    lines = [{"image": f"{word}.png", "question": "c3 d0", "answer": word} for word in WORDS]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def make_config(path, **data):
    config = default_config("stage2")
    config.batch_size = 8
    config.data.train.source = path
    config.data.update(num_workers=0, templates=TEMPLATES, **data)
    return config


def take(config, tokenizer, number, position=None):
    sources = run_sources.open_train_sources(config)
    with inputs.train_batches(config, TEXT, sources, tokenizer, (0, 1), position) as batches:
        return list(itertools.islice(batches, number)), batches.state()


def test_the_template_belongs_to_the_example(tokenizer, path):
    """Drawn anew in each epoch, and the same whatever the workers and wherever the run begins."""
    config = make_config(path)
    straight, _ = take(config, tokenizer, 12)
    _, position = take(config, tokenizer, 5)
    config.data.num_workers = 1
    others, _ = take(config, tokenizer, 7, position)
    for one, other in zip(straight[5:], others, strict=True):
        for field in TEXT:
            np.testing.assert_array_equal(one[field], other[field])
    by_answer = {}
    for batch in straight:
        for ids, mask, length in zip(*(batch[field] for field in TEXT), strict=True):
            by_answer.setdefault(tokenizer.decode(ids[mask][length:]), []).append(int(length))
    assert len(by_answer) == len(WORDS) and set(map(len, by_answer.values())) == {3}
    assert sum(len(set(lengths)) > 1 for lengths in by_answer.values()) > 15


def test_a_tokenizer_is_trained_on_all_prompts(path, tmp_path):
    config = make_config(path, prompt="evaluated by")
    sources = run_sources.open_train_sources(config)
    vocabulary = set(run_tokenizers.run_tokenizer(config, tmp_path, sources).get_vocab())
    assert {"say", "what", "is", "it", "ask", "evaluated", "by", *WORDS} <= vocabulary
    config.data.templates = ()
    assert "ask" not in run_tokenizers.run_tokenizer(config, tmp_path, sources).get_vocab()


def test_generation_and_evaluation_keep_the_prompt(tokenizer, path):
    config = make_config(path, prompt="say")
    encoder = inputs.text_encoder(config, tokenizer)
    assert inputs.prompt_ids(config, encoder) == [encoder.start_id, *tokens(tokenizer, "say")]
    assert not run_sources.reads_instructions(config)


def test_templates_that_ask_for_what_is_not_there():
    config = make_config("shapes:train", prompt="say")
    with pytest.raises(UserError, match="have no instruction, which data.templates='{} ask' reads"):
        run_sources.open_train_sources(config)
    config.data.templates = TEMPLATES[:2]
    run_sources.open_train_sources(config)
    assert "templates" not in default_config("blip_vqa").data  # the question is read by itself


def test_templates_can_be_given_on_the_command_line():
    def templates(text):
        flag = f"config.data.templates={text}"
        return load_config(str(CONFIG), [flag]).data.templates

    assert templates("a photo of,a picture of {}") == ("a photo of", "a picture of {}")
    assert templates("'Short, please: {}','{} (briefly)'") == ("Short, please: {}", "{} (briefly)")
    assert templates("('with a, comma',)") == ("with a, comma",)
    assert templates("") == templates("()") == ()
