"""Conversations of LLaVA and ShareGPT: every answer is an example, or counted."""

import json
import re

import pytest

from hostile import PNG, bad_sample, inspected, opened
from jaxblip.config import default_config
from jaxblip.data import inputs, run_sources
from jaxblip.data.tokenizers import train_wordpiece
from jaxblip.errors import UserError


def said(*turns: str) -> list[dict]:
    """Turns such as "human: what?", as LLaVA has them."""
    return [dict(zip(("from", "value"), turn.split(": ", 1))) for turn in turns]


def messages(*turns: str) -> list[dict]:
    names = {"human": "user", "gpt": "assistant"}
    return [
        {"role": names.get(turn["from"], turn["from"]), "content": turn["value"]}
        for turn in said(*turns)
    ]


def text(content: str) -> dict:
    return {"type": "text", "text": content}


@pytest.fixture(params=["json", "jsonl"])
def read(request, tmp_path):
    """A function that opens conversations from a file of either kind."""
    (tmp_path / "1.png").write_bytes(PNG)
    path = tmp_path / f"talk.{request.param}"

    def read(*entries):
        lines = "\n".join(map(json.dumps, entries))
        path.write_text(json.dumps(entries) if request.param == "json" else lines)
        return opened(path)

    read.path = path
    return read


def pairs(source):
    examples = [source[index] for index in range(len(source))]
    assert all(example["image"] == PNG for example in examples)
    return [(example["instruction"], *example["captions"]) for example in examples]


FORMS = {
    "LLaVA": {"id": "7", "image": "1.png", "conversations": said(
        "human: <image>\nWhat is it?", "gpt: A square.", "human: Which colour?", "gpt: Red.")},
    "ShareGPT": {"images": ["1.png"], "messages": messages(
        "human: <image>What is it?", "gpt: A square.", "human: Which colour?", "gpt: Red.")},
    "parts": {"image": "1.png", "messages": [
        {"role": "user", "content": [{"type": "image"}, text("What is it?")]},
        {"role": "assistant", "content": [text("A square.")]},
        {"role": "user", "content": [text("Which colour?")]},
        {"role": "assistant", "content": [text("Red.")]}]},
    "other names": {"image": "1.png", "conversations": messages(
        "human: What is it?<image>", "gpt: A square.", "human: Which colour?", "gpt: Red.")},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_each_answer_follows_all_that_was_said_before(form, read):
    source = read(FORMS[form])
    assert source.has_instructions and not source.problems
    assert pairs(source) == [
        ("What is it?", "A square."),
        ("What is it?\nA square.\nWhich colour?", "Red."),
    ]
    assert source[0]["image_id"] == source[1]["image_id"]
    place = ", entry 0, turn 1" if read.path.suffix == ".json" else ":1"
    assert source._rows.place(0) == f"{read.path}{place}"


ODD = {
    "a system turn": (said("system: Be.", "human: Hi?", "gpt: Ho."), [("Be.\nHi?", "Ho.")]),
    "an image in the middle": (
        said("human: Look at <image> and\nsay <image>", "gpt: A."), [("Look at and\nsay", "A.")],
    ),
    "a question of an image alone": (said("human: <image>", "gpt: A."), [("", "A.")]),
    "two answers": (said("human: Hi?", "gpt: A.", "gpt: B."), [("Hi?", "A."), ("Hi?\nA.", "B.")]),
    "two questions": (said("human: Hi?", "human: Who?", "gpt: A."), [("Hi?\nWho?", "A.")]),
    "no answer in the end": (said("human: Hi?", "gpt: A.", "human: And?"), [("Hi?", "A.")]),
    "an empty answer": (said("human: Hi?", "gpt: "), [("Hi?", "")]),
    "scripts": (said("human: 这是什么？", "gpt: قطة 🐈"), [("这是什么？", "قطة 🐈")]),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_conversations_that_can_be_read(case, read):
    turns, expected = ODD[case]
    source = read({"image": "1.png", "conversations": turns})
    assert pairs(source) == expected and not source.problems


def test_what_is_no_example_is_counted(read, capsys):
    talk = said("human: Hi?", "gpt: Ho.")
    good = {"image": "1.png", "conversations": talk}
    source = read(
        good,
        {"conversations": talk}, {"image": "", "conversations": talk},
        {"images": ["1.png", "2.png"], "conversations": talk},
        {"image": "1.png", "conversations": []}, {"image": "1.png", "messages": talk[:1]},
        {"image": "1.png", "conversations": said("gpt: Hello.", "human: Hi?", "gpt: Ho.")},
    )  # fmt: skip
    assert pairs(source) == [("Hi?", "Ho."), ("Hello.\nHi?", "Ho.")]
    where = read.path
    places = [f"{where}:{n + 1}" if where.suffix == ".jsonl" else f"entry {n}" for n in range(7)]
    assert source.problems == [
        f"{what}, left out of {where}: {count}, such as {places[first]}"
        for what, count, first in [
            ("conversations without an image", 2, 1),
            ("conversations with several images", 1, 3),
            ("conversations without an answer", 2, 4),
            ("answers before a question", 1, 6),
        ]
    ]
    status, printed = inspected(where, capsys)
    assert status == 0 and all(problem in printed for problem in source.problems)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (3, '"conversations" is 3, not a list of turns'),
        (["Hi?"], 'turn 0 is "Hi?", not one like {"from": "human"'),
        (said("human: Hi?", "tool: 3"), 'turn 1 is {"from": "tool", "value": "3"}, not one'),
        ([{"from": "human"}], 'turn 0 is {"from": "human"}'),
        ([{"from": ["human"], "value": "Hi?"}], 'turn 0 is {"from": ["human"]'),
        ([{"from": "human", "value": None}], "turn 0 is"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "turn 0 is"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "turn 0 is"),
    ],
)  # fmt: skip
def test_conversations_of_another_form_are_named(turns, message, read, capsys):
    good = {"image": "1.png", "conversations": said("human: Hi?", "gpt: Ho.")}
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read(good, {"image": "1.png", "conversations": turns})
    assert ("entry 1" in str(caught.value)) or f"{read.path}:2: " in str(caught.value)
    assert inspected(read.path, capsys)[0] == 2


