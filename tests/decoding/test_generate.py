"""Generation against transformers, against a search without cache, and under changed inputs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxblip.decoding import DecodingConfig, generate
from jaxblip.errors import UserError
from jaxblip.models.opt import OptConfig, OptLanguageModel
from jaxblip.sharding import make_mesh, put_batch, tree_shardings
from slow_search import slow_generate
from reference import opt_params, random_opt

STOP, PAD, WIDTH, PREFIX, NEW = 2, 1, 16, 5, 9
MODEL = OptLanguageModel(
    OptConfig(vocab_size=13, width=16, num_layers=3, num_heads=2, mlp_width=24, max_positions=32)
)
LENGTHS = (5, 3, 1, 4, 5, 2)
SEEDS = (24, 10)  # random models that stop at different places, and in some rows never
SEARCHES = [(1, 1.0), (3, -1.0), (3, 0.0), (3, 1.0), (5, -1.0), (5, 0.0), (5, 1.0)]
compiled = jax.jit(generate, static_argnames=("language_model", "config"))


def config(num_beams=1, length_penalty=1.0, **fields):
    fields = dict(max_new_tokens=NEW, stop_token_id=STOP, pad_token_id=PAD) | fields
    return DecodingConfig(num_beams=num_beams, length_penalty=length_penalty, **fields)


def example(seed=SEEDS[0], lengths=LENGTHS):
    """A model, its parameters, and left-padded soft prefixes of these lengths."""
    reference = random_opt(seed)
    prefix = np.random.default_rng(seed).normal(size=(len(lengths), PREFIX, WIDTH))
    valid = np.arange(PREFIX) >= PREFIX - np.array(lengths)[:, None]
    return reference, opt_params(reference), prefix.astype(np.float32), valid


def run(params, prefix, valid, search):
    return np.asarray(compiled(MODEL, params, prefix, valid, search))


def transformers_generate(reference, prefix, valid, search):
    with torch.no_grad():
        ids = reference.generate(
            inputs_embeds=torch.tensor(prefix),
            attention_mask=torch.tensor(valid).long(),
            max_new_tokens=search.max_new_tokens,
            min_new_tokens=search.min_new_tokens,
            num_beams=search.num_beams,
            length_penalty=search.length_penalty,
            eos_token_id=search.stop_token_id,
            pad_token_id=search.pad_token_id,
            early_stopping=False,
            do_sample=False,
        ).numpy()
    missing = search.max_new_tokens - ids.shape[1]
    return np.pad(ids, ((0, 0), (0, missing)), constant_values=search.pad_token_id)


@pytest.mark.parametrize("num_beams, length_penalty", SEARCHES)
def test_same_tokens_as_transformers_and_as_without_cache(num_beams, length_penalty):
    search = config(num_beams, length_penalty)
    for seed in SEEDS:
        reference, params, prefix, valid = example(seed)
        ids = run(params, prefix, valid, search)
        np.testing.assert_array_equal(ids, transformers_generate(reference, prefix, valid, search))
        np.testing.assert_array_equal(ids, slow_generate(MODEL, params, prefix, valid, search))


@pytest.mark.parametrize("num_beams, length_penalty", [(1, 1.0), (3, -1.0), (5, 1.0)])
def test_min_new_tokens(num_beams, length_penalty):
    reference, params, prefix, valid = example()
    search = config(num_beams, length_penalty, min_new_tokens=4)
    free = run(params, prefix, valid, config(num_beams, length_penalty))
    assert (free[:, :4] == STOP).any()
    ids = run(params, prefix, valid, search)
    assert not (ids[:, :4] == STOP).any()
    np.testing.assert_array_equal(ids, transformers_generate(reference, prefix, valid, search))
    np.testing.assert_array_equal(ids, slow_generate(MODEL, params, prefix, valid, search))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_stop_token_ends_a_row_and_padding_follows(num_beams):
    _, params, prefix, valid = example()
    ids = run(params, prefix, valid, config(num_beams))
    stops = [list(row).index(STOP) if STOP in row else NEW for row in ids]
    assert len(set(stops)) > 2 and NEW in stops
    for row, stop in zip(ids, stops, strict=True):
        assert (row[stop + 1 :] == PAD).all()


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_row_that_never_stops_fills_the_width(num_beams):
    _, params, prefix, valid = example()
    ids = run(params, prefix, valid, config(num_beams, stop_token_id=-1, pad_token_id=99))
    assert ((ids >= 0) & (ids < 13)).all()


@pytest.mark.parametrize("num_beams", [1, 3])
def test_padding_side_does_not_matter(num_beams):
    _, params, prefix, left = example()
    search = config(num_beams)
    expected = run(params, prefix, left, search)

    right = left[:, ::-1]
    moved = np.full_like(prefix, 3.0)  # values at padding must not matter either
    scattered, gaps = np.full_like(prefix, -2.0), np.zeros_like(left)
    for row, length in enumerate(LENGTHS):
        moved[row, :length] = prefix[row, PREFIX - length :]
        places = np.linspace(0, PREFIX - 1, length).round().astype(int)
        scattered[row, places], gaps[row, places] = moved[row, :length], True
    np.testing.assert_array_equal(run(params, moved, right, search), expected)
    np.testing.assert_array_equal(run(params, scattered, gaps, search), expected)
    row, length = 1, LENGTHS[1]
    alone = run(params, moved[row : row + 1, :length], np.ones((1, length), bool), search)
    np.testing.assert_array_equal(alone[0], expected[row])


@pytest.mark.parametrize("num_beams", [1, 3])
def test_rows_do_not_depend_on_each_other(num_beams):
    _, params, prefix, valid = example()
    search = config(num_beams)
    ids = run(params, prefix, valid, search)
    order = np.array([3, 0, 5, 1, 4, 2])
    np.testing.assert_array_equal(run(params, prefix[order], valid[order], search), ids[order])
    others = np.roll(prefix, 1, axis=0)
    others[2] = prefix[2]
    np.testing.assert_array_equal(run(params, others, valid, search)[2], ids[2])


@pytest.mark.parametrize("num_beams", [1, 3])
def test_one_compilation_for_all_inputs_of_a_shape(num_beams):
    traces = []

    @jax.jit
    def traced(params, prefix, valid):
        traces.append(prefix.shape)
        return generate(MODEL, params, prefix, valid, config(num_beams))

    results = []
    for seed, lengths in enumerate([(5, 3, 1, 4), (1, 1, 2, 5), (5, 5, 5, 5)]):
        _, params, prefix, valid = example(seed, lengths)
        results.append(np.asarray(traced(params, prefix, valid)))
    assert len(traces) == 1
    assert (results[0] != results[1]).any()


@pytest.mark.parametrize("num_beams", [1, 3])
def test_same_tokens_on_several_devices(num_beams):
    _, params, prefix, valid = example()
    mesh = make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4])
    expected = run(params, prefix, valid, config(num_beams))
    params = jax.device_put(params, tree_shardings(params, mesh))
    batch = put_batch({"prefix": prefix, "valid": valid}, mesh)
    ids = run(params, batch["prefix"], batch["valid"], config(num_beams))
    np.testing.assert_array_equal(ids, expected)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_bfloat16(num_beams):
    _, params, prefix, valid = example()
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    model = OptLanguageModel(MODEL.config, jnp.bfloat16)
    ids = compiled(model, params, prefix, valid, config(num_beams))
    assert ids.shape == (6, NEW) and ids.dtype == jnp.int32
    assert ((ids >= 0) & (ids < 13)).all()


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(min_new_tokens=10), "min_new_tokens=10"),
        (dict(num_beams=0), "num_beams=0"),
    ],
)
def test_impossible_configs(fields, message):
    with pytest.raises(UserError, match=message):
        config(**fields)


@pytest.mark.parametrize(
    "search, message",
    [
        (config(max_new_tokens=28), "needs 33 positions.*has 32"),
        (config(num_beams=7), "num_beams=7 needs a vocabulary of more than 14"),
    ],
)
def test_configs_that_do_not_fit_the_model(search, message):
    _, params, prefix, valid = example()
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda: generate(MODEL, params, prefix, valid, search))


def test_config_is_hashable_and_frozen():
    assert hash(config()) == hash(config())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().num_beams = 2
