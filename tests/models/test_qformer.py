"""The Q-Former against transformers, and who sees whom through its gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxblip.models.attention import (
    bidirectional_mask,
    multimodal_causal_mask,
    padding_mask,
    stage1_mask,
    unimodal_mask,
)
from jaxblip.models.qformer import QFormer, QFormerConfig
from reference import qformer_params, randomized

QUERIES, TEXT, WIDTH, VISION_WIDTH, BATCH = 3, 5, 16, 20, 2
CONFIG = QFormerConfig(
    num_query_tokens=QUERIES,
    width=WIDTH,
    num_layers=4,
    num_heads=2,
    mlp_width=24,
    vocab_size=11,
    max_positions=8,
)
VALID = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
TEXT_IDS = np.random.default_rng(1).integers(0, 11, (BATCH, TEXT))
FEATURES = np.random.default_rng(2).normal(size=(BATCH, 6, VISION_WIDTH)).astype(np.float32)


@functools.cache
def reference() -> transformers.Blip2ForImageTextRetrieval:
    blocks = dict(num_hidden_layers=4, num_attention_heads=2, intermediate_size=24)
    config = transformers.Blip2Config(
        vision_config=dict(
            hidden_size=VISION_WIDTH, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, image_size=8, patch_size=4,
        ),
        qformer_config=dict(
            hidden_size=WIDTH, encoder_hidden_size=VISION_WIDTH, vocab_size=11,
            max_position_embeddings=8, use_qformer_text_input=True, **blocks,
        ),
        num_query_tokens=QUERIES,
        image_text_hidden_size=8,
    )
    return randomized(transformers.Blip2ForImageTextRetrieval(config), scale=0.2)


@functools.cache
def params():
    return qformer_params(reference())


@jax.jit
def apply(params, features, text_ids, mask, positions=None, rngs=None):
    """Reads the image and runs the Q-Former, as one compiled function."""

    def both(module):
        image = None if features is None else module.read_image(features)
        return module(image, text_ids, mask, positions)

    return QFormer(CONFIG).apply({"params": params}, method=both, rngs=rngs)


def ours(text_ids=TEXT_IDS, mask=None, features=FEATURES, **kwargs):
    return apply(params(), features, text_ids, mask, **kwargs)


def theirs(text_ids=None, attention_mask=None, queries=True, image=True):
    model = reference()
    text_ids = None if text_ids is None else torch.tensor(text_ids)
    query_tokens = model.query_tokens.expand(BATCH, -1, -1) if queries else None
    with torch.no_grad():
        return model.qformer(
            query_embeds=model.embeddings(input_ids=text_ids, query_embeds=query_tokens),
            query_length=QUERIES if queries else 0,
            attention_mask=None if attention_mask is None else torch.tensor(attention_mask),
            encoder_hidden_states=torch.tensor(FEATURES) if image else None,
        ).last_hidden_state.numpy()


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_queries_alone():
    assert_close(ours(None), theirs())


def test_text_alone():
    hidden = ours(mask=padding_mask(jnp.array(VALID)), features=None)
    expected = theirs(TEXT_IDS, VALID.astype(int), queries=False, image=False)
    assert_close(hidden[VALID], expected[VALID])


def test_unimodal_pass_is_both_alone():
    hidden = ours(mask=unimodal_mask(QUERIES, jnp.array(VALID)))
    assert_close(hidden[:, :QUERIES], theirs())
    expected = theirs(TEXT_IDS, VALID.astype(int), queries=False, image=False)
    assert_close(hidden[:, QUERIES:][VALID], expected[VALID])


def test_bidirectional_pass():
    hidden = ours(mask=bidirectional_mask(QUERIES, jnp.array(VALID)))
    seen = np.concatenate([np.ones((BATCH, QUERIES), bool), VALID], axis=1)
    assert_close(hidden[seen], theirs(TEXT_IDS, seen.astype(int))[seen])


def test_multimodal_causal_pass():
    mask = multimodal_causal_mask(QUERIES, jnp.array(VALID))
    hidden = ours(mask=mask)
    seen = np.concatenate([np.ones((BATCH, QUERIES), bool), VALID], axis=1)
    assert_close(hidden[seen], theirs(TEXT_IDS, np.array(mask))[seen])


def test_packed_pass_is_the_unimodal_and_the_multimodal_causal_pass():
    positions = jnp.tile(jnp.arange(TEXT), 2)
    generated_ids = np.concatenate([np.full((BATCH, 1), 10), TEXT_IDS[:, 1:]], axis=1)
    packed = ours(
        np.concatenate([TEXT_IDS, generated_ids], axis=1),
        stage1_mask(QUERIES, jnp.array(VALID)),
        positions=positions,
    )
    unimodal = ours(mask=unimodal_mask(QUERIES, jnp.array(VALID)))
    causal = ours(generated_ids, multimodal_causal_mask(QUERIES, jnp.array(VALID)))
    assert_close(packed[:, : QUERIES + TEXT], unimodal)
    assert_close(packed[:, QUERIES + TEXT :], causal[:, QUERIES:])


@jax.jit
def influence(params, mask):
    """How much output position i depends on input position j of the sequence [queries, text]."""

    def hidden(offset):
        """All positions' outputs, with `offset` added to each position's input embedding."""
        positions = params["text_embeddings"]["position_embedding"]["embedding"]
        shifted = jnp.asarray(positions).at[:TEXT].add(offset[QUERIES:])
        text = params["text_embeddings"] | {"position_embedding": {"embedding": shifted}}
        queries = params["query_tokens"] + offset[:QUERIES]
        moved = params | {"query_tokens": queries, "text_embeddings": text}
        return apply(moved, FEATURES[:1], TEXT_IDS[:1], mask)[0]

    jacobian = jax.jacobian(hidden)(jnp.zeros((QUERIES + TEXT, WIDTH)))
    return jnp.abs(jacobian).sum(axis=(1, 3))


@pytest.mark.parametrize(
    "make_mask, text_to_queries, queries_to_text, text_to_later_text",
    [
        (unimodal_mask, False, False, True),
        (bidirectional_mask, True, True, True),
        (multimodal_causal_mask, True, False, False),
    ],
)
def test_gradients_show_who_sees_whom(
    make_mask, text_to_queries, queries_to_text, text_to_later_text
):
    strength = np.array(influence(params(), make_mask(QUERIES, jnp.ones((1, TEXT), bool))))
    depends = strength > 0
    assert (strength[depends] > 1e-6).all()
    queries, text = slice(None, QUERIES), slice(QUERIES, None)
    assert depends[queries, queries].all()
    assert (depends[text, queries] == text_to_queries).all()
    assert (depends[queries, text] == queries_to_text).all()
    within_text = depends[text, text]
    assert within_text[np.tril_indices(TEXT)].all()
    assert (within_text[np.triu_indices(TEXT, 1)] == text_to_later_text).all()


def test_text_knows_of_the_image_only_through_the_queries():
    for make_mask, changes in (unimodal_mask, False), (multimodal_causal_mask, True):
        mask = make_mask(QUERIES, jnp.array(VALID))
        difference = ours(mask=mask) - ours(mask=mask, features=FEATURES + 1.0)
        assert (np.abs(difference[:, QUERIES:]).max() > 1e-3) == changes


def test_stage2_has_no_text_parameters():
    config = QFormerConfig(**{**vars(CONFIG), "has_text": False})

    def both(module):
        return module(module.read_image(FEATURES))

    init = jax.eval_shape(lambda: QFormer(config).init(jax.random.key(0), method=both))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(init)]
    assert paths and not any("text" in path for path in paths)


def test_dropout_is_active_exactly_with_a_key():
    plain = ours(None)
    dropped = [ours(None, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 1)]
    assert np.abs(dropped[0] - plain).max() > 0.1
    assert np.abs(dropped[0] - dropped[1]).max() > 0.1
