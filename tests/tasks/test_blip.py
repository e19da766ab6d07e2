"""BLIP's tasks against transformers: losses and gradients of batches as they are trained on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference_blip import (
    ANSWERING,
    CAPTIONING,
    DEC,
    SIZE,
    SMOOTHING,
    TEXT,
    VOCAB,
    gradients,
    pair,
    random_texts,
)
from tiny_tasks import fast_jit, random_batch, random_params, tiny_config

from jaxblip.config import default_config
from jaxblip.errors import UserError
from jaxblip.tasks import make_task
from jaxblip.tasks.parts import NOT_IN_CONFIG

ROWS, QUESTION = 4, 5
IMAGES = np.random.default_rng(0).integers(0, 256, (ROWS, SIZE, SIZE, 3), np.uint8)
IDS, VALID = random_texts((6, 3, 4, 5))
PROMPTS = np.array([0, 2, 3, 1], np.int32)
# transformers does not mask what the decoder sees of a question: these have no padding.
QUESTIONS, QUESTION_VALID = random_texts([QUESTION] * ROWS, seed=1, length=QUESTION)


def task_like(name, model, **model_fields):
    """The task with the network of a model; the images at the pixels' plain values."""
    config = default_config(name)
    config.compute_dtype = "float32"
    config.data.image_size_px, config.data.max_text_tokens = SIZE, TEXT
    config.loss.label_smoothing = SMOOTHING
    if "max_instruction_tokens" in config.data:
        config.data.max_instruction_tokens = QUESTION
    for section in ("vision", "text"):
        fields = vars(getattr(model, f"{section}_config"))
        config.model[section].update({k: v for k, v in fields.items() if k not in NOT_IN_CONFIG})
    config.model.update(model_fields)
    task = make_task(config.lock())
    assert task.model == model
    return task


def assert_same_loss_and_gradients(task, reference, layout, params, batch, expected):
    reference.zero_grad()
    loss = expected(torch.tensor(np.asarray(task.normalize_images(IMAGES)).transpose(0, 3, 1, 2)))
    loss.backward()
    output, actual = fast_jit(jax.value_and_grad(lambda p: task.loss(p, batch, None).loss))(params)
    assert float(output) == pytest.approx(loss.item(), rel=1e-5)
    expected_gradients = gradients(reference, layout, params)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected_gradients))
    for (path, leaf), gradient in zip(
        jax.tree.leaves_with_path(expected_gradients), jax.tree.leaves(actual), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(gradient, leaf, rtol=1e-3, atol=1e-6 * largest, err_msg=name)


def labels(counts):
    """As transformers wants them: it begins no text by itself, and counts no label of -100."""
    ids = torch.tensor(np.concatenate([np.full((ROWS, 1), DEC), IDS[:, 1:]], axis=1))
    return ids, ids.masked_fill(~torch.tensor(counts), -100)


def test_captioning_has_the_loss_and_gradients_of_transformers():
    reference, model, layout, params = pair(CAPTIONING)
    task = task_like("blip_caption", model, dec_token_id=DEC)
    batch = {"image": IMAGES, "text_ids": IDS, "text_mask": VALID, "prompt_length": PROMPTS}
    ids, counted = labels(VALID & (np.arange(TEXT) >= PROMPTS[:, None]))

    def expected(pixels):
        mask = torch.tensor(VALID).long()
        return reference(pixels, ids, attention_mask=mask, labels=counted).loss

    assert_same_loss_and_gradients(task, reference, layout, params, batch, expected)


def test_question_answering_has_the_loss_and_gradients_of_transformers():
    reference, model, layout, params = pair(ANSWERING)
    task = task_like("blip_vqa", model, dec_token_id=DEC, enc_token_id=0)
    batch = {
        "image": IMAGES,
        "instruction_ids": QUESTIONS,
        "instruction_mask": QUESTION_VALID,
        "text_ids": IDS,
        "text_mask": VALID,
    }
    ids, counted = labels(VALID)

    def expected(pixels):
        return reference(
            torch.tensor(QUESTIONS),
            pixels,
            decoder_input_ids=ids,
            decoder_attention_mask=torch.tensor(VALID).long(),
            attention_mask=torch.tensor(QUESTION_VALID).long(),
            labels=counted,
        ).loss

    assert_same_loss_and_gradients(task, reference, layout, params, batch, expected)


def test_questions_begin_with_enc_and_their_padding_is_not_seen():
    model, params = pair(ANSWERING)[1], pair(ANSWERING)[3]
    enc, valid = VOCAB - 1, np.arange(QUESTION) < np.array([[5], [2], [4], [1]])
    with_enc = task_like(
        "blip_vqa", model.clone(enc_token_id=enc), dec_token_id=DEC, enc_token_id=enc
    )
    without = task_like("blip_vqa", model, dec_token_id=DEC, enc_token_id=0)

    def loss(task, questions):
        batch = dict(zip(task.fields, (IMAGES, questions, valid, IDS, VALID), strict=True))
        return float(fast_jit(task.loss)(params, batch, None).loss)

    marked = QUESTIONS.copy()
    marked[:, 0] = enc
    assert loss(with_enc, QUESTIONS) == pytest.approx(loss(without, marked), rel=1e-6)
    assert loss(without, QUESTIONS) != pytest.approx(loss(without, marked), rel=1e-3)
    padded_otherwise = np.where(valid, QUESTIONS, 9)
    assert loss(without, padded_otherwise) == pytest.approx(loss(without, QUESTIONS), rel=1e-6)


def test_captions_learn_nothing_from_a_prompt_alone():
    task = make_task(tiny_config("blip_caption"))
    batch = random_batch(task)
    length = batch["text_ids"].shape[1]
    batch["prompt_length"] = np.full(len(batch["image"]), length, np.int32)
    output = fast_jit(task.loss)(random_params(task), batch, None)
    assert float(output.loss) == float(output.weight) == 0


def test_one_image_in_the_batch_has_no_negatives():
    task = make_task(tiny_config("blip_retrieval"))
    batch = random_batch(task)
    batch["image_id"] = np.zeros_like(batch["image_id"])
    metrics = fast_jit(task.loss)(random_params(task), batch, None).metrics
    ids = jnp.asarray(batch["text_ids"]), jnp.asarray(batch["text_mask"])

    def pairs(params):
        features = task.image_features(params, batch["image"])
        image = task.apply(params, features, method="read_image")
        return task.apply(params, image, *ids, method="match")

    logits = fast_jit(pairs)(random_params(task))
    expected = -jnp.mean(jax.nn.log_softmax(logits)[:, 1])
    assert float(metrics["itm"]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "a photo of"}, "data.prompt='a photo of' would stand before the answers"),
        ({"max_instruction_tokens": 17}, "data.max_instruction_tokens=17 is more than.*=16"),
        ({"max_text_tokens": 17}, "data.max_text_tokens=17 is more than.*=16"),
    ],
)
def test_fields_that_do_not_fit(change, message):
    config = tiny_config("blip_vqa")
    config.data.update(change)
    with pytest.raises(UserError, match=message):
        make_task(config)