def test_only_conversations_without_an_image(read, capsys):
    with pytest.raises(UserError, match="conversations without an image, left out .*: 2, such"):
        read(*[{"conversations": said("human: Hi?", "gpt: Ho.")}] * 2)
    assert inspected(read.path, capsys)[0] == 2


def test_a_long_conversation_is_no_bomb(read):
    """All instructions of 4,000 turns at once would be a gigabyte."""
    turns = said(*(f"{who}: {'x' * 250}" for _ in range(1000) for who in ("human", "gpt")))
    source = read({"image": "1.png", "conversations": turns})
    assert len(source) == 1000
    assert len(source[999]["instruction"]) == 1999 * 251 - 1


def test_images_of_a_conversation_that_are_none(read):
    turns = said("human: Hi?", "gpt: Ho.")
    good = {"image": "1.png", "conversations": turns}
    if read.path.suffix == ".jsonl":  # whose lines are all checked
        with pytest.raises(UserError, match=r'jsonl:2: "image" is 3'):
            read(good, {"image": 3, "conversations": turns})
    else:
        source = read(good, {"image": 3, "conversations": turns})
        assert 'entry 1, turn 1: "image" is 3' in bad_sample(source, 1, "bad row")


def test_a_conversation_that_changes_when_it_is_open(tmp_path):
    (tmp_path / "1.png").write_bytes(PNG)
    path = tmp_path / "talk.jsonl"
    line = json.dumps({"image": "1.png", "messages": messages("human: Hi?", "gpt: Ho.")})
    path.write_text(line)
    source = opened(path)
    for other in ('"assistant"', '"use' + "r" * 5 + '" '), ('"messages"', '"massages"'):
        path.write_text(line.replace(*other))
        assert "talk.jsonl:1: " in bad_sample(source, 0, "unreadable row")


def test_a_field_map_of_texts_makes_other_columns_none(tmp_path):
    (tmp_path / "1.png").write_bytes(PNG)
    path = tmp_path / "talk.jsonl"
    path.write_text('{"image": "1.png", "title": "a", "messages": "none"}')
    assert opened(path, fields={"captions": "title"})[0]["captions"] == ["a"]


@pytest.mark.parametrize("language_model", ["opt", "t5"])
def test_every_answer_of_a_conversation_is_a_target_and_nothing_else(language_model, tmp_path):
    """Both read what was said before, of which the last tokens stay: those of the question."""
    path = tmp_path / "talk.json"
    turns = [text for n in range(3) for text in (f"human: q{n}", f"gpt: a{n}")]
    path.write_text(json.dumps([{"image": "1.png", "conversations": said(*turns)}]))
    config = default_config("instruct", language_model=language_model)
    config.batch_size, config.data.num_workers, config.data.train.source = 3, 0, str(path)
    config.data.max_instruction_tokens = 4  # of six tokens, or seven, with those at the ends
    if language_model == "t5":
        config.data.max_input_tokens = 4
    tokenizer = train_wordpiece([turn.split(": ")[1] for turn in turns] * 3, 40)
    sources = run_sources.open_train_sources(config)
    texts = ("text", "instruction", *(("input",) if language_model == "t5" else ()))
    fields = tuple(f"{text}_{part}" for text in texts for part in ("ids", "mask"))
    fields += ("prompt_length",)
    with inputs.train_batches(config, fields, sources, tokenizer, (0, 1), None) as batches:
        batch = next(batches)

    def words(name, row, first=0):
        ids = batch[f"{name}_ids"][row][batch[f"{name}_mask"][row]][first:]
        return tokenizer.decode(ids, skip_special_tokens=True)

    found = {}
    for row in range(3):
        behind = int(batch["prompt_length"][row]) if language_model == "opt" else 0
        read = words("text", row)[: -len(words("text", row, behind))] or words("input", row)
        found[words("text", row, behind)] = read.strip(), words("instruction", row)
    # [CLS] and [SEP] of the Q-Former, BOS or an end token of the language model.
    assert found == {
        "a0": ("q0", "q0"), "a1": ("q0 a0 q1", "a0 q1"), "a2": ("q1 a1 q2", "a1 q2"),
    }  # fmt: skip
