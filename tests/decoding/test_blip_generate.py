"""BLIP's captions and answers: token for token those of transformers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxblip.decoding.cross_attending import (
    CrossAttendingDecoder,
    generate_answers,
    generate_captions,
)
from jaxblip.decoding.search import DecodingConfig
from jaxblip.errors import UserError
from jaxblip.models.med import MedDecoder
from jaxblip.sharding import make_mesh, put_batch, tree_shardings
from reference_blip import (
    ANSWERING,
    CAPTIONING,
    PAD,
    POSITIONS,
    SEP,
    VOCAB,
    images_and_pixels,
    pair,
    random_texts,
)
from tiny_tasks import fast_jit

ROWS, NEW = 24, 9
IMAGES, PIXELS = images_and_pixels(ROWS, seed=5)
# Random models whose texts end at different places, and in some rows never.
SEEDS = {CAPTIONING: 2, ANSWERING: 8}
LENGTHS = np.random.default_rng(0).integers(2, 6, ROWS)
QUESTIONS, QUESTION_VALID = random_texts(LENGTHS, length=5)
FULL = np.ones_like(QUESTION_VALID)

compiled_captions = fast_jit(generate_captions, static_argnames=("model", "config"))
compiled_answers = fast_jit(
    generate_answers, static_argnames=("model", "config", "attend_to_padding")
)


def config(num_beams=1, length_penalty=1.0, **fields):
    fields = dict(max_new_tokens=NEW, stop_token_id=SEP, pad_token_id=PAD) | fields
    return DecodingConfig(num_beams=num_beams, length_penalty=length_penalty, **fields)


SEARCHES = (
    config(),
    config(repetition_penalty=1.5),
    config(5, -1.0),
    config(5, -1.0, repetition_penalty=1.5, min_new_tokens=3),
)


def model_of(name):
    reference, model, _, params = pair(name, SEEDS[name], talkative=True)
    return reference, model, params


def captions(search, prompt_ids=None, prompt_valid=None, images=IMAGES, rng=None, params=None):
    _, model, own = model_of(CAPTIONING)
    params = own if params is None else params
    ids = compiled_captions(model, params, images, search, prompt_ids, prompt_valid, rng)
    return np.asarray(ids)


def answers(search, valid=QUESTION_VALID, questions=QUESTIONS, **kwargs):
    _, model, params = model_of(ANSWERING)
    ids = compiled_answers(model, params, IMAGES, questions, valid, search, **kwargs)
    return np.asarray(ids)


def generated(generate, prompt, search, **inputs):
    """New tokens of transformers' `generate`, padded as ours are."""
    ids = generate(
        **inputs,
        max_new_tokens=search.max_new_tokens,
        min_new_tokens=search.min_new_tokens,
        num_beams=search.num_beams,
        length_penalty=search.length_penalty,
        repetition_penalty=search.repetition_penalty,
        early_stopping=False,
        do_sample=False,
    ).numpy()[:, prompt:]
    result = np.full((len(ids), search.max_new_tokens), search.pad_token_id)
    for row, new in zip(result, ids.tolist(), strict=True):
        # Its beam search fills up with the stop token where padding is token 0.
        length = new.index(SEP) + 1 if SEP in new else len(new)
        row[:length] = new[:length]
    return result


def their_answers(search, rows=slice(None), valid=FULL, questions=QUESTIONS):
    return generated(
        model_of(ANSWERING)[0].generate,
        1,
        search,
        input_ids=torch.tensor(questions[rows]),
        pixel_values=PIXELS[rows],
        attention_mask=torch.tensor(valid[rows]).long(),
    )


def assert_varied(ids):
    """Else equality would say little."""
    lengths = {list(row).index(SEP) if SEP in row else NEW for row in ids}
    assert len(lengths) > 1 and NEW in lengths and len({tuple(row) for row in ids}) > 8


@pytest.mark.parametrize("search", SEARCHES)
def test_captions_are_those_of_transformers(search):
    ids = captions(search)
    expected = generated(model_of(CAPTIONING)[0].generate, 1, search, pixel_values=PIXELS)
    np.testing.assert_array_equal(ids, expected)
    assert_varied(ids)


def test_captions_continue_a_prompt():
    search = config(5, -1.0, repetition_penalty=1.5, min_new_tokens=3)
    prompt = np.array([7, 4, 9])  # of which the model makes [DEC] 4 9
    expected = generated(
        model_of(CAPTIONING)[0].generate,
        3,
        search,
        pixel_values=PIXELS,
        input_ids=torch.tensor(np.tile([*prompt, SEP], (ROWS, 1))),  # of which it drops the [SEP]
    )
    ids = captions(search, np.tile(prompt, (ROWS, 1)))
    np.testing.assert_array_equal(ids, expected)
    assert (ids != captions(search)).any()


