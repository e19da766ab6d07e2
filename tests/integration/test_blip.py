"""BLIP from weights, or from training, to captions, answers and matches."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from published_folders import pixels, publish
from reference_blip import ANSWERING, CAPTIONING, DEC, RETRIEVAL, SEP
from tiny_tasks import fast_jit

import jaxblip
from jaxblip.cli import main
from jaxblip.config import default_config
from jaxblip.data import run_tokenizers
from jaxblip.errors import UserError
from jaxblip.evaluation.verbs import evaluate, generate
from jaxblip.interop.convert import convert
from jaxblip.training.loop import train

NEW = 9
IMAGES = np.random.default_rng(5).integers(0, 256, (6, 8, 8, 3), np.uint8)
# Random models whose texts differ, and end at different places.
SEEDS = {CAPTIONING: 2, ANSWERING: 6, RETRIEVAL: 0}
CLS = 1
SEARCHES = [
    dict(num_beams=1, min_new_tokens=1),
    dict(num_beams=3, length_penalty=-1.0, min_new_tokens=1),
    dict(num_beams=1, repetition_penalty=1.5, min_new_tokens=3),
]


@pytest.fixture(scope="module", autouse=True)
def fast_compiler():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", fast_jit)
        patch.setattr(run_tokenizers, "_TOKENIZER_EXAMPLES", 200)
        yield


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Each published model, and what it is in jaxblip."""
    folder, models = tmp_path_factory.mktemp("blip"), {}
    for name, seed in SEEDS.items():
        reference = publish(folder / f"{name}-hf", name, seed=seed)
        convert(str(folder / f"{name}-hf"), str(folder / name))
        overrides = ("config.mesh.data=2", "config.mesh.fsdp=2", "config.mesh.tensor=2")
        models[name] = reference, jaxblip.load(folder / name, overrides=overrides)
    return models


def generated(reference, tokenizer, search, prompt=1, rows=slice(None), **arguments):
    """Texts of transformers."""
    ids = reference.generate(
        pixel_values=pixels(IMAGES)[rows],
        max_new_tokens=NEW,
        early_stopping=False,
        **arguments,
        **search,
    )[:, prompt:]
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("prompt", ["", "w2 w4"])
def test_captions_are_those_of_transformers(converted, search, prompt):
    reference, model = converted[CAPTIONING]
    tokenizer = model._run.tokenizer
    arguments = {}
    if prompt:
        words = tokenizer.convert_tokens_to_ids(prompt.split())
        arguments = {"input_ids": torch.tensor([[CLS, *words, SEP]] * len(IMAGES))}
    length = 1 + len(prompt.split())
    expected = generated(reference, tokenizer, search, length, **arguments)
    actual = model.caption(list(IMAGES), prompt, max_new_tokens=NEW, **search_of(search))
    assert actual == expected and len(set(expected)) > 2


def search_of(search):
    """The run's own settings are others than those of transformers."""
    return {"length_penalty": 1.0} | search


@pytest.mark.parametrize("search", SEARCHES)
def test_answers_are_those_of_transformers(converted, search):
    reference, model = converted[ANSWERING]
    tokenizer = model._run.tokenizer
    questions = ["w0 w3", "w5", "w1 w1 w4", "w2 w3 w3 w1", "w0", "w4 w4"]
    expected = []
    for row, question in enumerate(questions):  # without padding, which transformers looks at
        ids = [CLS, *tokenizer.convert_tokens_to_ids(question.split()), SEP]
        rows = slice(row, row + 1)
        expected += generated(
            reference, tokenizer, search, rows=rows, input_ids=torch.tensor([ids])
        )
    asked = [question.upper() for question in questions]
    actual = model.answer(list(IMAGES), asked, max_new_tokens=NEW, **search_of(search))
    assert actual == expected and len(set(expected)) > 2


