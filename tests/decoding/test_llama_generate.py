"""Generation with the LLaMA family against transformers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference_llama import VARIANTS, llama_params, random_llama
from tiny_tasks import fast_jit

from jaxblip.decoding import DecodingConfig, generate
from jaxblip.interop.families.llama import llama_config
from jaxblip.models.llama import LlamaLanguageModel
from jaxblip.sharding import make_mesh, put_batch, tree_shardings

STOP, PAD, WIDTH, PREFIX, NEW = 2, 1, 32, 6, 8
LENGTHS = (6, 3, 1, 4, 6, 2)
SEEDS = (0, 1, 2)
compiled = fast_jit(generate, static_argnames=("language_model", "config"))


@functools.cache
def example(variant, seed):
    """The transformers model, ours, its parameters, and left-padded soft prefixes."""
    reference = random_llama(variant, seed)
    model = LlamaLanguageModel(llama_config(reference.config.to_dict()))
    prefix = np.random.default_rng(seed).normal(size=(len(LENGTHS), PREFIX, WIDTH))
    valid = np.arange(PREFIX) >= PREFIX - np.array(LENGTHS)[:, None]
    return reference, model, llama_params(reference), prefix.astype(np.float32), valid


def config(num_beams):
    return DecodingConfig(
        max_new_tokens=NEW, stop_token_id=STOP, pad_token_id=PAD, num_beams=num_beams
    )


def transformers_generate(reference, prefix, valid, num_beams):
    with torch.no_grad():
        ids = reference.generate(
            inputs_embeds=torch.tensor(prefix),
            attention_mask=torch.tensor(valid).long(),
            max_new_tokens=NEW,
            num_beams=num_beams,
            eos_token_id=STOP,
            pad_token_id=PAD,
            early_stopping=False,
            do_sample=False,
        ).numpy()
    return np.pad(ids, ((0, 0), (0, NEW - ids.shape[1])), constant_values=PAD)


@pytest.mark.parametrize("num_beams", [1, 5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_same_tokens_as_transformers(variant, num_beams):
    stops = set()
    for seed in SEEDS:
        reference, model, params, prefix, valid = example(variant, seed)
        ids = np.asarray(compiled(model, params, prefix, valid, config(num_beams)))
        expected = transformers_generate(reference, prefix, valid, num_beams)
        np.testing.assert_array_equal(ids, expected)
        stops |= {list(row).index(STOP) if STOP in row else NEW for row in ids}
    assert len(stops) > 1 and NEW in stops  # some rows end, and some never do


@pytest.mark.parametrize("num_beams", [1, 5])
def test_padding_may_stand_anywhere_under_a_sliding_window(num_beams):
    for seed in SEEDS:
        _, model, params, prefix, valid = example("mistral with a window", seed)
        expected = compiled(model, params, prefix, valid, config(num_beams))
        scattered, gaps = np.full_like(prefix, 3.0), np.zeros_like(valid)
        for row, length in enumerate(LENGTHS):
            places = np.linspace(0, PREFIX - 1, length).round().astype(int)
            scattered[row, places], gaps[row, places] = prefix[row, PREFIX - length :], True
        ids = compiled(model, params, scattered, gaps, config(num_beams))
        np.testing.assert_array_equal(ids, expected)


def test_same_tokens_on_several_devices():
    _, model, params, prefix, valid = example("qwen3", SEEDS[0])
    expected = compiled(model, params, prefix, valid, config(num_beams=5))
    mesh = make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4])  # a device has one head of keys
    params = jax.device_put(params, tree_shardings(params, mesh))
    batch = put_batch({"prefix": prefix, "valid": valid}, mesh)
    ids = compiled(model, params, batch["prefix"], batch["valid"], config(num_beams=5))
    np.testing.assert_array_equal(ids, expected)


def test_bfloat16():
    _, model, params, prefix, valid = example("mistral with a window", SEEDS[0])
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    model = LlamaLanguageModel(model.config, jnp.bfloat16)
    ids = compiled(model, params, prefix, valid, config(num_beams=1))
    assert ids.shape == (len(LENGTHS), NEW) and ids.dtype == jnp.int32
    assert ((ids >= 0) & (ids < 13)).all()
