"""What decoder-only language models share: embeddings in, hidden states out, the output head."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxblip.models.attention import Mask
from jaxblip.models.layers import KeyValues, float32_sums


class DecoderLanguageModel(nn.Module):
    """Token embeddings in, hidden states out, and the output head.

    The three methods are separate so that soft tokens can stand among the embeddings, and so that
    logits are computed only where they are needed. An architecture sets up `token_embedding`,
    `layers` and `final_norm`, and says in `layer_inputs` what its layers read.
    """

    config: Any
    dtype: jnp.dtype = jnp.float32

    def layer_inputs(
        self,
        embeddings: Float[Array, "batch length width"],
        positions: Int[Array, "batch length"],
        mask: Mask,
    ) -> tuple[Any, ...]:
        """What goes into the first layer, and what all layers read besides; the cache follows."""
        raise NotImplementedError

    def embed(self, ids: Int[Array, "batch length"]) -> Float[Array, "batch length width"]:
        """Word embeddings of `ids`."""
        return self.token_embedding(ids)

    def __call__(
        self,
        embeddings: Float[Array, "batch length width"],
        positions: Int[Array, "batch length"],
        mask: Mask,
        cache: KeyValues | None = None,
        cache_position: Array | int = 0,
    ) -> tuple[Float[Array, "batch length width"], KeyValues | None]:
        """Hidden states after the final norm, and the updated cache.

        Args:
          positions: 0 for the first token that is no padding (`token_positions`).
          mask: who sees whom, causal: `[batch, 1, length, length]`, or `[batch, 1, length,
            capacity]` with a cache.
          cache: from `empty_cache`; the keys and values of this call are written into it at
            `cache_position`.
        """
        inputs = self.layer_inputs(embeddings.astype(self.dtype), positions, mask)
        x, cache = self.layers(*inputs, cache, cache_position)
        return self.final_norm(x), cache

    def head(self) -> Float[Array, "width vocab"] | None:
        """The word embeddings, where they give the scores of tokens as well; otherwise None."""
        return self.token_embedding.embedding.astype(self.dtype).T

    def logits(self, hidden: Float[Array, "*batch width"]) -> Float[Array, "*batch vocab"]:
        """Scores of the next token."""
        return token_logits(hidden, self.head())


def token_logits(
    hidden: Float[Array, "*batch width"], head: Float[Array, "width vocab"]
) -> Float[Array, "*batch vocab"]:
    """Scores of the next token, in float32, by the `head` of a language model."""
    return float32_sums(hidden, head, (((hidden.ndim - 1,), (0,)), ((), ())))
