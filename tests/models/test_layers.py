"""A stack of blocks gives the same numbers as a loop and written out."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxblip.errors import UserError
from jaxblip.models import layers
from jaxblip.models.clip import ClipTextConfig
from jaxblip.models.llama import LlamaConfig
from jaxblip.models.med import MedConfig
from jaxblip.models.opt import OptConfig
from jaxblip.models.qformer import QFormerConfig
from jaxblip.models.siglip import SiglipTextConfig
from jaxblip.models.t5 import T5_ACTIVATIONS, T5Config
from jaxblip.models.vit import VitConfig
from jaxblip.planning.operations import count_operations

WIDTH, DEPTH = 6, 3


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, scale):
        return nn.tanh(nn.Dense(WIDTH)(x)) * scale, None


def loss(params, x, scales):
    stack = layers.scan_layers(Block, DEPTH, remat="none", in_axes=(0,))()
    return jnp.sum(stack.apply({"params": params}, x, scales)[0] ** 2)


@pytest.mark.parametrize("unrolled_layers", [0, DEPTH])
def test_a_stack_applies_its_blocks_in_order(monkeypatch, unrolled_layers):
    monkeypatch.setattr(layers, "UNROLLED_LAYERS", unrolled_layers)
    rng = np.random.default_rng(0)

    def by_hand(params, x, scales):
        dense = params["Dense_0"]
        for kernel, bias, scale in zip(dense["kernel"], dense["bias"], scales):
            x = jnp.tanh(x @ kernel + bias) * scale
        return jnp.sum(x**2)

    with jax.enable_x64(True):  # so that only another order of the blocks makes a difference
        scales = jnp.asarray([0.5, 2.0, -1.0])
        kernels = jnp.asarray(rng.normal(size=(DEPTH, WIDTH, WIDTH)))
        biases = jnp.asarray(rng.normal(size=(DEPTH, WIDTH)))
        params = {"Dense_0": {"kernel": kernels, "bias": biases}}
        x = jnp.asarray(rng.normal(size=(2, WIDTH)))
        value, gradient = jax.value_and_grad(loss)(params, x, scales)
        expected, expected_gradient = jax.value_and_grad(by_hand)(params, x, scales)
    assert value.dtype == np.float64
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12),
        gradient,
        expected_gradient,
    )


@pytest.mark.parametrize(("depth", "is_loop"), [(4, False), (5, True)])
def test_only_deep_stacks_are_compiled_as_a_loop(depth, is_loop):
    stack = layers.scan_layers(Block, depth, remat="none")()
    x = jnp.zeros((1, WIDTH))
    params = jax.eval_shape(lambda: stack.init(jax.random.key(0), x, 1.0))
    compiled = jax.jit(stack.apply).lower(params, x, 1.0).compile().as_text()
    assert (" while(" in compiled) == is_loop


@pytest.mark.parametrize(
    ("config", "known"),
    [
        (VitConfig, layers.ACTIVATIONS),
        (ClipTextConfig, layers.ACTIVATIONS),
        (SiglipTextConfig, layers.ACTIVATIONS),
        (T5Config, T5_ACTIVATIONS),
    ],
)
def test_an_unknown_activation_names_the_known_ones(config, known):
    with pytest.raises(UserError) as error:
        config(activation="swish")
    expected = f"{config.__name__}: activation='swish' is not known; use one of {', '.join(known)}."
    assert str(error.value) == expected
    assert all(config(activation=name).activation == name for name in known)


def test_policies_of_rematerialisation_trade_memory_for_time_and_change_nothing():
    """Of a stack of real blocks, with more memory in its attention than in the rest."""
    batch, length, width = 4, 64, 16
    x = jnp.asarray(np.random.default_rng(0).normal(size=(batch, length, width)), jnp.float32)

    def gradient(remat):
        stack = layers.scan_layers(layers.PreNormBlock, 6, remat=remat)(
            4, 32, "gelu", 1e-6, nn.initializers.normal(0.3), key_bias=False
        )
        params = jax.jit(stack.init)(jax.random.key(0), x)

        def loss(params, x):
            return jnp.sum(stack.apply(params, x)[0] ** 2)

        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(params, x).compile()
        operations = count_operations(jax.grad(loss, (0, 1)), params, x)
        memory = compiled.memory_analysis().temp_size_in_bytes
        return compiled(params, x), operations, memory

    results, operations, memory = zip(*map(gradient, layers.REMAT_POLICIES), strict=True)
    for result in results[1:]:
        jax.tree.map(
            lambda ours, plain: np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-3),
            result,
            results[0],
        )
    none, full, dots, without_batch = range(4)
    assert memory[none] > 1.2 * memory[dots] > 1.5 * memory[without_batch]
    assert memory[without_batch] > 1.1 * memory[full]
    assert operations[none] == operations[dots] < operations[without_batch] < operations[full]
    assert operations[full] > 1.25 * operations[none]  # almost a forward pass more


@pytest.mark.parametrize(
    "config",
    [VitConfig, ClipTextConfig, MedConfig, QFormerConfig, OptConfig, LlamaConfig, T5Config],
)
def test_an_unknown_rematerialisation_names_the_known_ones(config):
    with pytest.raises(UserError) as error:
        config(remat="some")
    known = "none, full, dots, dots_with_no_batch_dims"
    assert str(error.value) == f"{config.__name__}: remat='some' is not known; use one of {known}."
    assert config(remat="dots").remat == "dots"
