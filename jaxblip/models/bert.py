"""The parts of BERT that the Q-Former and BLIP are built from: embeddings, sub-layers, LM head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxblip.models.dropout import Dropout
from jaxblip.models.layers import (
    ACTIVATIONS,
    Attention,
    FeedForward,
    Linear,
    float32_sums,
    layer_norm,
)


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

    def attend(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch vocab"]:
        """Scores of every word in float32: the tied output embedding."""
        words = self.token_embedding.embedding.astype(self.dtype)
        return float32_sums(x, words.T, (((x.ndim - 1,), (0,)), ((), ())))


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
        self.dense = Linear(self.width, kernel_init=self.kernel_init, dtype=self.dtype)
        self.norm = layer_norm(self.epsilon, self.dtype)
        self.bias = self.param("bias", nn.initializers.zeros, (self.vocab_size,))

    def transform(self, x: Float[Array, "batch text width"]) -> Float[Array, "batch text width"]:
        return self.norm(ACTIVATIONS["gelu"](self.dense(x)))


class PostNormBlock(nn.Module):
    """What blocks of BERT are made of: sub-layers with a residual around and a norm behind each.

    Attributes:
      config: a `QFormerConfig` or a `MedConfig`.
    """

    config: Any
    dtype: jnp.dtype = jnp.float32

    def attention(self, name: str) -> Attention:
        """Attention of the block's width, without residual and norm."""
        c = self.config
        return Attention(
            c.num_heads,
            c.width // c.num_heads,
            c.kernel_init,
            attention_dropout=c.attention_dropout,
            kernel=c.attention,
            dtype=self.dtype,
            name=name,
        )

    def feed_forward(
        self, x: Float[Array, "batch length width"], name: str
    ) -> Float[Array, "batch length width"]:
        """The network `name`, its residual, and the norm `{name}_norm`."""
        c = self.config
        update = FeedForward(c.mlp_width, "gelu", c.kernel_init, self.dtype, name=name)(x)
        return self.add_and_norm(x, update, f"{name}_norm")

    def add_and_norm(
        self,
        x: Float[Array, "batch length width"],
        update: Float[Array, "batch length width"],
        name: str,
    ) -> Float[Array, "batch length width"]:
        """The residual with dropout, and the norm behind it."""
        c = self.config
        update = Dropout(c.hidden_dropout)(update)
        return layer_norm(c.layer_norm_epsilon, self.dtype, name)(x + update)
