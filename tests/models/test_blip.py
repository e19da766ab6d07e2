"""BLIP's assemblies against transformers: outputs, losses, every gradient; sizes to the digit."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxblip import sharding
from jaxblip.losses.language_modeling import token_cross_entropy
from jaxblip.models.blip import BlipCaptioner, BlipQuestionAnswering, BlipRetrieval
from jaxblip.models.med import MedConfig
from jaxblip.models.vit import VitConfig
from reference_blip import (
    ANSWERING,
    CAPTIONING,
    CLASSES,
    DEC,
    RETRIEVAL,
    SMOOTHING,
    VOCAB,
    gradients,
    images_and_pixels,
    inputs,
    pair,
    random_texts,
)
from tiny_checkpoints import shapes_of
from tiny_tasks import fast_jit

ROWS = 3
IMAGES, PIXELS = images_and_pixels(ROWS)
IDS, VALID = random_texts((6, 3, 4))
TORCH_IDS, TORCH_MASK = torch.tensor(IDS), torch.tensor(VALID).long()
# As transformers wants them: it puts no [DEC] before a text, and counts no label of -100.
DECODER_IDS = torch.tensor(np.concatenate([np.full((ROWS, 1), DEC), IDS[:, 1:]], axis=1))
LABELS = DECODER_IDS.masked_fill(~torch.tensor(VALID), -100)
QUESTION_IDS, QUESTION_VALID = random_texts((5, 5, 5), seed=1, length=5)

assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)


def assert_same_gradients(actual, expected):
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    flat = jax.tree.leaves_with_path(expected)
    assert len(flat) > 40
    for (path, leaf), gradient in zip(flat, jax.tree.leaves(actual), strict=True):
        # A bias of keys has no gradient but rounding; all else does.
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert name.endswith("key/bias") or np.abs(leaf).max() > 1e-4 * largest, name
        np.testing.assert_allclose(gradient, leaf, rtol=1e-3, atol=1e-6 * largest, err_msg=name)


def text_loss(logits, ids, valid):
    return token_cross_entropy(
        logits[:, :-1], jnp.asarray(ids)[:, 1:], valid[:, 1:], label_smoothing=SMOOTHING
    ).loss


# Retrieval


def with_temperature(params):
    """Variables of a whole model: checkpoints of transformers have no temperature."""
    return {"params": params | {"temperature": 0.07}}


def retrieve(params):
    return pair(RETRIEVAL)[1].apply(with_temperature(params), IMAGES, IDS, VALID)


def test_retrieval_gives_the_features_and_scores_of_transformers():
    reference, model, _, params = pair(RETRIEVAL)
    match, images, texts = fast_jit(retrieve)(params)
    arguments = TORCH_IDS, PIXELS
    with torch.no_grad():
        matching = reference(*arguments, use_itm_head=True, attention_mask=TORCH_MASK)
        contrast = reference(*arguments, use_itm_head=False, attention_mask=TORCH_MASK)
    assert_close(match, matching.itm_score)
    assert_close(images @ texts.T, contrast.itm_score)
    features = fast_jit(
        lambda params: model.apply(with_temperature(params), IMAGES, method="image_features")
    )(params)
    assert_close(features, contrast.last_hidden_state)


def test_retrieval_gradients():
    reference, _, layout, params = pair(RETRIEVAL)
    rng = np.random.default_rng(2)
    of_match, of_contrast = rng.normal(size=(ROWS, 2)), rng.normal(size=(ROWS, ROWS))

    def objective(params):
        match, images, texts = retrieve(params)
        return (of_match * match).sum() + (of_contrast * (images @ texts.T)).sum()

    reference.zero_grad()
    scores = [
        reference(TORCH_IDS, PIXELS, use_itm_head=head, attention_mask=TORCH_MASK).itm_score
        for head in (True, False)
    ]
    weights = map(torch.tensor, (of_match, of_contrast))
    sum((weight * score).sum() for weight, score in zip(weights, scores, strict=True)).backward()
    actual = fast_jit(jax.grad(objective))(params)
    assert_same_gradients(actual, gradients(reference, layout, params))


def test_an_image_may_be_matched_with_several_adjacent_texts():
    _, model, _, params = pair(RETRIEVAL)
    ids, valid = random_texts((6, 3, 4, 5, 2, 6), seed=3)

    @fast_jit
    def match(params, images):
        def parts(module):
            image = module.read_image(module.image_features(images))
            return module.match(image, ids, valid)

        return model.apply(with_temperature(params), method=parts)

    expected = match(params, np.repeat(IMAGES, 2, axis=0))
    np.testing.assert_allclose(match(params, IMAGES), expected, rtol=1e-5, atol=1e-5)


def test_enc_stands_first_only_where_a_text_is_read_with_its_image():
    _, model, _, params = pair(RETRIEVAL)
    enc = VOCAB - 1
    assert not (IDS == enc).any()
    whole = with_temperature(params)
    marked = np.concatenate([np.full((ROWS, 1), enc), IDS[:, 1:]], axis=1)

    @fast_jit
    def run(params, ids, model=model):
        return model.apply(params, IMAGES, ids, VALID)

    match, _, texts = fast_jit(model.clone(enc_token_id=enc).apply)(whole, IMAGES, IDS, VALID)
    assert_close(texts, run(whole, IDS)[2])
    assert_close(match, run(whole, marked)[0])
    assert np.abs(match - run(whole, IDS)[0]).max() > 1e-2


# Captioning


def test_captioning_gives_the_logits_loss_and_gradients_of_transformers():
    reference, model, layout, params = pair(CAPTIONING)
    reference.zero_grad()
    expected = reference(PIXELS, DECODER_IDS, attention_mask=TORCH_MASK, labels=LABELS)
    expected.loss.backward()

    def loss(params):
        # [CLS] or any other first token: the model puts [DEC] in its place.
        logits = model.apply({"params": params}, IMAGES, IDS, VALID)
        return text_loss(logits, IDS, VALID), logits

    (value, logits), actual = fast_jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert_close(logits[VALID], expected.logits.detach()[VALID])
    np.testing.assert_allclose(value, expected.loss.item(), rtol=1e-5)
    assert_same_gradients(actual, gradients(reference, layout, params))


def test_captions_depend_on_the_image_and_on_no_later_token():
    _, model, _, params = pair(CAPTIONING)
    run = fast_jit(lambda images, ids: model.apply({"params": params}, images, ids, VALID))
    logits = run(IMAGES, IDS)
    changed = np.where(np.arange(IDS.shape[1]) == 2, IDS % 7 + 3, IDS)
    difference = np.abs(run(IMAGES, changed) - logits).max(axis=(0, 2))
    assert (difference[:2] == 0).all() and (difference[2:5] > 1e-2).all()
    assert np.abs(run(IMAGES[::-1], IDS) - logits).max() > 1e-2


# Question answering


def answer(params, question_valid=QUESTION_VALID):
    model = pair(ANSWERING)[1]
    return model.apply({"params": params}, IMAGES, QUESTION_IDS, question_valid, IDS, VALID)


def test_question_answering_gives_the_loss_and_gradients_of_transformers():
    reference, _, layout, params = pair(ANSWERING)
    reference.zero_grad()
    expected = reference(
        torch.tensor(QUESTION_IDS),
        PIXELS,
        decoder_input_ids=DECODER_IDS,
        decoder_attention_mask=TORCH_MASK,
        attention_mask=torch.tensor(QUESTION_VALID).long(),
        labels=LABELS,
    )
    expected.loss.backward()

    def loss(params):
        return text_loss(answer(params), IDS, VALID)

    value, actual = fast_jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, expected.loss.item(), rtol=1e-5)
    assert_same_gradients(actual, gradients(reference, layout, params))


def test_answers_do_not_see_the_padding_of_questions():
    reference, model, _, params = pair(ANSWERING)
    lengths = (5, 2, 4)
    valid = np.arange(5) < np.array(lengths)[:, None]

    @fast_jit
    def run(params):
        def parts(module):
            features = module.image_features(IMAGES)
            question = module.read_question(features, QUESTION_IDS, valid)
            logits = (module.answer_logits(question, v, IDS, VALID) for v in (valid, None))
            return features, question, *logits

        return model.apply({"params": params}, method=parts)

    features, question, logits, seeing = run(params)
    # Row by row and without padding, for transformers 5 ignores the mask of the questions.
    for row, length in enumerate(lengths):
        rows = slice(row, row + 1)
        with torch.no_grad():
            image = reference.vision_model(PIXELS[rows]).last_hidden_state
            states = reference.text_encoder(
                torch.tensor(QUESTION_IDS[rows, :length]), encoder_hidden_states=image
            ).last_hidden_state
            expected = reference.text_decoder(
                DECODER_IDS[rows], TORCH_MASK[rows], encoder_hidden_states=states
            ).logits
        assert_close(features[rows], image)
        assert_close(question[rows, :length], states)
        assert_close(logits[rows][VALID[rows]], expected[VALID[rows]])
    assert_close(seeing[0][VALID[0]], logits[0][VALID[0]])
    assert np.abs(seeing - logits)[1:, 0].max() > 1e-2


def test_images_and_questions_may_be_shared_by_adjacent_rows():
    _, model, _, params = pair(ANSWERING)
    ids, valid = random_texts((6, 3, 4, 5, 2, 6) * 2, seed=3)
    questions, question_valid = random_texts((5, 3, 4, 2, 5, 1), seed=4, length=5)
    run = fast_jit(lambda *inputs: model.apply({"params": params}, *inputs))
    repeated = [np.repeat(x, 2, axis=0) for x in (IMAGES, questions, question_valid)]
    expected = run(np.repeat(repeated[0], 2, axis=0), *repeated[1:], ids, valid)
    actual = run(IMAGES, questions, question_valid, ids, valid)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


# All


@pytest.mark.parametrize("name", CLASSES)
def test_every_parameter_has_its_place_on_the_mesh(name):
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    model = pair(name)[1]
    shapes = shapes_of(model, *inputs(8, name))
    placed = sharding.tree_shardings(shapes, mesh)  # an error where no rule matches
    kernels = [
        placement.spec
        for path, placement in jax.tree.leaves_with_path(placed)
        if jax.tree_util.keystr(path[-1:], simple=True) in ("kernel", "embedding")
    ]
    assert len(kernels) > 10 and all(any(spec) for spec in kernels)


VIT_B = VitConfig()
VIT_L = VitConfig(width=1024, num_layers=24, num_heads=16, mlp_width=4096)


def sizes(model, name):
    """Number of parameters of each part."""
    shapes = shapes_of(model, *inputs(model.vision_config.image_size_px, name))
    return {part: sum(x.size for x in jax.tree.leaves(tree)) for part, tree in shapes.items()}


@pytest.mark.parametrize(("vision", "millions"), [(VIT_B, 224), (VIT_L, 446)])
def test_sizes_are_those_of_the_papers(vision, millions):
    """BLIP Table 3, with all parameters shared, and BLIP in BLIP-2's Table 5."""
    head = 768 * 768 + 768 + 2 * 768 + 30524  # of the decoder
    total = sum(sizes(BlipRetrieval(vision, MedConfig()), RETRIEVAL).values()) + head
    assert round(total / 1e6) == millions


@pytest.mark.parametrize(
    ("make", "name", "count"),
    [
        (BlipRetrieval, RETRIEVAL, 223_744_258),
        (BlipCaptioner, CAPTIONING, 223_971_644),
        (BlipQuestionAnswering, ANSWERING, 361_230_140),
    ],
)
def test_parameters_at_full_size(make, name, count):
    """Those of transformers' classes with ViT-B/16 at 384 px; the temperature is ours."""
    vision = dataclasses.replace(VIT_B, image_size_px=384)
    parts = sizes(make(vision, MedConfig()), name)
    assert parts.pop("temperature", 1) == 1
    assert sum(parts.values()) == count
