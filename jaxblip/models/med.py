"""The mixture of encoder-decoder (MED): BERT that can look at an image, in three roles.

BLIP paper §3.1 and Fig. 2; reference: `med.py` of salesforce/BLIP and transformers'
`modeling_blip_text.py`. Every block has a cross-attention between its self-attention and its
feed-forward network; what a stack is depends on the inputs alone:

=======================  ================  ===========  ===========
role                     self-attention    looks at     first token
=======================  ================  ===========  ===========
text encoder             `padding_mask`    nothing      [CLS]
image-grounded encoder   `padding_mask`    an image     [ENC]
image-grounded decoder   `causal_mask`     an image     [DEC]
=======================  ================  ===========  ===========

What a stack looks at is its source: the tokens of an image, or, where questions are answered, the
states of a question that has seen the image. Its keys and values depend on nothing else, so they
are computed once (`Med.read_source`) and serve every pass and every generated token.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxblip.models.attention import Mask, padding_mask
from jaxblip.models.bert import PostNormBlock, PredictionHead, TextEmbeddings
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
class MedConfig:
    """Size of a MED; the defaults are BLIP's (BERT-base).

    Attributes:
      vocab_size: rows of the word embedding, `[DEC]` (30522) and `[ENC]` (30523) included.
      remat: what the backward pass computes again, a name of `layers.REMAT_POLICIES`.
      attention: the kernel that computes attention, one of `kernels.KERNELS`.
    """

    vocab_size: int = 30524
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
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

    @property
    def kernel_init(self):
        return nn.initializers.normal(self.initializer_range)

    def cache_shape(self, batch: int, capacity: int) -> tuple[int, int, int, int, int]:
        """Shape of the cached keys, or values: `(layers, batch, capacity, heads, width)`."""
        return self.num_layers, batch, capacity, self.num_heads, self.width // self.num_heads


class MedBlock(PostNormBlock):
    """Self-attention, cross-attention where there is a source, feed-forward; norms behind each."""

    config: MedConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "rows length width"],
        mask: Mask | None,
        source: KeyValues | None,
        source_mask: Mask | None,
        cache: KeyValues | None,
        cache_position: Array | int,
    ) -> tuple[Float[Array, "rows length width"], KeyValues | None]:
        """Returns the output and the updated cache, as `scan_layers` wants it."""
        attended, cache = self.attention("attention")(
            x, mask, cache=cache, cache_position=cache_position
        )
        x = self.add_and_norm(x, attended, "attention_norm")
        if source is not None:
            # Rows that share a source become further queries of one row: nothing is copied.
            grouped = x.reshape(source.key.shape[0], -1, x.shape[-1])
            attended, _ = self.attention("cross_attention")(
                grouped, source_mask, key_values=source
            )
            x = self.add_and_norm(x, attended.reshape(x.shape), "cross_attention_norm")
        return self.feed_forward(x, "mlp"), cache


class Med(nn.Module):
    """Token ids in, hidden states out: either encoder."""

    config: MedConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        c = self.config
        self.text_embeddings = TextEmbeddings(
            c.vocab_size, c.max_positions, c.width, c.kernel_init, self.dtype
        )
        self.embedding_norm = layer_norm(c.layer_norm_epsilon, self.dtype)
        self.embedding_dropout = Dropout(c.hidden_dropout)
        # One projection a block, as one batched product over the source's tokens.
        self.source_key_values = nn.vmap(
            KeyValueProjection,
            in_axes=None,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            axis_size=c.num_layers,
        )(c.num_heads, c.width // c.num_heads, c.kernel_init, self.dtype)
        each_layer, shared = 0, nn.broadcast
        scanned = scan_layers(
            MedBlock,
            c.num_layers,
            remat=c.remat,
            in_axes=(shared, each_layer, shared, each_layer, shared),
        )
        self.layers = scanned(c, self.dtype)

    def read_source(self, features: Float[Array, "batch tokens source_width"]) -> KeyValues:
        """Cross-attention keys and values: `[layers, batch, tokens, heads, head_width]`."""
        return self.source_key_values(features)

    def __call__(
        self,
        ids: Int[Array, "rows length"],
        mask: Mask,
        source: KeyValues | None = None,
        source_valid: Bool[Array, "batch tokens"] | None = None,
        *,
        positions: Int[Array, "#rows length"] | None = None,
        cache: KeyValues | None = None,
        cache_position: Array | int = 0,
    ) -> tuple[Float[Array, "rows length width"], KeyValues | None]:
        """Hidden states, and the updated cache.

        Args:
          ids: `rows` is the source's `batch`, or a multiple of it: adjacent rows, such as beams,
            then share a source.
          mask: who sees whom: `[rows, 1, length or 1, length]`, or `[rows, 1, length, capacity]`
            with a cache.
          source: from `read_source`; None for the text alone.
          source_valid: False at padding of the source; None where it has none, as an image.
          positions: of the tokens; count from 0 by default, padding included.
          cache: of the self-attention, from `layers.empty_cache`; the keys and values of this call
            are written into it at `cache_position`.
        """
        if positions is None:
            positions = jnp.arange(ids.shape[1])[None]
        x = self.text_embeddings(ids, positions)
        x = self.embedding_dropout(self.embedding_norm(x))
        source_mask = None if source_valid is None else padding_mask(source_valid)
        return self.layers(x, mask, source, source_mask, cache, cache_position)


class MedDecoder(Med):
    """A MED with BERT's LM head, tied to the word embedding: the image-grounded decoder."""

    def setup(self):
        super().setup()
        c = self.config
        self.itg_head = PredictionHead(
            c.vocab_size, c.width, c.layer_norm_epsilon, c.kernel_init, self.dtype
        )

    def logits(self, hidden: Float[Array, "*batch width"]) -> Float[Array, "*batch vocab"]:
        """Scores of the next token."""
        return self.text_embeddings.attend(self.itg_head.transform(hidden)) + self.itg_head.bias
