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
from jaxblip.models.siglip import SiglipTextConfig
from jaxblip.models.t5 import T5_ACTIVATIONS, T5Config
from jaxblip.models.vit import VitConfig

WIDTH, DEPTH = 6, 3


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, scale):
        return nn.tanh(nn.Dense(WIDTH)(x)) * scale, None


def loss(params, x, scales):
    stack = layers.scan_layers(Block, DEPTH, remat=False, in_axes=(0,))()
    return jnp.sum(stack.apply({"params": params}, x, scales)[0] ** 2)


@pytest.mark.parametrize("unrolled_layers", [0, DEPTH])
def test_a_stack_applies_its_blocks_in_order(monkeypatch, unrolled_layers):
    monkeypatch.setattr(layers, "UNROLLED_LAYERS", unrolled_layers)
    rng = np.random.default_rng(0)
    kernels = rng.normal(size=(DEPTH, WIDTH, WIDTH)).astype(np.float32)
    biases = rng.normal(size=(DEPTH, WIDTH)).astype(np.float32)
    scales = jnp.asarray([0.5, 2.0, -1.0])
    params = {"Dense_0": {"kernel": jnp.asarray(kernels), "bias": jnp.asarray(biases)}}
    x = jnp.asarray(rng.normal(size=(2, WIDTH)), jnp.float32)

    def by_hand(params, x, scales):
        dense = params["Dense_0"]
        for kernel, bias, scale in zip(dense["kernel"], dense["bias"], scales):
            x = jnp.tanh(x @ kernel + bias) * scale
        return jnp.sum(x**2)

    value, gradient = jax.value_and_grad(loss)(params, x, scales)
    expected, expected_gradient = jax.value_and_grad(by_hand)(params, x, scales)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    # Gradients go up to 3 here: a sum that comes to almost 0 is as exact as its terms.
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5),
        gradient,
        expected_gradient,
    )


@pytest.mark.parametrize(("depth", "is_loop"), [(4, False), (5, True)])
def test_only_deep_stacks_are_compiled_as_a_loop(depth, is_loop):
    stack = layers.scan_layers(Block, depth, remat=False)()
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
