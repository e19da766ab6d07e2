"""The LLaMA family against transformers; its cache against the full pass; sizes to the digit."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import PartitionSpec
from reference_llama import VARIANTS, llama_params, random_llama
from tiny_tasks import fast_jit
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from jaxblip.errors import UserError
from jaxblip.interop.families.llama import llama_config
from jaxblip.models.attention import causal_mask
from jaxblip.models.layers import empty_cache
from jaxblip.models.llama import (
    LlamaConfig,
    LlamaLanguageModel,
    RmsNorm,
    last_visible,
    rotary_frequencies,
    rotary_tables,
    rotate,
)
from jaxblip.models.opt import token_positions
from jaxblip.sharding import make_mesh, tree_shardings

BATCH, LENGTH, CAPACITY, VOCAB = 3, 8, 11, 13
# Deep enough that the blocks are a loop, which a shallow stack is not.
DEEP = "llama, deep and recomputed"


@functools.cache
def example(variant):
    """The transformers model, ours, its parameters, and token ids."""
    if variant == DEEP:
        reference = random_llama("llama", num_hidden_layers=5)
        config = dataclasses.replace(llama_config(reference.config.to_dict()), remat="full")
    else:
        reference = random_llama(variant)
        config = llama_config(reference.config.to_dict())
    ids = np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH))
    return reference, LlamaLanguageModel(config), llama_params(reference), ids


def valid_tokens(padding):
    valid = np.arange(LENGTH) < np.array([LENGTH, 2, 5])[:, None]
    return {"right": valid, "left": valid[:, ::-1].copy()}[padding]


def method(model, params, name):
    return lambda *inputs: model.apply({"params": params}, *inputs, method=name)


@fast_jit(static_argnums=0)
def embed(model, params, ids):
    return method(model, params, "embed")(ids)


@fast_jit(static_argnums=0)
def logits_and_gradients(model, params, embeddings, ids, valid):
    """Logits, and the gradient of the language-modelling loss with respect to `embeddings`."""

    def loss(embeddings):
        positions, mask = token_positions(valid), causal_mask(valid)
        hidden, _ = method(model, params, "__call__")(embeddings, positions, mask)
        logits = method(model, params, "logits")(hidden)
        log_probs = jax.nn.log_softmax(logits[:, :-1])
        losses = -jnp.take_along_axis(log_probs, ids[:, 1:, None], axis=2)[..., 0]
        counted = valid[:, :-1] & valid[:, 1:]
        return jnp.sum(losses * counted) / jnp.sum(counted), logits

    gradients, logits = jax.grad(loss, has_aux=True)(embeddings)
    return logits, gradients


@pytest.mark.parametrize("variant", [*VARIANTS, DEEP])
def test_logits_and_gradients_are_those_of_transformers(variant):
    reference, model, params, ids = example(variant)
    for padding in ("left", "right"):
        valid = valid_tokens(padding)
        embeddings = reference.get_input_embeddings()(torch.tensor(ids)).detach()
        np.testing.assert_array_equal(embed(model, params, ids), embeddings)
        embeddings.requires_grad_()
        expected = reference(
            inputs_embeds=embeddings,
            attention_mask=torch.tensor(valid).long(),
            position_ids=torch.tensor(np.maximum(valid.cumsum(axis=1) - 1, 0)),
        ).logits
        counted = valid[:, :-1] & valid[:, 1:]
        torch.nn.functional.cross_entropy(
            expected[:, :-1][counted], torch.tensor(ids)[:, 1:][counted]
        ).backward()

        logits, gradients = logits_and_gradients(
            model, params, embeddings.detach().numpy(), ids, valid
        )
        expected = expected.detach().numpy()
        np.testing.assert_allclose(logits[valid], expected[valid], rtol=1e-4, atol=1e-5)
        expected = embeddings.grad.numpy()
        assert np.abs(expected[valid]).max() > 1e-2
        np.testing.assert_allclose(gradients[valid], expected[valid], rtol=1e-3, atol=1e-5)
        np.testing.assert_array_equal(gradients[~valid], 0.0)


@fast_jit(static_argnums=0)
def cached_pass(model, params, ids, positions, mask, cache, start):
    embeddings = method(model, params, "embed")(ids)
    run = method(model, params, "__call__")
    hidden, cache = run(embeddings, positions, mask, cache, start)
    return method(model, params, "logits")(hidden), cache


@pytest.mark.parametrize("variant", [*VARIANTS, DEEP])
def test_cache_gives_the_same_as_the_full_pass(variant):
    _, model, params, ids = example(variant)
    # What stands in places not written yet must not matter.
    cache = jax.tree.map(lambda x: x + 7.0, empty_cache(model.config, BATCH, CAPACITY))
    assert cache.key.shape[:4] == (
        model.config.num_layers, BATCH, CAPACITY, model.config.num_kv_heads
    )  # fmt: skip
    for padding in ("left", "right"):
        valid = jnp.array(valid_tokens(padding))
        expected, _ = logits_and_gradients(model, params, embed(model, params, ids), ids, valid)
        positions = token_positions(valid)
        mask = jnp.pad(causal_mask(valid), ((0, 0),) * 3 + ((0, CAPACITY - LENGTH),))
        logits, start = [], 0
        for size in (4, 1, 1, 1, 1):
            part = slice(start, start + size)
            out, cache = cached_pass(
                model, params, ids[:, part], positions[:, part], mask[:, :, part], cache, start
            )
            logits.append(out)
            start += size
        logits = np.concatenate(logits, axis=1)
        np.testing.assert_allclose(logits[valid], expected[valid], rtol=1e-4, atol=1e-5)


def test_grouped_keys_are_not_repeated():
    _, model, params, _ = example("llama")
    heads, kv_heads, head_width = model.config.attention_shape
    assert (heads, kv_heads) == (4, 1)
    capacity = 17  # no other size has this factor
    cache = empty_cache(model.config, BATCH, capacity)
    mask = jnp.ones((BATCH, 1, 1, capacity), bool)
    ids = positions = jnp.zeros((BATCH, 1), int)
    jaxpr = jax.make_jaxpr(cached_pass.__wrapped__, static_argnums=0)(
        model, params, ids, positions, mask, cache, 0
    )
    shapes = [tuple(map(int, s.split(","))) for s in re.findall(r"f32\[([\d,]+)\]", str(jaxpr))]
    sizes = [math.prod(shape) for shape in shapes if capacity in shape]
    assert max(sizes) == cache.key.size < BATCH * capacity * heads * head_width


def test_sliding_window_counts_tokens_wherever_padding_stands():
    _, model, params, _ = example("mistral with a window")
    rng = np.random.default_rng(1)
    tokens = 5
    ids, texts = rng.integers(0, VOCAB, (3, LENGTH)), rng.integers(0, VOCAB, tokens)
    places = np.array([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7], [0, 2, 3, 6, 7]])
    valid = np.zeros((3, LENGTH), bool)
    np.put_along_axis(valid, places, True, axis=1)
    np.put_along_axis(ids, places, texts[None], axis=1)
    logits, _ = logits_and_gradients(model, params, embed(model, params, ids), ids, valid)
    first, *others = np.asarray(logits)[valid].reshape(3, tokens, VOCAB)
    for other in others:
        np.testing.assert_allclose(other, first, rtol=1e-4, atol=1e-5)


def test_last_visible():
    mask = causal_mask(jnp.array([[1, 1, 0, 1, 1], [0, 0, 1, 1, 0]], bool))
    expected = [
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 1, 1]],
        [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 0]],
    ]
    np.testing.assert_array_equal(last_visible(mask, 2)[:, 0], np.array(expected, bool))
    np.testing.assert_array_equal(last_visible(mask, 5), mask)


ROPES = {
    "LLaMA 2": {"rope_theta": 10000.0},
    "long Vicuna": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0},
    "LLaMA 3.1": {
        "rope_theta": 500000.0,
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


@pytest.mark.parametrize("name", ROPES)
def test_rotary_frequencies(name):
    reference = transformers.LlamaConfig(
        max_position_embeddings=131072, rope_parameters=dict(ROPES[name])
    )
    expected = LlamaRotaryEmbedding(reference).inv_freq.numpy()
    frequencies = rotary_frequencies(llama_config(reference.to_dict()))
    assert frequencies.dtype == np.float32 and frequencies.shape == (64,)
    np.testing.assert_allclose(frequencies, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotated_products_depend_on_distance_only(dtype):
    config = LlamaConfig(width=32, num_heads=2)
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 4, 2, 16)).astype(dtype)

    def products(shift):
        positions = jnp.arange(4)[None]
        rotated = rotate(query, rotary_tables(config, positions + shift))
        return jnp.einsum(
            "bqhd,bkhd->bhqk", rotated, rotate(key, rotary_tables(config, positions + shift))
        )

    assert rotate(query, rotary_tables(config, jnp.arange(4)[None])).dtype == dtype
    tolerance = 1e-3 if dtype == "float32" else 0.1  # what rounding gives, with values of up to 10
    np.testing.assert_allclose(*map(np.float32, (products(0), products(1999))), atol=tolerance)
    assert np.abs(np.float32(products(0) - jnp.einsum("bqhd,bkhd->bhqk", query, key))).max() > 0.5


def test_rms_norm_rounds_as_transformers_does():
    x = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32) * 3
    scale = np.random.default_rng(1).normal(size=32).astype(np.float32)
    reference = LlamaRMSNorm(32, eps=1e-3).to(torch.bfloat16)
    reference.weight.data = torch.tensor(scale, dtype=torch.bfloat16)
    expected = reference(torch.tensor(x, dtype=torch.bfloat16)).detach().float().numpy()
    norm = RmsNorm(1e-3, jnp.bfloat16)
    ours = norm.apply({"params": {"scale": scale}}, x.astype(jnp.bfloat16))
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours.astype(np.float32), expected)


# Full sizes, from abstract shapes

SMOLLM2 = LlamaConfig(
    vocab_size=49152, width=576, num_layers=30, num_heads=9, num_kv_heads=3, mlp_width=1536,
    max_positions=8192, norm_epsilon=1e-5, tied_head=True, rope_theta=100000.0,
)  # fmt: skip
LLAMA_3_8B = LlamaConfig(
    vocab_size=128256, num_kv_heads=8, mlp_width=14336, max_positions=8192, rope_theta=500000.0
)
QWEN2_HALF_B = LlamaConfig(
    vocab_size=151936, width=896, num_layers=24, num_heads=14, num_kv_heads=2, mlp_width=4864,
    tied_head=True, qkv_bias=True,
)  # fmt: skip
QWEN3_0_6B = LlamaConfig(
    vocab_size=151936, width=1024, num_layers=28, num_heads=16, num_kv_heads=8, head_width=128,
    mlp_width=3072, tied_head=True, qk_norm=True,
)  # fmt: skip
SIZES = {
    "Vicuna-7B": (LlamaConfig(), 6_738_415_616),
    "Vicuna-13B": (
        LlamaConfig(width=5120, num_layers=40, num_heads=40, mlp_width=13824),
        13_015_864_320,
    ),
    "SmolLM2-135M": (SMOLLM2, 134_515_008),
    "LLaMA-3-8B": (LLAMA_3_8B, 8_030_261_248),
    "Mistral-7B": (LlamaConfig(num_kv_heads=8, mlp_width=14336), 7_241_732_096),
    "Qwen2-0.5B": (QWEN2_HALF_B, 494_032_768),
    "Qwen3-0.6B": (QWEN3_0_6B, 596_049_920),
}


def abstract_params(config):
    def everything(model, ids):
        valid = jnp.ones(ids.shape, bool)
        hidden, _ = model(model.embed(ids), token_positions(valid), causal_mask(valid))
        return model.logits(hidden)

    init = nn.init(everything, LlamaLanguageModel(config))
    return jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 4), int))["params"]


@pytest.mark.parametrize("name", SIZES)
def test_number_of_parameters(name):
    config, expected = SIZES[name]
    leaves = jax.tree.leaves(abstract_params(config))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == expected


def test_every_parameter_has_its_place_on_the_mesh():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    config = dataclasses.replace(
        QWEN3_0_6B, tied_head=False, qkv_bias=True, out_bias=True, mlp_bias=True
    )
    params = abstract_params(config)
    specs = jax.tree.map(lambda s: s.spec, tree_shardings(params, mesh))
    layers, axes = specs["layers"], PartitionSpec
    assert specs["lm_head"]["kernel"] == axes("fsdp", "tensor")
    assert layers["attention"]["key"]["kernel"] == axes(None, "fsdp", "tensor", None)
    assert layers["attention"]["key_norm"]["scale"] == axes(None, None)
    assert layers["mlp"]["gate"]["kernel"] == axes(None, "fsdp", "tensor")


def test_parameters_are_those_of_the_variant():
    for variant in VARIANTS:
        _, model, params, _ = example(variant)
        expected = jax.tree.map(lambda x: x.shape, abstract_params(model.config))
        assert jax.tree.map(lambda x: x.shape, params) == expected, variant


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 30, "num_heads": 4}, "num_heads=4 does not divide width=30"),
        ({"num_heads": 8, "num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=8"),
        ({"width": 20, "num_heads": 4}, "heads are 5 wide"),
        ({"head_width": 7}, "heads are 7 wide"),
        ({"sliding_window": -1}, "sliding_window=-1"),
        ({"rope_type": "yarn"}, "rope_type='yarn' must be one of default, linear, llama3"),
        ({"rope_type": "linear", "rope_factor": 0.5}, "rope_factor=0.5"),
        ({"rope_type": "llama3", "rope_low_freq_factor": 4.0}, "rope_low_freq_factor=4.0"),
    ],
)
def test_impossible_configs(fields, message):
    with pytest.raises(UserError, match=message):
        LlamaConfig(**fields)
