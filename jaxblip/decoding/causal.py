"""Generation with a decoder-only language model that continues a prefix of embeddings."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxblip.errors import UserError
from jaxblip.models.attention import causal_mask
from jaxblip.models.layers import KeyValues, empty_cache
from jaxblip.models.opt import token_positions


@flax.struct.dataclass
class CausalState:
    """What the decoder remembers of each row: the prefix, then the new tokens.

    Attributes:
      cache: `[layers, rows, prefix + new, heads, head_width]`.
      prefix_valid: which of the cache's first positions count.
    """

    cache: KeyValues
    prefix_valid: Bool[Array, "rows prefix"]

    @property
    def num_prefix(self) -> int:
        return self.prefix_valid.shape[1]

    @property
    def num_new(self) -> int:
        return self.cache.key.shape[2] - self.num_prefix


@dataclasses.dataclass(frozen=True)
class CausalDecoder:
    """A decoder-only language model with its parameters, as the searches want it (`Decoder`)."""

    language_model: nn.Module
    params: Any

    def start_ids(self, batch: int) -> None:
        """There are none: what comes before the first new token is embeddings."""

    def prefill(
        self,
        embeddings: Float[Array, "batch prefix width"],
        valid: Bool[Array, "batch prefix"],
        max_new_tokens: int,
        copies: int = 1,
    ) -> tuple[Float[Array, "batch vocab"], CausalState]:
        """Reads the prefix once a row, and gives `copies` adjacent rows of state for each.

        Args:
          embeddings: soft tokens, word embeddings (`embed`), or both.
          valid: False at padding, which may stand anywhere; at least one True a row.

        Returns:
          The scores of the first new token, and the state of `batch * copies` rows.

        Raises:
          UserError: when prefix and new tokens exceed the model's `max_positions`.
        """
        batch, prefix = valid.shape
        length, limit = prefix + max_new_tokens, self.language_model.config.max_positions
        if length > limit:
            raise UserError(
                f"decoding max_new_tokens={max_new_tokens} after a prefix of {prefix} tokens needs "
                f"{length} positions, but the language model has {limit}: lower max_new_tokens."
            )
        cache = empty_cache(
            self.language_model.config, batch, prefix + max_new_tokens, self.language_model.dtype
        )
        mask = jnp.pad(causal_mask(valid), ((0, 0), (0, 0), (0, 0), (0, max_new_tokens)))
        hidden, cache = self._apply(embeddings, token_positions(valid), mask, cache, 0)
        last_valid = prefix - 1 - jnp.argmax(valid[:, ::-1], axis=1)
        hidden = jnp.take_along_axis(hidden, last_valid[:, None, None], axis=1)[:, 0]
        cache = jax.tree.map(lambda x: jnp.repeat(x, copies, axis=1), cache)
        return self._logits(hidden), CausalState(cache, jnp.repeat(valid, copies, axis=0))

    def step(
        self, ids: Int[Array, " rows"], index: Int[Array, ""], state: CausalState
    ) -> tuple[Float[Array, "rows vocab"], CausalState]:
        """Reads new token number `index` (from 0) of each row; scores the one after it."""
        prefix = state.num_prefix
        new_valid = jnp.arange(state.num_new) <= index
        new_valid = jnp.broadcast_to(new_valid, (ids.shape[0], state.num_new))
        mask = jnp.concatenate([state.prefix_valid, new_valid], axis=1)[:, None, None, :]
        positions = state.prefix_valid.sum(axis=1, keepdims=True) + index
        embeddings = self.language_model.apply(
            {"params": self.params}, ids[:, None], method="embed"
        )
        hidden, cache = self._apply(embeddings, positions, mask, state.cache, prefix + index)
        return self._logits(hidden[:, 0]), state.replace(cache=cache)

    def reorder(self, state: CausalState, parents: Int[Array, "batch beams"]) -> CausalState:
        """The state in which beam j of a row of the batch continues its former beam `parents[j]`.

        Only the new tokens move: the beams of a row share their prefix.
        """
        return state.replace(cache=reordered(state.cache, parents, state.num_prefix))

    def _apply(self, *inputs):
        return self.language_model.apply({"params": self.params}, *inputs)

    def _logits(self, hidden):
        return self.language_model.apply({"params": self.params}, hidden, method="logits")


def reordered(
    cache: KeyValues, parents: Int[Array, "batch beams"], num_shared: int = 0
) -> KeyValues:
    """The cache in which beam j of a row of the batch continues its former beam `parents[j]`.

    Args:
      cache: `[layers, batch * beams, positions, heads, head_width]`.
      num_shared: so many positions at the front, which the beams of a row share, stay in place.
    """
    batch, beams = parents.shape

    def take(cache):
        moving = cache[:, :, num_shared:]
        grouped = moving.reshape(moving.shape[0], batch, beams, *moving.shape[2:])
        # Indexing within each row, not over all rows, stays local when the batch is sharded.
        taken = jnp.take_along_axis(grouped, parents[None, :, :, None, None, None], axis=2)
        return cache.at[:, :, num_shared:].set(taken.reshape(moving.shape))

    return jax.tree.map(take, cache)