def test_prompts_of_several_lengths():
    search = config(3, repetition_penalty=1.5)
    prompts = [[7, 4, 9, 3], [7, 8]]
    expected = np.zeros((ROWS, NEW), int)
    ids, valid = np.full((ROWS, 4), 5), np.zeros((ROWS, 4), bool)
    for i, prompt in enumerate(prompts):
        rows = slice(i, None, 2)
        ids[rows, 4 - len(prompt) :], valid[rows, 4 - len(prompt) :] = prompt, True
        alone = np.tile(prompt, (ROWS, 1))
        expected[rows] = captions(search, alone)[rows]
    np.testing.assert_array_equal(captions(search, ids, valid), expected)


@pytest.mark.parametrize("search", SEARCHES)
def test_answers_are_those_of_transformers(search):
    ids = answers(search, FULL)
    np.testing.assert_array_equal(ids, their_answers(search))
    assert_varied(ids)


@pytest.mark.parametrize("search", [config(), config(5, -1.0)])
def test_answers_with_padded_questions_as_in_transformers(search):
    ids = answers(search, attend_to_padding=True)
    np.testing.assert_array_equal(ids, their_answers(search, valid=QUESTION_VALID))
    assert (ids != answers(search)).any()


@pytest.mark.parametrize("search", [config(), config(5, -1.0)])
def test_padding_of_questions_does_not_matter(search):
    ids = answers(search)
    other = np.where(QUESTION_VALID, QUESTIONS, 9)
    np.testing.assert_array_equal(answers(search, questions=other), ids)
    for length in set(LENGTHS.tolist()):
        rows = np.flatnonzero(length == LENGTHS)
        expected = their_answers(search, rows, FULL[:, :length], QUESTIONS[:, :length])
        np.testing.assert_array_equal(ids[rows], expected)


def test_beams_share_the_source():
    _, model, params = model_of(CAPTIONING)
    decoder = CrossAttendingDecoder(MedDecoder(model.text_config), params["decoder"])
    features, prompt, beams = jnp.zeros((ROWS, 5, 20)), jnp.zeros((ROWS, 2), int), 5
    logits, state = jax.eval_shape(
        lambda: decoder.prefill(features, None, prompt, prompt == 0, NEW, beams)
    )
    assert logits.shape == (ROWS, VOCAB)
    assert state.source.key.shape == (2, ROWS, 5, 2, 8)
    assert state.text.cache.key.shape == (2, ROWS, 2 + NEW * beams, 2, 8)  # the prompt, too


def test_one_compilation_for_all_inputs_of_a_shape():
    _, model, params = model_of(CAPTIONING)
    traces = []

    @fast_jit
    def traced(images):
        traces.append(images.shape)
        return generate_captions(model, params, images, config())

    one, other = traced(IMAGES), traced(IMAGES[::-1])
    assert len(traces) == 1
    np.testing.assert_array_equal(one, other[::-1])
    assert (one != other).any()


def test_same_tokens_on_several_devices():
    search = config(3, repetition_penalty=1.5)
    expected = captions(search)
    mesh = make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4])
    _, _, params = model_of(CAPTIONING)
    params = jax.device_put(params, tree_shardings(params, mesh))
    images = put_batch({"images": IMAGES}, mesh)["images"]
    np.testing.assert_array_equal(captions(search, images=images, params=params), expected)


def test_bfloat16():
    _, model, params = model_of(CAPTIONING)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    model = model.clone(dtype=jnp.bfloat16)
    ids = compiled_captions(model, params, IMAGES[:4], config(3))
    assert ids.shape == (4, NEW) and ids.dtype == jnp.int32
    assert ((ids >= 0) & (ids < VOCAB)).all()


def test_one_new_token():
    ids = captions(config(max_new_tokens=1))
    np.testing.assert_array_equal(ids, captions(config())[:, :1])


def test_sampling():
    search = config(sample=True, temperature=2.0)
    one, same, other = (captions(search, rng=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    best = captions(config(sample=True, top_k=1), rng=jax.random.key(0))
    np.testing.assert_array_equal(best, captions(config()))
    with pytest.raises(UserError, match="needs a random key"):
        captions(search)


def test_more_tokens_than_positions():
    _, model, params = model_of(CAPTIONING)

    def shape(search):
        return jax.eval_shape(lambda: generate_captions(model, params, IMAGES, search)).shape

    fits = config(max_new_tokens=POSITIONS)  # the last one is never read
    assert shape(fits) == (ROWS, POSITIONS)
    with pytest.raises(UserError, match="prompt of 1 tokens needs 25 positions"):
        shape(dataclasses.replace(fits, max_new_tokens=POSITIONS + 1))
