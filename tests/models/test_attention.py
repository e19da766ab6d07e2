"""Masks against loops over their definitions, attention against PyTorch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxblip.models import attention

QUERIES, TEXT = 3, 4
VALID = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]], bool)


def mask_by_loops(sees):
    """`sees(row, i, j)` over the sequence [queries, text]."""
    length = QUERIES + TEXT
    mask = np.zeros((len(VALID), 1, length, length), bool)
    for row, i, j in np.ndindex(len(VALID), length, length):
        mask[row, 0, i, j] = sees(row, i, j)
    return mask


def both_queries(i, j):
    return i < QUERIES and j < QUERIES


def is_text(i):
    return i >= QUERIES


def valid_text(row, j):
    return is_text(j) and VALID[row, j - QUERIES]


def test_unimodal_mask():
    expected = mask_by_loops(
        lambda row, i, j: both_queries(i, j) or (is_text(i) and valid_text(row, j))
    )
    np.testing.assert_array_equal(attention.unimodal_mask(QUERIES, jnp.array(VALID)), expected)


def test_bidirectional_mask():
    expected = mask_by_loops(lambda row, i, j: j < QUERIES or valid_text(row, j))
    np.testing.assert_array_equal(attention.bidirectional_mask(QUERIES, jnp.array(VALID)), expected)


def sees_multimodal_causal(row, i, j):
    return both_queries(i, j) or (is_text(i) and (j < QUERIES or (valid_text(row, j) and j <= i)))


def test_multimodal_causal_mask():
    np.testing.assert_array_equal(
        attention.multimodal_causal_mask(QUERIES, jnp.array(VALID)),
        mask_by_loops(sees_multimodal_causal),
    )


def test_stage1_mask():
    """[queries, contrastive text, generated text]: the two texts never see each other."""
    length = QUERIES + 2 * TEXT
    expected = np.zeros((len(VALID), 1, length, length), bool)
    for row, i, j in np.ndindex(len(VALID), length, length):
        generated_i, generated_j = i >= QUERIES + TEXT, j >= QUERIES + TEXT
        if generated_i and (generated_j or j < QUERIES):
            sees = sees_multimodal_causal(row, i - TEXT, j - TEXT if generated_j else j)
        elif is_text(i) and not generated_i:
            sees = is_text(j) and not generated_j and valid_text(row, j)
        else:
            sees = both_queries(i, j)
        expected[row, 0, i, j] = sees
    np.testing.assert_array_equal(attention.stage1_mask(QUERIES, jnp.array(VALID)), expected)


def test_causal_and_padding_mask():
    causal = np.zeros((len(VALID), 1, TEXT, TEXT), bool)
    for row, i, j in np.ndindex(len(VALID), TEXT, TEXT):
        causal[row, 0, i, j] = j <= i and VALID[row, j]
    np.testing.assert_array_equal(attention.causal_mask(jnp.array(VALID)), causal)
    np.testing.assert_array_equal(attention.padding_mask(jnp.array(VALID))[:, 0, 0], VALID)


def test_causal_mask_of_packed_rows():
    segments = jnp.array([[1, 1, 2, 2, 2, 0], [1, 2, 3, 3, 0, 0]])
    mask = np.asarray(attention.causal_mask(segments > 0, segments))
    for row, i, j in np.ndindex(2, 6, 6):
        expected = j <= i and segments[row, i] == segments[row, j] > 0
        assert mask[row, 0, i, j] == expected


def random_inputs(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    shapes = [(3, 5, 2, 8), (3, 7, 2, 8), (3, 7, 2, 8)]
    query, key, value = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    mask = rng.random((3, 1, 5, 7)) < 0.5
    mask[..., 0] = True
    return query * scale, key * scale, value, mask


def torch_attention(query, key, value, mask=None):
    query, key, value = (torch.tensor(x).transpose(1, 2) for x in (query, key, value))
    mask = None if mask is None else torch.tensor(mask)
    attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
    return attended.transpose(1, 2).numpy()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dropout_rate", [0.0, 1e-9])
def test_attention_is_torchs(masked, dropout_rate):
    query, key, value, mask = random_inputs()
    mask = mask if masked else None
    ours = attention.dot_product_attention(
        query, key, value, mask=mask, dropout_rate=dropout_rate, dropout_rng=jax.random.key(0)
    )
    np.testing.assert_allclose(ours, torch_attention(query, key, value, mask), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dropout_rate", [0.0, 1e-9])
def test_a_query_that_sees_nothing_gets_the_mean_of_the_values(dropout_rate):
    query, key, value, mask = random_inputs()
    mask[1, :, 2] = False
    ours = attention.dot_product_attention(
        query, key, value, mask=mask, dropout_rate=dropout_rate, dropout_rng=jax.random.key(0)
    )
    np.testing.assert_allclose(ours[1, 2], value[1].mean(axis=0), rtol=1e-5, atol=1e-6)


def test_softmax_is_in_float32():
    query, key, value, mask = random_inputs(scale=3.0)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (query, key, value)]
    ours = attention.dot_product_attention(*half, mask=mask)
    assert ours.dtype == jnp.bfloat16
    exact = torch_attention(*(np.array(x, np.float32) for x in half), mask)
    # Logits reach 100 here: rounded to bfloat16 they would be off by up to 0.25.
    np.testing.assert_allclose(np.array(ours, np.float32), exact, rtol=2e-2, atol=1e-2)


def test_dropout_drops_weights_and_keeps_the_mean():
    query, key, value, mask = random_inputs()

    def dropped(rng):
        return attention.dot_product_attention(
            query, key, value, mask=mask, dropout_rate=0.3, dropout_rng=rng
        )

    samples = jax.vmap(dropped)(jax.random.split(jax.random.key(0), 1000))
    assert samples.std(axis=0).min() > 0.01
    expected = torch_attention(query, key, value, mask)
    np.testing.assert_allclose(samples.mean(axis=0), expected, atol=0.1)