def test_several_texts_are_drawn_and_the_image_is_read_once(converted, monkeypatch):
    _, model = converted[ANSWERING]
    encoded, encode = [], model._text._encode

    def counted(params, images):
        encoded.append(len(np.unique(images, axis=0)))
        return encode(params, images)

    monkeypatch.setattr(model._text, "_encode", counted)
    drawn = model.answer(IMAGES[0], ["w0 w3", "w5"], num_captions=4, temperature=3.0, seed=1)
    assert [len(texts) for texts in drawn] == [4, 4] and len(set(drawn[0])) > 1
    assert encoded == [1]


def test_candidates_have_the_likelihoods_of_transformers(converted):
    reference, model = converted[CAPTIONING]
    candidates = ["w1", "w3 w0 w2", "w5 w5"]
    scores = model.rank(list(IMAGES), candidates, "w2 w4")
    assert scores.shape == (len(IMAGES), 3)
    tokenizer = model._run.tokenizer
    for column, text in enumerate(candidates):
        words = tokenizer.convert_tokens_to_ids(f"w2 w4 {text}".split())
        ids = torch.tensor([[DEC, *words, SEP]] * len(IMAGES))
        with torch.no_grad():
            logits = reference(pixels(IMAGES), ids, attention_mask=torch.ones_like(ids)).logits
        each = torch.log_softmax(logits[:, :-1], dim=-1).gather(2, ids[:, 1:, None])[..., 0]
        np.testing.assert_allclose(scores[:, column], each[:, 2:].sum(dim=1), rtol=1e-4)


def test_candidates_of_a_question(converted, monkeypatch):
    """One at a time, by the model as it is trained."""
    monkeypatch.setattr("jaxblip.decoding.image_to_text.RANKED_TOKENS", 8 * 4 * 2)
    _, model = converted[ANSWERING]
    questions, candidates = ["w0 w3", "w5 w1 w4"], ["w1", "w3 w0 w2", "w5 w5"]
    asked = [question.upper() for question in questions]  # cleaned, as for training
    scores = model.rank(list(IMAGES[:2]), candidates, asked)
    task, encoder = model.task, model._text.encoder
    ids, valid = encoder(candidates)
    images, params = task.normalize_images(IMAGES[:2]), {"params": model._params}
    for row, question in enumerate(questions):
        read = (images[row : row + 1], *encoder([question]))
        read = [np.repeat(array, 3, axis=0) for array in read]
        logits = fast_jit(task.model.apply)(params, *read, ids, valid)
        each = np.asarray(jax.nn.log_softmax(logits))[:, :-1]
        each = np.take_along_axis(each, ids[:, 1:, None], axis=2)[..., 0]
        expected = (each * valid[:, 1:]).sum(axis=1)
        np.testing.assert_allclose(scores[row], expected, rtol=2e-5)
    with pytest.raises(UserError, match="answers questions: give one"):
        model.rank(IMAGES[0], candidates)
    with pytest.raises(UserError, match="question of 32 tokens is too long.* 24 positions"):
        model.answer(IMAGES[0], "w1 " * 30)


def test_matches_and_embeddings_are_those_of_transformers(converted):
    reference, model = converted[RETRIEVAL]
    texts = ["w1 w5 w2", "w0", "w4 w4 w3 w3"]
    match = model.match(list(IMAGES), texts)
    cosines = model.embed_images(list(IMAGES)) @ model.embed_texts(texts).T
    for column, text in enumerate(texts):
        ids = [CLS, *model._run.tokenizer.convert_tokens_to_ids(text.split()), SEP]
        arguments = torch.tensor([ids] * len(IMAGES)), pixels(IMAGES)
        with torch.no_grad():
            itm = reference(*arguments, use_itm_head=True).itm_score
            itc = reference(*arguments, use_itm_head=False).itm_score
        expected = torch.softmax(itm, dim=1)[:, 1]
        np.testing.assert_allclose(match[:, column], expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(cosines[:, column], itc[:, 0], rtol=1e-4, atol=1e-5)


def test_what_a_model_cannot_do_is_said(converted):
    cases = [
        (CAPTIONING, lambda m: m.answer(IMAGES[0], "why?"), "no `answer`: .*stage2.* or blip_vqa"),
        (CAPTIONING, lambda m: m.stream(IMAGES[0]), "'blip_caption', which has no `stream`"),
        (ANSWERING, lambda m: m.caption(IMAGES[0]), "'blip_vqa', which has no `caption`"),
        (RETRIEVAL, lambda m: m.rank(IMAGES[0], ["a", "b"]), "no `rank`"),
    ]
    for name, call, message in cases:
        with pytest.raises(UserError, match=message):
            call(converted[name][1])


# Training

SHADES = {"black": 10, "grey": 120, "white": 240}


def questions_file(folder: Path) -> str:
    """Two questions about each of three images."""
    lines = []
    for name, shade in SHADES.items():
        Image.fromarray(np.full((30, 30, 3), shade, np.uint8)).save(folder / f"{name}.png")
        lines.append({"question": "What shade is it?", "answers": [name, name, "dark"]})
        lines.append({"question": "Is it black?", "answer": "yes" if name == "black" else "no"})
        for line in lines[-2:]:
            line["image"] = f"{name}.png"
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines * 2))  # for a batch of 8
    return str(file)


