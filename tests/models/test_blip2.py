"""Sizes of ViT-g to the digit, and both stages against passes composed by hand."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_tasks import (
    DEC,
    QUERIES,
    ROWS,
    TEXT,
    WIDTH,
    fast_jit,
    random_batch,
    random_params,
    tiny_config,
)

from jaxblip.config import load_config
from jaxblip.models.attention import (
    bidirectional_mask,
    multimodal_causal_mask,
    unimodal_mask,
)
from jaxblip.models.blip2 import Blip2Stage2
from jaxblip.models.opt import OptLanguageModel
from jaxblip.models.vit import VisionTransformer, VitConfig
from jaxblip.tasks import make_task
from jaxblip.tasks.base import normalize_images

CONFIGS = Path(__file__).parents[2] / "configs" / "blip2"


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("size", "expected"), [(224, 985_894_528), (364, 986_485_888)])
def test_vit_g_without_its_last_block(size, expected):
    vision = load_config(str(CONFIGS / "stage1_vit_g.py")).model.vision
    module = VisionTransformer(VitConfig(image_size_px=size, **vision))
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    assert count(shapes) == expected


# Stage 1


@functools.cache
def stage1():
    """The model, its parameters, image features, text ids and mask."""
    task = make_task(tiny_config("stage1"))
    batch = random_batch(task)
    params = random_params(task)
    features = np.random.default_rng(3).normal(size=(ROWS, 5, 24)).astype(np.float32)
    return task.model, params, *map(jnp.asarray, (features, batch["text_ids"], batch["text_mask"]))


def apply(params, function, *args):
    return stage1()[0].apply({"params": params}, *args, method=function)


def linear(params, x):
    return x @ params["kernel"] + params["bias"]


def normalized(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def packed(params, features, text_ids, valid):
    def passes(model):
        image, text, hidden = model.contrast_and_caption(
            model.read_image(features), text_ids, valid
        )
        return image, text, model.word_logits(hidden)

    return apply(params, passes)


def separate(params, features, text_ids, valid):
    """ITC under the uni-modal mask, ITG under the multimodal causal mask; heads by hand."""

    def itc(model):
        return model.qformer(model.read_image(features), text_ids, unimodal_mask(QUERIES, valid))

    def itg(model):
        decoder_ids = jnp.concatenate([jnp.full((ROWS, 1), DEC), text_ids[:, 1:]], axis=1)
        mask = multimodal_causal_mask(QUERIES, valid)
        return model.qformer(model.read_image(features), decoder_ids, mask)

    hidden, decoded = apply(params, itc), apply(params, itg)[:, QUERIES:-1]
    head = params["itg_head"]
    x = linear(head["dense"], decoded)
    x = x * (1 + jax.scipy.special.erf(x / math.sqrt(2))) / 2
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / jnp.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-12)
    x = x * head["norm"]["scale"] + head["norm"]["bias"]
    words = params["qformer"]["text_embeddings"]["token_embedding"]["embedding"]
    return (
        normalized(linear(params["image_projection"], hidden[:, :QUERIES])),
        normalized(linear(params["text_projection"], hidden[:, QUERIES])),
        x @ words.T + head["bias"],
    )


def test_the_packed_pass_equals_two_separate_ones():
    _, params, features, text_ids, valid = stage1()
    rng = np.random.default_rng(5)

    def value_and_gradients(passes):
        @fast_jit
        def compute(params, features, weights):
            outputs, pull = jax.vjp(lambda p, f: passes(p, f, text_ids, valid), params, features)
            return outputs, pull(weights)

        return compute

    shapes = jax.eval_shape(separate, params, features, text_ids, valid)
    weights = tuple(rng.normal(size=shape.shape).astype(np.float32) for shape in shapes)
    ours, grads = value_and_gradients(packed)(params, features, weights)
    theirs, expected = value_and_gradients(separate)(params, features, weights)
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5)
    for (path, x), y in zip(
        jax.tree.leaves_with_path(grads), jax.tree.leaves(expected), strict=True
    ):
        error, size = np.abs(x - y).max(), np.abs(y).max()
        assert error <= 2e-5 * size + 1e-4, jax.tree_util.keystr(path)
    # The comparison would mean nothing if the gradients were zero.
    used = ("query_mlp", "text_mlp", "image_key_values", "text_embeddings", "itg_head")
    for part in used:
        sizes = [
            np.abs(leaf).max()
            for path, leaf in jax.tree.leaves_with_path(expected[0])
            if part in jax.tree_util.keystr(path)
        ]
        assert max(sizes) > 0.1, part


def test_embeddings_of_one_side_alone_are_those_of_the_packed_pass():
    _, params, features, text_ids, valid = stage1()

    @fast_jit
    def both(params):
        image, text, _ = packed(params, features, text_ids, valid)

        def alone(model):
            return model.embed_images(model.read_image(features)), model.embed_texts(
                text_ids, valid
            )

        return (image, text), apply(params, alone)

    for x, y in zip(*both(params), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(y, axis=-1), 1.0, rtol=1e-5)


def test_matching_averages_the_head_over_the_queries():
    _, params, features, text_ids, valid = stage1()

    @fast_jit
    def both(params):
        def hidden(model):
            mask = bidirectional_mask(QUERIES, valid)
            return model.qformer(model.read_image(features), text_ids, mask)

        def match(model):
            return model.match(model.read_image(features), text_ids, valid)

        queries = apply(params, hidden)[:, :QUERIES]
        logits = [linear(params["itm_head"], queries[:, i]) for i in range(QUERIES)]
        return apply(params, match), sum(logits) / QUERIES

    np.testing.assert_allclose(*both(params), rtol=1e-4, atol=1e-5)


def test_stage1_text_padding_does_not_matter():
    _, params, features, text_ids, valid = stage1()

    @fast_jit
    def outputs(text_ids):
        def match(model):
            return model.match(model.read_image(features), text_ids, valid)

        _, text, words = packed(params, features, text_ids, valid)
        return text, words, apply(params, match)

    text, words, match = outputs(text_ids)
    other_text, other_words, other_match = outputs(np.where(valid, text_ids, 3))
    assert (np.where(valid, text_ids, 3) != text_ids).any()
    np.testing.assert_allclose(other_text, text, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(other_match, match, rtol=1e-5, atol=1e-6)
    scored = valid[:, 1:]
    np.testing.assert_allclose(other_words[scored], words[scored], rtol=1e-5, atol=1e-5)


# Stage 2


@functools.cache
def stage2():
    task = make_task(tiny_config("stage2"))
    batch = random_batch(task)
    images = np.asarray(normalize_images(batch["image"]))
    return task.model, random_params(task), images, batch["text_ids"], batch["text_mask"]


def logits_with(params, images, text_ids, valid, visual_offset=0.0, text_offset=0.0):
    """Logits with something added to the visual tokens and to the words' embeddings."""

    def add(call, args, kwargs, context):
        output = call(*args, **kwargs)
        if isinstance(context.module, Blip2Stage2) and context.method_name == "visual_tokens":
            return output + visual_offset
        if isinstance(context.module, OptLanguageModel) and context.method_name == "embed":
            return output + text_offset
        return output

    with nn.intercept_methods(add):
        return stage2()[0].apply({"params": params}, images, text_ids, valid)


