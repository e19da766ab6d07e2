"""What a language model with an encoder is given: captions divided for a prefix LM."""

from __future__ import annotations

import functools
import itertools
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from jaxblip.config import default_config
from jaxblip.data import inputs, run_sources, run_tokenizers
from jaxblip.data.mixture import TrainSource
from jaxblip.data.pipeline import Part, TrainBatches
from jaxblip.data.preprocess import Preprocess, input_tokens
from jaxblip.data.shapes import ShapesSource
from jaxblip.data.tokenizers import save_tokenizer, train_wordpiece
from jaxblip.errors import RunStopped, UserError
from jaxblip.tasks import make_task

SOURCE = ShapesSource("train", 24, size=40)
CAPTIONS = [caption for i in range(len(SOURCE)) for caption in SOURCE[i]["captions"]]
FIELDS = ("text_ids", "text_mask", "input_ids", "input_mask")
PROMPT = "a photo of "
LENGTH = 32


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([PROMPT + caption for caption in CAPTIONS], 300)


def make_config(task="stage2", language_model="t5", **data):
    config = default_config(task, language_model=language_model)
    config.data.update(num_workers=0, max_text_tokens=LENGTH, **data)
    if language_model == "t5":
        config.data.max_input_tokens = LENGTH
    config.batch_size = 20
    return config


def sources_of(config):
    return [TrainSource("", config, SOURCE, 1.0)]


def take(config, tokenizer, number=10, fields=FIELDS, position=None):
    settings = (config, fields, sources_of(config), tokenizer, (0, 1), position)
    with inputs.train_batches(*settings) as batches:
        return list(itertools.islice(batches, number))


def rows(batches):
    return {field: np.concatenate([b[field] for b in batches]) for field in batches[0]}


def texts(tokenizer, batch, part):
    """The words of each row; the end token must be there, once and last."""
    found = []
    for ids, mask in zip(batch[f"{part}_ids"], batch[f"{part}_mask"], strict=True):
        tokens = ids[mask].tolist()
        assert tokens[-1] == tokenizer.sep_token_id
        assert not set(tokens[:-1]) & {tokenizer.sep_token_id, tokenizer.cls_token_id}
        assert (ids[~mask] == tokenizer.pad_token_id).all()
        found.append(tokenizer.decode(tokens[:-1]))
    return found


def test_a_caption_is_divided_at_a_random_word(tokenizer):
    batch = rows(take(make_config(), tokenizer))
    before, behind = (texts(tokenizer, batch, part) for part in ("input", "text"))
    shares = []
    for first, rest in zip(before, behind, strict=True):
        assert f"{first} {rest}".strip() in CAPTIONS and rest
        count = len(first.split())
        shares.append(count / (count + len(rest.split())))
    # Every place from before the first word to before the last one.
    assert min(shares) == 0 and max(shares) >= 0.75
    assert 0.3 < np.mean(shares) < 0.5 and len(set(shares)) > 5
    assert 10 < shares.count(0) < 60  # of 200


def test_the_encoder_reads_the_prompt_as_well(tokenizer):
    batch = rows(take(make_config(prompt=PROMPT), tokenizer))
    before, behind = (texts(tokenizer, batch, part) for part in ("input", "text"))
    for first, rest in zip(before, behind, strict=True):
        assert first.startswith("a photo of")
        assert f"{first} {rest}".removeprefix(PROMPT) in CAPTIONS


@pytest.mark.parametrize("prompt", ["", PROMPT])
def test_without_prefix_lm_the_encoder_reads_the_prompt_alone(tokenizer, prompt):
    config = make_config(prompt=prompt)
    config.loss.prefix_lm = False
    batch = rows(take(config, tokenizer, 2))
    assert set(texts(tokenizer, batch, "text")) <= set(CAPTIONS)
    encoder = inputs.text_encoder(config, tokenizer)
    expected = inputs.prompt_ids(config, encoder)  # what generation begins with
    assert expected[-1] == tokenizer.sep_token_id
    for ids, mask in zip(batch["input_ids"], batch["input_mask"], strict=True):
        assert ids[mask].tolist() == expected


