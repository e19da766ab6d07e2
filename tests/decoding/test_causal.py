"""Reading the input and writing the tokens, compiled apart: what is shared, donated and copied."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxblip.decoding import CausalDecoder, DecodingConfig, generate
from jaxblip.decoding.generation import decode, prefill
from jaxblip.models.opt import OptConfig, OptLanguageModel

LAYERS, WIDTH, VOCAB, BATCH, PREFIX, NEW = 5, 16, 48, 3, 7, 6  # so many layers are a loop
MODEL = OptLanguageModel(
    OptConfig(VOCAB, WIDTH, LAYERS, num_heads=2, mlp_width=40, max_positions=32)
)
STATIC = ("language_model", "max_new_tokens", "num_beams")
read = jax.jit(prefill, static_argnames=STATIC)
write = jax.jit(decode, static_argnames=("language_model", "config"), donate_argnames="state")


def example(batch=BATCH):
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(batch, PREFIX, WIDTH)).astype(np.float32)
    valid = np.arange(PREFIX) >= rng.integers(0, PREFIX, (batch, 1))
    ids = jnp.zeros((1, 1), int)

    def init(model):
        hidden, _ = model(model.embed(ids), ids, jnp.ones((1, 1, 1, 1), bool))
        return model.logits(hidden)

    params = MODEL.init(jax.random.key(1), method=init)["params"]
    return jax.tree.map(lambda x: x * 5, params), embeddings, valid


def config(num_beams, **fields):
    return DecodingConfig(NEW, 2, 1, num_beams=num_beams, **fields)


@pytest.mark.parametrize("num_beams", [1, 4])
def test_apart_they_are_the_whole(num_beams):
    params, *inputs = example()
    search = config(num_beams)
    logits, state = read(MODEL, params, *inputs, NEW, num_beams)
    # The beams of a row share what was read; each has a place for each of its tokens.
    assert len(state.cache) == LAYERS
    assert state.cache[0].key.shape == (BATCH, PREFIX + NEW * num_beams, 2, WIDTH // 2)
    ids, last = write(MODEL, params, logits, state, search)
    assert state.cache[0].key.is_deleted() and not last.cache[0].key.is_deleted()
    np.testing.assert_array_equal(ids, generate(MODEL, params, *inputs, search))
    assert len({tuple(row) for row in np.asarray(ids)}) == BATCH


@pytest.mark.parametrize("num_beams", [1, 4])
def test_a_step_copies_neither_weights_nor_cache(num_beams):
    params, *inputs = example()
    state = read.eval_shape(MODEL, params, *inputs, NEW, num_beams)
    compiled = write.lower(MODEL, params, *state, config(num_beams)).compile()
    cache = state[1].cache
    in_place = compiled.memory_analysis().alias_size_in_bytes
    assert in_place >= sum(leaf.size * 4 for leaf in jax.tree.leaves(cache))
    text = compiled.as_text()
    body = re.search(r"while\(.*body=(%[\w.-]+)", text)[1]
    body = text[text.index(f"\n{body} ") :].split("\n}\n")[0]
    copied = re.findall(r"= f32\[([\d,]+)\]\S* (?:copy|dynamic-slice)\(", body)
    sizes = {"x".join(map(str, leaf.shape)) for leaf in jax.tree.leaves((cache, params))}
    assert not {size.replace(",", "x") for size in copied} & sizes
    assert "while(" not in body  # no loop over layers, which would cut them out of their stack


@pytest.mark.parametrize("num_beams", [1, 4])
def test_layers_taken_apart_change_no_scores(num_beams):
    params, *inputs = example()
    ids = jax.random.randint(jax.random.key(0), (NEW, BATCH * num_beams), 0, VOCAB)
    parents = jax.random.randint(jax.random.key(1), (NEW, BATCH, num_beams), 0, num_beams)

    @jax.jit
    def scores(params):
        of_both = []
        for by_layer in (False, True):
            decoder = CausalDecoder(MODEL, params, by_layer=by_layer)
            logits, state = decoder.prefill(*inputs, NEW, num_beams)
            of_both.append([logits])
            for index in range(3):
                logits, state = decoder.step(ids[index], jnp.int32(index), state)
                state = decoder.reorder(state, parents[index])
                of_both[-1].append(logits)
        return of_both

    for stacked, apart in zip(*scores(params), strict=True):
        np.testing.assert_allclose(apart, stacked, rtol=1e-5, atol=1e-5)


def test_one_row_in_bfloat16_is_as_among_others():
    params, embeddings, valid = example()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    model = OptLanguageModel(MODEL.config, jnp.bfloat16)
    expected = generate(model, params, embeddings, valid, config(1))
    for row in range(BATCH):
        own = slice(row, row + 1)
        alone = generate(model, params, embeddings[own], valid[own], config(1))
        np.testing.assert_array_equal(alone, expected[own])
