"""Dropout whose masks cost next to nothing."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Key


def keep_mask(key: Key[Array, ""], rate: float, shape: Sequence[int]) -> Bool[Array, "..."]:
    """True with probability 1 - `rate`, each element by itself.

    A hash of the element's number, mixed twice with words drawn from the key. `jax.random` takes
    twenty rounds an element, which on a CPU is a fifth of a training step of the Q-Former; a mask
    needs no such strength. The constants are those of C. Wellons's hash prospector ("lowbias32").
    """
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    number = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):  # wraps around where there are more than 2^32
        step = jnp.uint32(stride % 2**32)
        number += jax.lax.broadcasted_iota(jnp.uint32, tuple(shape), axis) * step
        stride *= shape[axis]
    bits = _mixed(_mixed(number ^ first) ^ second)
    return bits >= jnp.uint32(round(rate * 2**32))


def _mixed(x: Array) -> Array:
    """A bijection of 32 bits, each bit of whose result depends on each of `x`."""
    x = (x ^ x >> 16) * jnp.uint32(0x7FEB352D)
    x = (x ^ x >> 15) * jnp.uint32(0x846CA68B)
    return x ^ x >> 16


def drop(x: Array, rate: float, key: Key[Array, ""]) -> Array:
    """`x` with a share of `rate` zeros, the rest scaled up so that the mean stays."""
    return jnp.where(keep_mask(key, rate, x.shape), x / (1.0 - rate), 0.0)


class Dropout(nn.Module):
    """Dropout that is active exactly when the caller passes a `dropout` key."""

    rate: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if not self.rate or not self.has_rng("dropout"):
            return x
        return drop(x, self.rate, self.make_rng("dropout"))
