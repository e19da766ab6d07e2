"""The parts of BERT that the Q-Former is built from: the embeddings and the LM head."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxblip.models.layers import ACTIVATIONS, layer_norm


class TextEmbeddings(nn.Module):
    """Word plus position embeddings, before the norm that text shares with the queries."""

    vocab_size: int
    max_positions: int
    width: int
    embedding_init: Callable
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        def embed(rows):
            return nn.Embed(
                rows, self.width, embedding_init=self.embedding_init, dtype=self.dtype
            )

        self.token_embedding = embed(self.vocab_size)
        self.position_embedding = embed(self.max_positions)

    def __call__(
        self, ids: Int[Array, "batch text"], positions: Int[Array, "#batch text"]
    ) -> Float[Array, "batch text width"]:
        return self.token_embedding(ids) + self.position_embedding(positions)

    def attend(self, x: Float[Array, "batch text width"]) -> Float[Array, "batch text vocab"]:
        """Scores of every word: the tied output embedding."""
        return self.token_embedding.attend(x)


class PredictionHead(nn.Module):
    """BERT's masked-LM head without the output embedding, which is tied to the words'.

    `transform` maps hidden states to the space of the word embeddings; `bias` is added to the
    scores of the words.
    """

    vocab_size: int
    width: int
    epsilon: float
    kernel_init: Callable
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.dense = nn.Dense(self.width, kernel_init=self.kernel_init, dtype=self.dtype)
        self.norm = layer_norm(self.epsilon, self.dtype)
        self.bias = self.param("bias", nn.initializers.zeros, (self.vocab_size,))

    def transform(self, x: Float[Array, "batch text width"]) -> Float[Array, "batch text width"]:
        return self.norm(ACTIVATIONS["gelu"](self.dense(x)))
