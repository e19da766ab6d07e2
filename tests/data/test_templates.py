"""Templates by the name of their family, in training and in evaluation."""

from __future__ import annotations

import itertools
import json

import pytest

from jaxblip.config import default_config
from jaxblip.data import inputs, run_sources, run_tokenizers
from jaxblip.data.templates import FAMILIES, expanded
from jaxblip.errors import UserError
from jaxblip.overrides import apply_overrides

WITH_INSTRUCTION = ("vqa", "vqg")


def test_the_families_have_as_many_templates_as_the_papers():
    counts = {"caption": 13, "vqa": 10, "vqg": 6}
    assert {name: len(FAMILIES[name]) for name in counts} == counts
    for name, templates in FAMILIES.items():
        assert len(set(map(str.lower, templates))) == len(templates)
        assert all(text.count("{}") == (name in WITH_INSTRUCTION) for text in templates)
        assert all(text == text.strip() for text in templates)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_held_out_is_not_trained_on(name):
    train, heldout = expanded([f"{name}:train"]), expanded([f"{name}:heldout"])
    assert not set(train) & set(heldout) and len(train) > len(heldout) > 0
    assert sorted(train + heldout) == sorted(expanded([name])) == sorted(FAMILIES[name])


def test_families_and_templates_of_ones_own_stand_together():
    own = ("Say:", "captions of {}", "caption:", "x")
    assert expanded([*own, "vqg", "Say:"]) == (*own, *FAMILIES["vqg"])
    assert expanded([]) == ()


@pytest.mark.parametrize(("name", "near"), [
    ("captions", "caption"), ("vqa:trian", "vqa:train"), ("classificaton", "classification"),
])  # fmt: skip
def test_a_misspelt_family_is_no_template(name, near):
    with pytest.raises(UserError, match=f"'{name}': did you mean {near}?"):
        expanded([name])


@pytest.fixture
def path(tmp_path):
    lines = [{"image": f"{n}.png", "question": f"q{n}", "answer": f"a{n}"} for n in range(20)]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(tmp_path / "asked.jsonl")


def config_of(task="instruct", *overrides):
    config = default_config(task).lock()
    apply_overrides(config, ["config.batch_size=10", "config.data.num_workers=0", *overrides])
    return config


def texts_of(config, tmp_path, batches=30):
    """By source, (what stands before the output, the output) of each example."""
    sources = run_sources.open_train_sources(config)
    tokenizer = run_tokenizers.run_tokenizer(config, tmp_path, sources)
    fields = ("text_ids", "text_mask", "prompt_length", "instruction_ids", "instruction_mask")
    found = []
    with inputs.train_batches(config, fields, sources, tokenizer, (0, 1), None) as made:
        for batch in itertools.islice(made, batches):
            rows = (batch[field] for field in ("text_ids", "prompt_length", "instruction_ids"))
            for ids, length, asked in zip(*rows, strict=True):
                parts = ids[1:length], ids[length:], asked
                decoded = [tokenizer.decode(part, skip_special_tokens=True) for part in parts]
                assert decoded[0] == decoded[2]  # the Q-Former reads the very template
                found.append(decoded[:2])
    return found, lambda text: tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids)


def test_a_family_is_named_on_the_command_line(path, tmp_path):
    config = config_of(
        "instruct", f"config.data.train.source={path}", "config.data.templates=vqa:train"
    )
    found, as_read = texts_of(config, tmp_path)
    expected = {
        (as_read(template.replace("{}", f"q{n}")), f"a{n}")
        for template in expanded(["vqa:train"]) for n in range(20)
    }  # fmt: skip
    drawn = set(map(tuple, found))
    assert drawn <= expected and len(drawn) > 0.8 * len(expected)


def test_sources_of_a_mixture_have_families_of_their_own(path, tmp_path):
    """And one that asks for questions reads the answer as its instruction."""
    of = "config.data.mixture"
    config = config_of(
        "instruct",
        *(f"{of}.{name}.train.source={path}" for name in ("vqa", "vqg")),
        f"{of}.vqa.templates=vqa",
        f"{of}.vqg.templates=vqg",
        f"{of}.vqg.fields.instruction=answer",
        f"{of}.vqg.fields.output=question",
    )
    found, as_read = texts_of(config, tmp_path, 10)
    expected = {
        name: {as_read(text.replace("{}", f"{a}{n}")): f"{b}{n}" for text in FAMILIES[name]
               for n in range(20)}
        for name, a, b in (("vqa", "q", "a"), ("vqg", "a", "q"))
    }  # fmt: skip
    of_source = {name: [text for text in found if text[0] in expected[name]] for name in expected}
    assert sorted(map(len, of_source.values())) == [50, 50]
    for name, texts in of_source.items():
        assert all(expected[name][prompt] == output for prompt, output in texts)


def test_each_entry_of_an_evaluation_keeps_its_template():
    config = config_of("instruct", "config.eval.templates=vqa:heldout")
    drawn = run_sources.prompts_of_entries(config, 200)
    assert drawn == run_sources.prompts_of_entries(config, 200)
    assert drawn[:50] == run_sources.prompts_of_entries(config, 50)
    heldout = expanded(["vqa:heldout"])
    assert all(60 < drawn.count(template) < 140 for template in heldout) and len(heldout) == 2
    config = config_of("instruct", "config.data.templates=vqa")
    assert set(run_sources.prompts_of_entries(config, 9)) == {"{}"}  # those are of training
    config = config_of("stage1", "config.eval.templates=a photo of {}")  # of classes
    assert run_sources.eval_prompts(config) == ("",)


def test_an_evaluation_of_captions_needs_no_instruction_where_its_templates_need_none():
    overrides = ["config.data.image_size_px=8", "config.eval.source=shapes:heldout"]
    overrides += ["config.eval.max_images=2"]
    config = config_of("instruct", *overrides, "config.eval.templates=caption")
    assert run_sources.read_eval_set(config).instructions == ["", ""]
    config = config_of("instruct", *overrides, "config.eval.templates=vqa")
    with pytest.raises(UserError, match="no instruction, which data.prompt='{}' reads"):
        run_sources.read_eval_set(config)
    config = config_of("instruct", *overrides, "config.eval.templates=vqa:heldout")
    with pytest.raises(UserError, match="which eval.templates='Question: {} Answer:' reads"):
        run_sources.read_eval_set(config)