def test_the_division_belongs_to_the_example(tokenizer):
    """Whatever the workers, and wherever the run begins."""
    config = make_config()
    straight = take(config, tokenizer, 6)
    config.data.num_workers = 2
    position = {"examples_seen": 40, "sizes": {"": len(SOURCE)}}
    others = straight[:2] + take(config, tokenizer, 4, position=position)
    for one, other in zip(straight, others, strict=True):
        for field in FIELDS:
            np.testing.assert_array_equal(one[field], other[field])
    config.seed += 1
    assert not np.array_equal(take(config, tokenizer, 1)[0]["input_ids"], straight[0]["input_ids"])


def test_a_source_of_another_size_is_no_place_to_go_on(tokenizer):
    config = make_config()
    settings = (config, FIELDS, sources_of(config), tokenizer, (0, 1))
    with inputs.train_batches(*settings, None) as batches:
        next(batches)
        position = batches.state()
    with inputs.train_batches(*settings, position):
        pass
    position["sizes"][""] += 1
    with pytest.raises(UserError, match=r"data.train.source had 41 examples .* and has 40 now"):
        inputs.train_batches(*settings, position)


def test_a_caption_is_divided_anew_in_each_epoch(tokenizer):
    one = ShapesSource("train", 24, size=1)
    config = make_config()
    sources = [TrainSource("", config, one, 1.0)]
    with inputs.train_batches(config, FIELDS, sources, tokenizer, (0, 1), None) as batches:
        batch = next(batches)
    assert len(set(map(bytes, batch["input_ids"]))) > 4


def test_captions_that_follow_each_other_are_divided_together(tokenizer):
    config = make_config("language_model", captions_per_text=2, max_words=4)
    config.data.max_text_tokens = config.data.max_input_tokens = 64
    encoder = inputs.text_encoder(config, tokenizer)
    cut = [" ".join(caption.split(" ")[:4]) for caption in CAPTIONS]
    seen = set()
    for batch in take(config, tokenizer, 5):
        for row in range(config.batch_size):
            before, behind = (
                batch[f"{part}_ids"][row][batch[f"{part}_mask"][row]].tolist()
                for part in ("input", "text")
            )
            end = encoder.stop_id
            assert before[-1] == behind[-1] == end
            whole = [before.count(end), behind.count(end)]
            # Two captions: the first divided, or its words with their end before the second's.
            assert whole in ([1, 2], [1, 1], [2, 1])
            words = tokenizer.decode(before, skip_special_tokens=True).split()
            words += tokenizer.decode(behind, skip_special_tokens=True).split()
            assert any(" ".join(words).startswith(caption) for caption in cut)
            seen.add(tuple(whole))
    assert {(1, 2), (2, 1)} <= seen


def test_a_long_input_keeps_what_is_next_to_the_text(tokenizer):
    config = make_config()
    encoder = inputs.text_encoder(config, tokenizer)
    whole = input_tokens(encoder, [CAPTIONS[0]], 100)
    assert input_tokens(encoder, [CAPTIONS[0]], 3) == whole[-3:]
    assert input_tokens(encoder, [""], 3) == input_tokens(encoder, [" "], 3) == [encoder.stop_id]
    assert input_tokens(encoder, [CAPTIONS[0], ""], 100) == whole


def test_only_a_model_without_encoder_has_a_beginning_in_its_text(tokenizer):
    for language_model, start in (("opt", tokenizer.cls_token_id), ("t5", None)):
        config = make_config(language_model=language_model, prompt=PROMPT)
        encoder = inputs.text_encoder(config, tokenizer)
        ids, _ = encoder.row(["a"])
        assert encoder.start_id == start and (start in ids) == (start is not None)
        prompt = inputs.prompt_ids(config, encoder)
        assert (prompt[0] == start) == (start is not None)
        assert (prompt[-1] == encoder.stop_id) == (start is None)


def test_the_decoder_starts_with_the_padding_token(tokenizer):
    config = make_config()
    assert config.model.language_model.start_token_id == -1
    filled = run_tokenizers.with_vocabulary(config, tokenizer).model.language_model
    assert filled.start_token_id == tokenizer.pad_token_id
    assert filled.vocab_size == len(tokenizer)
    config.model.language_model.start_token_id = 3
    filled = run_tokenizers.with_vocabulary(config, tokenizer)
    assert filled.model.language_model.start_token_id == 3


def test_dividing_needs_an_encoder():
    with pytest.raises(ValueError, match="need an encoder"):
        Preprocess(("input_ids",))