logits = fast_jit(logits_with)


def test_a_position_is_predicted_from_what_precedes_it():
    _, params, images, text_ids, _ = stage2()
    everything = np.ones((1, TEXT), bool)

    @fast_jit
    def strengths(visual, text):
        def scores(visual, text):
            return logits_with(params, images[:1], text_ids[:1], everything, visual, text)[0]

        jacobians = jax.jacobian(scores, argnums=(0, 1))(visual, text)
        return [jnp.abs(jacobian).sum(axis=(1, 3)) for jacobian in jacobians]

    of_visual, of_text = strengths(jnp.zeros((QUERIES, WIDTH)), jnp.zeros((TEXT, WIDTH)))
    # Position t scores the text token t: it knows all visual tokens, and the text before t.
    assert of_visual.shape == (TEXT, QUERIES) and (of_visual > 1e-4).all()
    assert np.array_equal(of_text > 0, np.tril(np.ones((TEXT, TEXT), bool), -1))
    assert (of_text[np.tril_indices(TEXT, -1)] > 1e-4).all()


def test_the_image_influences_every_position():
    _, params, images, text_ids, valid = stage2()
    changed = logits(params, images[::-1], text_ids, valid) - logits(
        params, images, text_ids, valid
    )
    assert (np.abs(changed).max(axis=-1)[valid] > 1e-3).all()


def test_stage2_text_padding_does_not_matter():
    _, params, images, text_ids, valid = stage2()
    expected = logits(params, images, text_ids, valid)
    other_ids = np.where(valid, text_ids, 3)
    assert (other_ids != text_ids).any()
    np.testing.assert_allclose(
        logits(params, images, other_ids, valid)[valid], expected[valid], rtol=1e-5, atol=1e-5
    )


def test_logits_are_those_of_the_language_model_after_the_visual_tokens():
    model, params, images, text_ids, _ = stage2()
    length = QUERIES + TEXT

    @fast_jit
    def plain(params):
        """The prefix is [visual tokens, text]; everything after it is the language model's."""
        language_model = OptLanguageModel(model.language_model_config)
        own = params["language_model"]
        rows = []
        for row in range(2):
            visual = model.apply(
                {"params": params}, images[row : row + 1], method="visual_tokens"
            )
            words = own["token_embedding"]["embedding"][text_ids[row]]
            embedded = jnp.concatenate([visual, words[None]], axis=1)
            hidden, _ = language_model.apply(
                {"params": own},
                embedded,
                jnp.arange(length)[None],
                jnp.tril(jnp.ones((length, length), bool))[None, None],
            )
            rows.append((hidden @ own["token_embedding"]["embedding"].T)[0])
        return jnp.stack(rows)

    everything = np.ones((2, TEXT), bool)
    np.testing.assert_allclose(
        logits(params, images[:2], text_ids[:2], everything),
        plain(params)[:, QUERIES - 1 : -1],
        rtol=1e-4,
        atol=1e-4,
    )
