"""The Q-Former: learned queries that read an image, beside text that reads the queries.

BLIP-2 paper §3.1 and Fig. 2; reference: LAVIS `Qformer.py`. Its structure, in one place:

- a BERT encoder over the sequence [queries, text];
- the first block of every group of `cross_attention_frequency` also attends to the image, with
  the query positions only;
- query positions and text positions have a feed-forward network each.

Keys and values of the image depend on the image alone, so they are computed once
(`QFormer.read_image`) and serve every pass over the same image.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxblip.errors import UserError
from jaxblip.models.attention import Mask
from jaxblip.models.bert import PostNormBlock, TextEmbeddings
from jaxblip.models.dropout import Dropout
from jaxblip.models.layers import (
    KeyValueProjection,
    KeyValues,
    check_heads,
    check_remat,
    layer_norm,
    scan_layers,
)


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
    """Size of a Q-Former; the defaults are BLIP-2's (BERT-base, 32 queries).

    Attributes:
      has_text: keep the text side (stage 1, InstructBLIP); stage 2 drops it.
      vocab_size: rows of the word embedding, `[DEC]` included.
      remat: what the backward pass computes again, a name of `layers.REMAT_POLICIES`.
      attention: the kernel that computes attention, one of `kernels.KERNELS`.
    """

    num_query_tokens: int = 32
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    cross_attention_frequency: int = 2
    has_text: bool = True
    vocab_size: int = 30523
    max_positions: int = 512
    layer_norm_epsilon: float = 1e-12
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    initializer_range: float = 0.02
    remat: str = "none"
    attention: str = "auto"

    def __post_init__(self):
        check_heads(self)
        check_remat(self)
        if self.num_layers % self.cross_attention_frequency:
            raise UserError(
                f"QFormerConfig: num_layers={self.num_layers} must be a multiple of "
                f"cross_attention_frequency={self.cross_attention_frequency}."
            )

    @property
    def num_groups(self) -> int:
        """How many times the pattern "one block with cross-attention, the rest without" repeats."""
        return self.num_layers // self.cross_attention_frequency

    @property
    def kernel_init(self):
        return nn.initializers.normal(self.initializer_range)


class QFormerBlock(PostNormBlock):
    """One BERT block over [queries, text]."""

    config: QFormerConfig

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "batch queries width"],
        text: Float[Array, "batch text width"],
        mask: Mask | None,
        image: KeyValues | None,
    ) -> tuple[Float[Array, "batch queries width"], Float[Array, "batch text width"]]:
        """Either side may be empty; `image` is None where there is no cross-attention."""
        x = jnp.concatenate([queries, text], axis=1)
        attended, _ = self.attention("attention")(x, mask)
        x = self.add_and_norm(x, attended, "attention_norm")
        queries, text = jnp.split(x, [queries.shape[1]], axis=1)
        if image is not None:
            attended, _ = self.attention("cross_attention")(queries, key_values=image)
            queries = self.add_and_norm(queries, attended, "cross_attention_norm")
        return self._feed_forward(queries, "query"), self._feed_forward(text, "text")

    def _feed_forward(self, x, side):
        return self.feed_forward(x, f"{side}_mlp") if x.shape[1] else x


class QFormerGroup(nn.Module):
    """A block with cross-attention and the blocks without that follow it."""

    config: QFormerConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, image: KeyValues | None, mask: Mask | None):
        for i in range(self.config.cross_attention_frequency):
            block = QFormerBlock(self.config, self.dtype, name=f"block_{i}")
            x = block(*x, mask, image if i == 0 else None)
        return x, None


class QFormer(nn.Module):
    """Query tokens, text embeddings and the transformer over both."""

    config: QFormerConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        c = self.config
        self.query_tokens = self.param(
            "query_tokens", nn.initializers.normal(0.02), (c.num_query_tokens, c.width)
        )
        self.embedding_norm = layer_norm(c.layer_norm_epsilon, self.dtype)
        self.embedding_dropout = Dropout(c.hidden_dropout)
        if c.has_text:
            self.text_embeddings = TextEmbeddings(
                c.vocab_size, c.max_positions, c.width, c.kernel_init, self.dtype
            )
        # One projection a group, as one batched product over the image's tokens.
        self.image_key_values = nn.vmap(
            KeyValueProjection,
            in_axes=None,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            axis_size=c.num_groups,
        )(c.num_heads, c.width // c.num_heads, c.kernel_init, self.dtype)
        scanned = scan_layers(
            QFormerGroup, c.num_groups, remat=c.remat, in_axes=(0, nn.broadcast)
        )
        self.groups = scanned(c, self.dtype)

    def read_image(self, features: Float[Array, "batch tokens vision_width"]) -> KeyValues:
        """Cross-attention keys and values of an image: `[groups, batch, tokens, heads, width]`."""
        return self.image_key_values(features)

    def __call__(
        self,
        image: KeyValues | None,
        text_ids: Int[Array, "batch text"] | None = None,
        mask: Mask | None = None,
        text_positions: Int[Array, " text"] | None = None,
    ) -> Float[Array, "batch length width"]:
        """Hidden states of [queries, text].

        Args:
          image: from `read_image`; None for the text alone, without queries.
          text_ids: None for the queries alone.
          mask: the self-attention mask over [queries, text] (`models.attention`); None lets all
            positions see each other.
          text_positions: position of each text token; counts from 0 by default. The queries have
            no position.
        """
        c = self.config
        if text_ids is not None and not c.has_text:
            raise ValueError("this Q-Former has no text side: build it with has_text=True")
        batch = text_ids.shape[0] if image is None else image.key.shape[1]
        queries = text = jnp.zeros((batch, 0, c.width), self.dtype)
        if image is not None:
            queries = jnp.broadcast_to(self.query_tokens, (batch, *self.query_tokens.shape))
        if text_ids is not None:
            if text_positions is None:
                text_positions = jnp.arange(text_ids.shape[1])
            text = self.text_embeddings(text_ids, text_positions[None])
        x = jnp.concatenate([queries.astype(self.dtype), text], axis=1)
        x = self.embedding_dropout(self.embedding_norm(x))
        (queries, text), _ = self.groups(
            tuple(jnp.split(x, [queries.shape[1]], axis=1)), image, mask
        )
        return jnp.concatenate([queries, text], axis=1)
