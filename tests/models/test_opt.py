"""The OPT language model against transformers; its cache against the full pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxblip.models.attention import causal_mask
from jaxblip.models.layers import empty_cache
from jaxblip.models.opt import OptConfig, OptLanguageModel, token_positions
from reference import opt_params, random_opt

CONFIG = OptConfig(
    vocab_size=13, width=16, num_layers=3, num_heads=2, mlp_width=24, max_positions=32
)
MODEL = OptLanguageModel(CONFIG)
BATCH, LENGTH = 3, 6


def method(params, name):
    return lambda *inputs: MODEL.apply({"params": params}, *inputs, method=name)


@jax.jit
def full_logits(params, ids, valid):
    embeddings = method(params, "embed")(ids)
    hidden, _ = method(params, "__call__")(embeddings, token_positions(valid), causal_mask(valid))
    return method(params, "logits")(hidden)


def token_ids():
    return np.random.default_rng(0).integers(0, 13, (BATCH, LENGTH))


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_logits_are_those_of_transformers(padding):
    reference = random_opt()
    lengths = {"none": [6, 6, 6]}.get(padding, [6, 2, 4])
    valid = np.arange(LENGTH) < np.array(lengths)[:, None]
    valid = valid[:, ::-1] if padding == "left" else valid
    with torch.no_grad():
        expected = reference(
            torch.tensor(token_ids()), attention_mask=torch.tensor(valid.copy()).long()
        ).logits.numpy()
    logits = full_logits(opt_params(reference), token_ids(), jnp.array(valid))
    np.testing.assert_allclose(logits[valid], expected[valid], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunks", [(6,), (1, 1, 1, 1, 1, 1), (3, 1, 2)])
def test_cache_gives_the_same_as_the_full_pass(chunks):
    params, capacity = opt_params(random_opt()), 9
    valid = np.arange(LENGTH) >= np.array([0, 2, 1])[:, None]
    expected = full_logits(params, token_ids(), jnp.array(valid))
    positions = token_positions(jnp.array(valid))
    mask = jnp.pad(causal_mask(jnp.array(valid)), ((0, 0),) * 3 + ((0, capacity - LENGTH),))

    # What stands in places not written yet must not matter.
    cache = jax.tree.map(lambda x: x + 7.0, empty_cache(CONFIG, BATCH, capacity))
    logits, start = [], 0
    run = jax.jit(method(params, "__call__"))
    for size in chunks:
        part = slice(start, start + size)
        embeddings = method(params, "embed")(token_ids()[:, part])
        hidden, cache = run(embeddings, positions[:, part], mask[:, :, part], cache, start)
        logits.append(method(params, "logits")(hidden))
        start += size
    logits = np.concatenate(logits, axis=1)
    np.testing.assert_allclose(logits[valid], expected[valid], rtol=1e-4, atol=1e-4)


def test_no_gradient_to_later_tokens():
    params = opt_params(random_opt())
    valid = jnp.ones((1, LENGTH), bool)

    @jax.jit
    def hidden(embeddings):
        run = method(params, "__call__")
        return run(embeddings, token_positions(valid), causal_mask(valid))[0][0]

    embeddings = method(params, "embed")(token_ids()[:1])
    jacobian = np.abs(jax.jacobian(hidden)(embeddings)[:, :, 0]).sum(axis=(1, 3))  # [output, input]
    np.testing.assert_array_equal(jacobian[np.triu_indices(LENGTH, 1)], 0.0)
    assert (jacobian[np.tril_indices(LENGTH)] > 1e-6).all()


def test_token_positions():
    valid = jnp.array([[1, 1, 1, 0], [0, 0, 1, 1], [1, 0, 1, 1]], bool)
    positions = np.asarray(token_positions(valid))
    np.testing.assert_array_equal(positions[0, :3], [0, 1, 2])
    np.testing.assert_array_equal(positions[1, 2:], [0, 1])
    np.testing.assert_array_equal(positions[2, [0, 2, 3]], [0, 1, 2])
    assert (positions >= 0).all()


def test_positions_of_packed_rows_begin_anew_with_each_text():
    segments = jnp.array([[1, 1, 2, 3, 3, 3, 0], [1, 2, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    positions = np.asarray(token_positions(segments > 0, segments))
    np.testing.assert_array_equal(positions[0, :6], [0, 1, 0, 0, 1, 2])
    np.testing.assert_array_equal(positions[1, :5], [0, 0, 1, 2, 3])
    np.testing.assert_array_equal(positions[2], range(7))
    assert (0 <= positions).all() and (positions < 7).all()
