"""Linear maps in bfloat16: rounded once, and multiplied in bfloat16 by their gradients, too."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxblip.models.layers import Linear

# Whole numbers, whose sums of products are exact in float32, whatever their order.
RNG = np.random.default_rng(0)
X, KERNEL, BIAS = (
    jnp.asarray(RNG.integers(-8, 9, shape) * scale, jnp.bfloat16)
    for shape, scale in (((64, 32), 1.0), ((32, 16), 1.0), (16, 0.25))
)
PARAMS = {"params": {"kernel": KERNEL, "bias": BIAS}}


def test_the_result_is_rounded_once_behind_the_bias():
    sums = X.astype(jnp.float32) @ KERNEL.astype(jnp.float32) + BIAS.astype(jnp.float32)
    expected = np.float32(sums.astype(jnp.bfloat16))
    ours = Linear(16, dtype=jnp.bfloat16).apply(PARAMS, X)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(ours), expected)
    twice = nn.Dense(16, dtype=jnp.bfloat16).apply(PARAMS, X)
    assert (np.float32(twice) != expected).any()


def test_float32_is_that_of_a_dense_layer():
    x, params = jax.tree.map(jnp.float32, (X / 3, PARAMS))
    ours, dense = (layer(16, dtype=jnp.float32).apply(params, x) for layer in (Linear, nn.Dense))
    np.testing.assert_array_equal(ours, dense)


def test_no_product_takes_float32_factors():
    def loss(params, x):
        return (Linear(16, dtype=jnp.bfloat16).apply(params, x).astype(jnp.float32) ** 2).sum()

    lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(PARAMS, X).as_text()
    products = [line for line in lowered.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) >= 2
    for line in products:
        factors, _, _ = line.rpartition(": (")[2].partition(") ->")
        assert factors.count("xbf16>") == 2, line
