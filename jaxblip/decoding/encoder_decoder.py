"""Generation with an encoder-decoder language model that reads embeddings."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxblip.models.layers import KeyValues, empty_cache


@flax.struct.dataclass
class EncoderDecoderState:
    """What the decoder remembers of each row, and the inputs that its rows look at.

    Attributes:
      cache: of the start token and the new tokens, `[layers, rows, new, heads, head_width]`. The
        last new token is never read, so there is room for as many as there are new tokens.
      encoder: `[layers, batch, input, heads, head_width]`; the rows (beams) of an input share it.
    """

    cache: KeyValues
    encoder: KeyValues
    encoder_valid: Bool[Array, "batch input"]


@dataclasses.dataclass(frozen=True)
class EncoderDecoder:
    """An encoder-decoder model with its parameters, as the searches want it (`Decoder`)."""

    language_model: nn.Module
    params: Any

    def start_ids(self, batch: int) -> Int[Array, "batch 1"]:
        """What the decoder reads before the first new token."""
        return jnp.full((batch, 1), self.language_model.config.start_token_id, jnp.int32)

    def prefill(
        self,
        embeddings: Float[Array, "batch input width"],
        valid: Bool[Array, "batch input"],
        max_new_tokens: int,
        num_beams: int = 1,
    ) -> tuple[Float[Array, "batch vocab"], EncoderDecoderState]:
        """Encodes each row and reads the start token once for all its beams.

        Args:
          embeddings: what the encoder reads: soft tokens, word embeddings (`embed`), or both.
          valid: False at padding; at least one True a row.

        Returns:
          The scores of the first new token, and the state of `batch * num_beams` rows.
        """
        batch = valid.shape[0]
        encoder = self._apply("read_encoder", self._apply("encode", embeddings, valid))
        cache = empty_cache(
            self.language_model.config, batch, max_new_tokens, self.language_model.dtype
        )
        state = EncoderDecoderState(cache, encoder, valid)
        logits, state = self._read(self.start_ids(batch)[:, 0], 0, state)
        cache = jax.tree.map(lambda x: jnp.repeat(x, num_beams, axis=1), state.cache)
        return logits, state.replace(cache=cache)

    def step(
        self, ids: Int[Array, " rows"], index: Int[Array, ""], state: EncoderDecoderState
    ) -> tuple[Float[Array, "rows vocab"], EncoderDecoderState]:
        """Reads new token number `index` (from 0) of each row; scores the one after it."""
        return self._read(ids, index + 1, state)  # place 0 is the start token's

    def reorder(
        self, state: EncoderDecoderState, parents: Int[Array, "batch beams"]
    ) -> EncoderDecoderState:
        """The state in which beam j of each row continues that row's former beam `parents[j]`."""
        return state.replace(cache=_reordered(state.cache, parents))

    def _read(self, ids, place, state):
        """Scores behind the tokens `ids`, which go to `place` of the cache."""
        mask = (jnp.arange(state.cache.key.shape[2]) <= place)[None, None, None]
        embeddings = self._apply("embed", ids[:, None])
        hidden, cache = self._apply(
            "decode", embeddings, mask, state.encoder, state.encoder_valid, state.cache, place
        )
        return self._apply("logits", hidden[:, 0]), state.replace(cache=cache)

    def _apply(self, method, *inputs):
        return self.language_model.apply({"params": self.params}, *inputs, method=method)


def _reordered(cache: KeyValues, parents: Int[Array, "batch beams"]) -> KeyValues:
    """The cache in which beam j of a row of the batch continues its former beam `parents[j]`.

    Args:
      cache: `[layers, batch * beams, positions, heads, head_width]`.
    """
    batch, beams = parents.shape

    def take(cache):
        grouped = cache.reshape(cache.shape[0], batch, beams, *cache.shape[2:])
        # Indexing within each row, not over all rows, stays local when the batch is sharded.
        taken = jnp.take_along_axis(grouped, parents[None, :, :, None, None, None], axis=2)
        return taken.reshape(cache.shape)

    return jax.tree.map(take, cache)
