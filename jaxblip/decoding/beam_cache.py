"""A cache that the beams of a row share, in which keys and values never move.

Behind the input, which is there once a row, the cache has a place for new token number 0 of each
beam, then one for token number 1 of each beam, and so on. A beam that continues another one looks
at that one's places: a small table of places changes, and nothing else.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxblip.models.attention import Mask


@flax.struct.dataclass
class BeamCache:
    """What a decoder remembers of each row: what it has read, and the new tokens of its beams.

    Attributes:
      cache: `KeyValues` with `prefix + new * beams` positions, for all layers or for each.
      prefix_valid: which of the first positions count.
      paths: the beam in whose place new token number i of a beam stands.
    """

    cache: Any
    prefix_valid: Bool[Array, "batch prefix"]
    paths: Int[Array, "batch beams new"]

    @classmethod
    def with_room(
        cls, cache: Any, prefix_valid: Bool[Array, "batch prefix"], num_beams: int, num_new: int
    ) -> BeamCache:
        """One in which no beam has a new token yet."""
        batch = prefix_valid.shape[0]
        return cls(cache, prefix_valid, jnp.zeros((batch, num_beams, num_new), jnp.int32))

    def place(self, index: Int[Array, ""]) -> Int[Array, ""]:
        """Where new token number `index` of the first beam stands; the other beams' follow."""
        return self.prefix_valid.shape[1] + index * self.paths.shape[1]

    def positions(self, index: Int[Array, ""]) -> Int[Array, "batch beams"]:
        """How many tokens stand before new token number `index` of each beam, padding left out."""
        before = self.prefix_valid.sum(axis=1, keepdims=True) + index
        return jnp.broadcast_to(before, self.paths.shape[:2])

    def with_token(self, index: Int[Array, ""]) -> BeamCache:
        """The cache in which new token number `index` of each beam stands in its own place."""
        own = jnp.arange(self.paths.shape[1])
        return self.replace(paths=self.paths.at[:, :, index].set(own))

    def mask(self, index: Int[Array, ""]) -> Mask:
        """What each beam sees once it has new token number `index`: `[batch, 1, beams, places]`."""
        batch, beams, new = self.paths.shape
        own = self.paths[..., None] == jnp.arange(beams)
        own &= (jnp.arange(new) <= index)[:, None]
        prefix = jnp.broadcast_to(
            self.prefix_valid[:, None], (batch, beams, self.prefix_valid.shape[1])
        )
        return jnp.concatenate([prefix, own.reshape(batch, beams, new * beams)], axis=2)[:, None]

    def reordered(self, parents: Int[Array, "batch beams"]) -> BeamCache:
        """The cache in which beam j of a row continues its former beam `parents[j]`."""
        return self.replace(paths=jnp.take_along_axis(self.paths, parents[:, :, None], axis=1))