def test_what_is_not_divided_is_drawn_as_before(tokenizer):
    """The generator of an example gives the same images and captions to the other models."""
    config = make_config(language_model="opt")
    batch = take(config, tokenizer, 1, fields=("text_ids", "image"))[0]
    preprocess = Preprocess(
        ("text_ids", "image"), encoder=inputs.text_encoder(config, tokenizer), image_size_px=224
    )
    with TrainBatches([Part(SOURCE, preprocess)], batch_size=20, seed=config.seed) as batches:
        expected = next(batches)
    for field, array in expected.items():
        np.testing.assert_array_equal(batch[field], array)


# Instructions

ASKED = [
    {"question": "What Is It?", "answers": ["A Cat.", "A Cat."]},
    {"instruction": "Say: what is left of the red circle", "output": "It."},
] * 10  # as many as a batch


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "asked.jsonl"
    path.write_text("".join(json.dumps(line | {"image": "a.png"}) + "\n" for line in ASKED))
    return str(path)


def instruct_config(language_model, path, **data):
    config = make_config("instruct", language_model, **data)
    config.data.train.source = path
    config.data.update(max_instruction_tokens=10)
    if language_model == "t5":
        config.data.max_input_tokens = 8
    return config.lock()


@pytest.mark.parametrize("language_model", ["opt", "t5"])
def test_an_instruction_is_read_by_both_and_before_its_output(tokenizer, asked, language_model):
    config = instruct_config(language_model, asked)
    fields = make_task(run_tokenizers.with_vocabulary(config, tokenizer, tokenizer)).fields[1:]
    sources = run_sources.open_train_sources(config)
    encoder = inputs.text_encoder(config, tokenizer)
    other = train_wordpiece(["what is it say left of the red circle ? :"], 300)
    settings = (config, fields, sources, tokenizer, (0, 1), None, other)
    with inputs.train_batches(*settings) as batches:
        batch = next(batches)
    seen = set()
    for row in range(config.batch_size):
        instruction = batch["instruction_ids"][row][batch["instruction_mask"][row]].tolist()
        text = batch["text_ids"][row][batch["text_mask"][row]].tolist()
        line = next(
            line for line in ASKED
            for words in [line.get("question") or line["instruction"]]
            if other(words).input_ids[-len(instruction) + 1 :] == instruction[1:]
        )  # fmt: skip
        words = line.get("question") or line["instruction"]
        output = "A Cat." if "question" in line else "It."
        assert instruction == other(words, truncation=False).input_ids[:1] + instruction[1:]
        assert len(instruction) <= 10
        prompt = inputs.prompt_ids(config, encoder, words)  # what generation begins with
        answer = [*tokenizer(output, add_special_tokens=False).input_ids, encoder.stop_id]
        if language_model == "t5":
            assert batch["input_ids"][row][batch["input_mask"][row]].tolist() == prompt
            assert len(prompt) <= 8 and text == answer
        else:
            assert text == prompt + answer and batch["prompt_length"][row] == len(prompt) <= 10
            assert prompt[0] == encoder.start_id
        seen.add(words)
    assert len(seen) == 2


def test_a_source_without_instructions_is_refused(asked):
    for task, fields in (
        ("instruct", {}),
        ("blip_vqa", {}),
        ("stage2", {"prompt": "Question: {} Answer:"}),
    ):
        config = make_config(task, "opt", train={"source": "shapes:train"}, **fields)
        reader = "blip_vqa" if task == "blip_vqa" else "data.prompt='"
        for which in ("train", "source"):
            config.eval.source = "shapes:heldout"
            read = run_sources.open_train_sources if which == "train" else run_sources.read_eval_set
            with pytest.raises(UserError) as error:
                read(config)
            assert f"have no instruction, which {reader}" in str(error.value)
        config.data.train.source = asked
        run_sources.open_train_sources(config)
    source = {"source": "shapes:train"}
    config = make_config("instruct", "opt", train=source, prompt="What is there?")
    run_sources.open_train_sources(config)  # one instruction for all


