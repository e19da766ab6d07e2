"""Masks of dropout: as random as they need to be, and the same for the same key."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxblip.models.dropout import Dropout, drop, keep_mask

SHAPE = (64, 96, 128)
SIZE = math.prod(SHAPE)


def masks(number, rate=0.1):
    keys = jax.random.split(jax.random.key(1), number)
    return np.stack([np.asarray(keep_mask(key, rate, SHAPE)) for key in keys])


@pytest.mark.parametrize("rate", [0.1, 0.37, 0.5])
def test_the_share_is_the_rate(rate):
    mask = masks(1, rate)[0]
    deviation = math.sqrt(rate * (1 - rate) / SIZE)
    assert abs((1 - mask.mean()) - rate) < 4 * deviation
    # Along each axis too: no row, column or layer has more than chance gives.
    for axis in range(3):
        others = tuple(i for i in range(3) if i != axis)
        share = 1 - mask.mean(axis=others)
        deviation = math.sqrt(rate * (1 - rate) * SHAPE[axis] / SIZE)
        assert abs(share - rate).max() < 5 * deviation
        assert share.std() == pytest.approx(deviation, rel=0.3)


def test_elements_do_not_depend_on_their_neighbours():
    """Correlation of each element with those at short distances and at powers of two."""
    noise = masks(1)[0].ravel() - 0.9
    noise = noise / noise.std()
    for distance in (1, 2, 3, 4, 7, 8, 16, 96, 128, 256, 1024, 4096, 65536, 12288):
        correlation = (noise[:-distance] * noise[distance:]).mean()
        assert abs(correlation) < 5 / math.sqrt(SIZE), distance


def test_patterns_of_eight_elements_are_as_frequent_as_chance_has_it():
    bits = masks(1, rate=0.5)[0].reshape(-1, 8)
    counts = np.bincount(np.packbits(bits, axis=1)[:, 0], minlength=256)
    expected = len(bits) / 256
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 255 + 5 * math.sqrt(2 * 255)


def test_masks_of_different_keys_are_independent():
    noise = (masks(6) - 0.9).reshape(6, -1)
    noise /= noise.std(axis=1, keepdims=True)
    for one, other in itertools.combinations(noise, 2):
        assert abs((one * other).mean()) < 5 / math.sqrt(SIZE)
        # Nor is one a shifted copy of the other.
        spectrum = np.fft.rfft(one) * np.conj(np.fft.rfft(other))
        assert abs(np.fft.irfft(spectrum)).max() / SIZE < 7 / math.sqrt(SIZE)


def test_the_same_key_gives_the_same_mask_sharded_or_not():
    key = jax.random.key(3)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    sharded = jax.jit(lambda key: keep_mask(key, 0.1, SHAPE), out_shardings=spec)(key)
    np.testing.assert_array_equal(sharded, keep_mask(key, 0.1, SHAPE))
    assert (np.asarray(sharded) != masks(1)[0]).any()


def test_what_is_kept_is_scaled_up_so_that_the_mean_stays():
    x = jnp.full(SHAPE, 2.0)
    dropped = np.asarray(drop(x, 0.25, jax.random.key(0)))
    assert set(np.unique(dropped)) == {0.0, np.float32(2 / 0.75)}
    assert dropped.mean() == pytest.approx(2.0, rel=0.01)
    gradient = np.asarray(jax.grad(lambda x: drop(x, 0.25, jax.random.key(0)).sum())(x))
    np.testing.assert_array_equal(gradient > 0, dropped > 0)


def test_dropout_is_active_where_a_key_is_given():
    x = jnp.ones((4, 8))
    module = Dropout(0.5)
    np.testing.assert_array_equal(module.apply({}, x), x)
    given = {"dropout": jax.random.key(0)}
    assert set(np.unique(module.apply({}, x, rngs=given))) == {0.0, 2.0}
    np.testing.assert_array_equal(Dropout(0.0).apply({}, x, rngs=given), x)