def tiny(task, source):
    config = default_config(task)
    config.compute_dtype = "float32"
    config.steps, config.batch_size, config.log_every_steps = 2, 8, 1
    config.optimizer.warmup_steps = 1
    config.data.train.source = config.eval.source = source
    config.data.num_workers, config.data.image_size_px = 0, 24
    config.eval.max_images, config.eval.batch_size = 6, 8
    sizes = dict(width=16, num_layers=1, num_heads=2, mlp_width=24)
    config.model.vision.update(patch_size_px=12, **sizes)
    config.model.text.update(sizes)
    if "max_new_tokens" in config.eval:
        config.eval.max_new_tokens = 5
    return config.lock()


@pytest.mark.parametrize("task", ["blip_caption", "blip_retrieval", "blip_vqa"])
def test_a_run_from_training_to_its_use(task, tmp_path, capsys):
    picture, workdir = str(tmp_path / "grey.png"), str(tmp_path / "run")
    questions = questions_file(tmp_path)
    config = tiny(task, questions if task == "blip_vqa" else "shapes:heldout")
    if task == "blip_caption":
        with config.unlocked():
            config.data.prompt = "a picture of "
    metrics = train(config, workdir)
    expected = {"blip_retrieval": "itc_i2t_r1", "blip_vqa": "vqa_accuracy", "blip_caption": "cider"}
    assert expected[task] in metrics and np.isfinite(list(metrics.values())).all()
    found = evaluate(workdir)  # where there is Java, METEOR as well
    assert {name: found[name] for name in metrics} == pytest.approx(metrics)
    lines = (tmp_path / "run/predictions.jsonl").read_text().splitlines()
    assert len(lines) == 6  # images, or questions about three of them
    saved = json.loads((tmp_path / "run/config.json").read_text())
    assert saved["model"]["text"]["vocab_size"] > 20
    tokenizer = jaxblip.load(workdir)._run.tokenizer
    if "enc_token_id" in saved["model"]:
        assert saved["model"]["enc_token_id"] == tokenizer.convert_tokens_to_ids("[ENC]") > 0

    if task == "blip_retrieval":
        match = jaxblip.load(workdir).match(picture, ["a red circle", "a blue square"])
        assert match.shape == (1, 2)
        return
    question = {"question": "What shade is it?"} if task == "blip_vqa" else {}
    ((path, text),) = generate(workdir, [picture], **question)
    assert path == picture and isinstance(text, str)
    capsys.readouterr()
    extra = [f"--{name}={value}" for name, value in question.items()]
    verb = ["generate", f"--checkpoint={workdir}", "--image", picture, *extra]
    assert main(verb) == 0
    assert capsys.readouterr().out == f"{picture}: {text}\n"
    assert main([*verb, "--candidates=black,grey,white"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert {line.rsplit(" ", 1)[1] for line in shown} == set(SHADES)


def test_questions_need_a_source_that_has_them(tmp_path):
    with pytest.raises(UserError, match="have no instruction, which .*blip_vqa reads"):
        train(tiny("blip_vqa", "shapes:train"), str(tmp_path / "run"))