def test_fewer_examples_than_a_batch_are_no_training_set(asked):
    config = make_config("stage2", "opt", train={"source": asked})
    config.eval.source = asked
    assert len(run_sources.open_train_sources(config)[0].source) == config.batch_size == 20
    config.batch_size = 21
    with pytest.raises(UserError) as error:
        run_sources.open_train_sources(config)
    assert f"{asked} has 20 examples, fewer than batch_size=21" in str(error.value)
    assert "set --config.batch_size to 20 or less" in str(error.value)
    with pytest.raises(RunStopped, match="missing image 20"):  # that is all: there is no picture
        run_sources.read_eval_set(config)


def test_the_question_stands_in_the_prompt_of_stage2(tokenizer, asked):
    config = make_config("stage2", "opt", train={"source": asked}, prompt="a {} of")
    sources = run_sources.open_train_sources(config)
    fields = ("text_ids", "text_mask", "prompt_length")
    with inputs.train_batches(config, fields, sources, tokenizer, (0, 1), None) as batches:
        batch = next(batches)
    found = {tokenizer.decode(ids[mask], skip_special_tokens=True)
             for ids, mask in zip(batch["text_ids"], batch["text_mask"], strict=True)}  # fmt: skip
    encode = functools.partial(tokenizer, add_special_tokens=False)
    expected = [
        "a what is it? of a cat",  # questions and answers are cleaned
        "a say what is left of the red circle of it",
    ]
    assert found == {tokenizer.decode(encode(text).input_ids, True) for text in expected}
    lengths = {1 + len(encode(text.rpartition(" of ")[0] + " of").input_ids) for text in expected}
    assert set(batch["prompt_length"].tolist()) == lengths


def test_a_q_former_that_reads_has_a_tokenizer_of_its_own(tokenizer, asked, tmp_path):
    config = instruct_config("opt", asked)
    sources = run_sources.open_train_sources(config)
    other = make_config("stage2", "opt")
    assert run_tokenizers.run_qformer_tokenizer(other, tmp_path, sources) is None
    words = {"[DEC]", "Say", "say", "what"}
    trained = run_tokenizers.run_qformer_tokenizer(config, tmp_path, sources)
    assert words - set(trained.get_vocab()) == {"Say"} and "sit" not in trained.get_vocab()
    # That of stage 1, which is a Q-Former's; not that of stage 2, which is a language model's.
    for task in ("stage1", "stage2"):
        (tmp_path / task).mkdir()
        (tmp_path / task / "config.json").write_text(json.dumps({"task": task}))
        save_tokenizer(tokenizer, tmp_path / task / run_tokenizers.TOKENIZER_FOLDER)
        with config.unlocked():
            config.init.qformer = str(tmp_path / task)
        taken = run_tokenizers.run_qformer_tokenizer(config, tmp_path, sources).get_vocab()
        assert (taken == tokenizer.get_vocab()) == (task == "stage1")
        of_text = run_tokenizers.run_tokenizer(config, tmp_path, sources)
        assert of_text.get_vocab() != tokenizer.get_vocab()
    # What is named counts more; [DEC] is added where the vocabulary has room for it.
    bare = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]")),
        pad_token="[PAD]", unk_token="[UNK]",
    )  # fmt: skip
    save_tokenizer(bare, tmp_path / "named")
    with config.unlocked():
        config.data.qformer_tokenizer = str(tmp_path / "named")
    assert len(run_tokenizers.run_qformer_tokenizer(config, tmp_path, sources)) == 3
    with config.unlocked():
        config.model.qformer.vocab_size = 2
    named = run_tokenizers.run_qformer_tokenizer(config, tmp_path, sources)
    assert len(named) == 2
    filled = run_tokenizers.with_vocabulary(config, tokenizer, named)
    assert (filled.model.qformer.vocab_size, filled.model.language_model.vocab_size) == (
        2, len(tokenizer),
    )  # fmt: skip
    # A run that goes on has both.
    run_tokenizers.save_tokenizers(tokenizer, named, tmp_path / "run")
    assert len(run_tokenizers.run_qformer_tokenizer(config, tmp_path / "run", sources)) == 2
    assert len(run_tokenizers.run_tokenizer(config, tmp_path / "run", sources)) == len(tokenizer)
    with config.unlocked():
        config.data.qformer_tokenizer = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="data.qformer_tokenizer='.*nowhere' is no tokenizer"):
        run_tokenizers.run_qformer_tokenizer(config, tmp_path, sources)
