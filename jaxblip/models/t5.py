"""Encoder-decoder language models of the T5 architecture: T5, T5 v1.1 and FlanT5.

Raffel et al. 2020 (arXiv 1910.10683), Chung et al. 2022 (arXiv 2210.11416); reference
implementation: transformers `modeling_t5.py`. What sets T5 apart from the other transformers here:

- positions enter as a bias on the attention scores, by distance; one table for each of the two
  stacks, the same in all of its layers (transformers keeps it in layer 0);
- attention scores are not divided by sqrt(head width): the initialization makes up for it;
- norms only scale (RMSNorm), and no linear map has a bias;
- keys and values of the encoder's output depend on the input alone, so they are computed once
  (`T5LanguageModel.read_encoder`) and serve every pass of the decoder over it.

In bfloat16 all matrix products are bfloat16 with float32 accumulation; attention scores, softmax,
the statistics of the norms and the scores of words are float32. The `down` map is no exception:
transformers keeps its counterpart (`wo`) in float32 only where the model is float16, whose range
the feed-forward network of the large sizes exceeds. bfloat16 has the range of float32. float16 is
not supported.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxblip.errors import UserError
from jaxblip.models.attention import Mask, dot_product_attention, padding_mask
from jaxblip.models.decoder import token_logits
from jaxblip.models.dropout import Dropout
from jaxblip.models.layers import (
    ACTIVATIONS,
    KeyValues,
    check_activation,
    check_remat,
    float32_sums,
    scan_layers,
)

# FlanT5 was trained with the tanh form of GELU; BLIP-2 runs it with the exact form.
T5_ACTIVATIONS = {name: ACTIVATIONS[name] for name in ("relu", "gelu")} | {
    "gelu_new": partial(nn.gelu, approximate=True)
}


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Size of a T5 language model; the defaults are those of T5 v1.1 and FlanT5 base.

    Attributes:
      num_layers: of the encoder.
      num_decoder_layers: of the decoder.
      head_width: of each head; `num_heads * head_width` need not be `width`.
      gated: the feed-forward network multiplies its activation with a second linear map (v1.1).
      activation: "relu" (T5), "gelu_new" (T5 v1.1, FlanT5) or "gelu" (FlanT5 in BLIP-2).
      tied_head: the word embedding, scaled by width ** -0.5, is also the output head (T5).
      num_position_buckets: distances are sorted into so many buckets.
      max_position_distance: tokens; this distance and all beyond share a bucket.
      start_token_id: what the decoder reads first; T5's padding.
      dropout: of embeddings, residual branches, hidden units of the feed-forward networks and
        outputs of the stacks. Attention weights have none.
      remat: what the backward pass computes again, a name of `layers.REMAT_POLICIES`.
      attention: the kernel that computes attention, one of `kernels.KERNELS`.
    """

    is_encoder_decoder: ClassVar[bool] = True

    vocab_size: int = 32128
    width: int = 768
    num_layers: int = 12
    num_decoder_layers: int = 12
    num_heads: int = 12
    head_width: int = 64
    mlp_width: int = 2048
    gated: bool = True
    activation: str = "gelu_new"
    tied_head: bool = False
    num_position_buckets: int = 32
    max_position_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    start_token_id: int = 0
    dropout: float = 0.0
    remat: str = "none"
    attention: str = "auto"

    def __post_init__(self):
        check_activation(self, T5_ACTIVATIONS)
        check_remat(self)
        if self.num_position_buckets < 4 or self.num_position_buckets % 2:
            raise UserError(
                f"T5Config: num_position_buckets={self.num_position_buckets} must be even and at "
                "least 4."
            )
        if self.max_position_distance <= self.num_position_buckets // 2:
            raise UserError(
                f"T5Config: max_position_distance={self.max_position_distance} must be more than "
                f"half of num_position_buckets={self.num_position_buckets}."
            )

    def cache_shape(self, batch: int, capacity: int) -> tuple[int, int, int, int, int]:
        """Shape of the decoder's cached keys or values, (layers, batch, capacity, heads, width)."""
        return self.num_decoder_layers, batch, capacity, self.num_heads, self.head_width


class T5LanguageModel(nn.Module):
    """Embeddings in, decoder states out, and the output head.

    The steps are methods of their own, so that soft tokens can stand among the encoder's inputs,
    the encoder runs once for many tokens of the decoder, and logits are computed only where they
    are needed: `embed`, `encode`, `read_encoder`, `decode`, `logits`. `__call__` is all but the
    first and the last, as training wants them.
    """

    config: T5Config
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        c = self.config
        self.token_embedding = nn.Embed(
            c.vocab_size, c.width, embedding_init=nn.initializers.normal(1.0), dtype=self.dtype
        )
        self.encoder = T5Stack(c, c.num_layers, bidirectional=True, dtype=self.dtype)
        self.decoder = T5Stack(c, c.num_decoder_layers, bidirectional=False, dtype=self.dtype)
        # One projection a decoder layer, as one batched product over the encoder's output.
        self.encoder_key_values = nn.vmap(
            T5KeyValueProjection,
            in_axes=None,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            axis_size=c.num_decoder_layers,
        )(c, self.dtype)
        if not c.tied_head:
            self.lm_head = nn.Dense(
                c.vocab_size,
                use_bias=False,
                kernel_init=_fan_in(),
                dtype=self.dtype,
                dot_general=float32_sums,
            )

    def embed(self, ids: Int[Array, "*batch length"]) -> Float[Array, "*batch length width"]:
        """Word embeddings of `ids`, for either stack."""
        return self.token_embedding(ids)

    def encode(
        self, embeddings: Float[Array, "batch input width"], valid: Bool[Array, "batch input"]
    ) -> Float[Array, "batch input width"]:
        """The encoder's output; what stands at invalid positions has no meaning.

        Distances count places, padding included, as in transformers. So padding may stand at
        either end, but between two tokens it takes them apart.
        """
        hidden, _ = self.encoder(embeddings, padding_mask(valid))
        return hidden

    def read_encoder(self, hidden: Float[Array, "batch input width"]) -> KeyValues:
        """Cross-attention keys and values: `[layers, batch, input, heads, head_width]`."""
        return self.encoder_key_values(hidden)

    def decode(
        self,
        embeddings: Float[Array, "rows length width"],
        mask: Mask,
        encoder: KeyValues,
        encoder_valid: Bool[Array, "batch input"],
        cache: KeyValues | None = None,
        cache_position: Array | int = 0,
    ) -> tuple[Float[Array, "rows length width"], KeyValues | None]:
        """The decoder's output, and the updated cache.

        Args:
          embeddings: of the start token and the tokens after it (`shift_right`, `embed`). `rows` is
            `batch`, or a multiple of it: adjacent rows, such as beams, then share an input.
          mask: who sees whom: `[rows, 1, length, length]`, or `[rows, 1, length, capacity]` with a
            cache. Distances count places, as in `encode`.
          encoder: from `read_encoder`.
          cache: from `layers.empty_cache`; the keys and values of this call are written into it at
            `cache_position`.
        """
        return self.decoder(
            embeddings, mask, encoder, padding_mask(encoder_valid), cache, cache_position
        )

    def __call__(
        self,
        embeddings: Float[Array, "batch input width"],
        valid: Bool[Array, "batch input"],
        decoder_embeddings: Float[Array, "batch length width"],
        decoder_mask: Mask,
    ) -> Float[Array, "batch length width"]:
        """The decoder's output for known tokens, for `logits`."""
        encoder = self.read_encoder(self.encode(embeddings, valid))
        hidden, _ = self.decode(decoder_embeddings, decoder_mask, encoder, valid)
        if self.is_initializing():  # also the parameters that only the other methods use
            self.embed(jnp.zeros((1, 1), int))
            self.logits(hidden[:, :1])
        return hidden

    def logits(self, hidden: Float[Array, "*batch width"]) -> Float[Array, "*batch vocab"]:
        """Scores of the next token, in float32."""
        if self.config.tied_head:
            words = self.token_embedding.embedding.astype(self.dtype)
            return token_logits(hidden * self.config.width**-0.5, words.T)
        return self.lm_head(hidden)


class T5Stack(nn.Module):
    """The encoder or the decoder: a position bias, the blocks, and the norm behind them."""

    config: T5Config
    num_layers: int
    bidirectional: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "rows length width"],
        mask: Mask,
        encoder: KeyValues | None = None,
        encoder_mask: Mask | None = None,
        cache: KeyValues | None = None,
        cache_position: Array | int = 0,
    ) -> tuple[Float[Array, "rows length width"], KeyValues | None]:
        c = self.config
        query_positions = cache_position + jnp.arange(x.shape[1])
        key_positions = jnp.arange(x.shape[1] if cache is None else cache.key.shape[2])
        buckets = position_buckets(
            key_positions - query_positions[:, None],
            bidirectional=self.bidirectional,
            num_buckets=c.num_position_buckets,
            max_distance=c.max_position_distance,
        )
        table = self.param(
            "relative_position_bias",
            nn.initializers.normal(c.width**-0.5),
            (c.num_position_buckets, c.num_heads),
        )
        bias = jnp.moveaxis(jnp.asarray(table)[buckets], -1, 0)[None]  # [1, heads, query, key]

        each_layer, shared = 0, nn.broadcast
        scanned = scan_layers(
            T5Block,
            self.num_layers,
            remat=c.remat,
            in_axes=(shared, shared, each_layer, shared, each_layer, shared),
        )
        x = Dropout(c.dropout)(x.astype(self.dtype))
        x, cache = scanned(c, self.dtype, name="layers")(
            x, mask, bias, encoder, encoder_mask, cache, cache_position
        )
        return Dropout(c.dropout)(_rms_norm(c, self.dtype, "final_norm")(x)), cache


class T5Block(nn.Module):
    """Self-attention, cross-attention where there is an encoder to look at, feed-forward."""

    config: T5Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "rows length width"],
        mask: Mask,
        bias: Float[Array, "1 heads length key"],
        encoder: KeyValues | None,
        encoder_mask: Mask | None,
        cache: KeyValues | None,
        cache_position: Array | int,
    ) -> tuple[Float[Array, "rows length width"], KeyValues | None]:
        """Returns the output and the updated cache, as `scan_layers` wants it."""
        c = self.config
        dropout = Dropout(c.dropout)
        normed = _rms_norm(c, self.dtype, "attention_norm")(x)
        attention = T5Attention(c, self.dtype, name="attention")
        attended, cache = attention(normed, mask, bias, cache=cache, cache_position=cache_position)
        x = x + dropout(attended)
        if encoder is not None:
            normed = _rms_norm(c, self.dtype, "cross_attention_norm")(x)
            attention = T5Attention(c, self.dtype, name="cross_attention")
            attended, _ = attention(normed, encoder_mask, key_values=encoder)
            x = x + dropout(attended)
        normed = _rms_norm(c, self.dtype, "mlp_norm")(x)
        return x + dropout(T5FeedForward(c, self.dtype, name="mlp")(normed)), cache


class T5KeyValueProjection(nn.Module):
    """Keys and values of features that the decoder will attend to."""

    config: T5Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Float[Array, "batch input width"]) -> KeyValues:
        return _key_values(self.config, self.dtype, features)


class T5Attention(nn.Module):
    """Attention with a bias on the scores, which are not scaled."""

    config: T5Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "rows length width"],
        mask: Mask,
        bias: Float[Array, "1 heads length key"] | None = None,
        *,
        key_values: KeyValues | None = None,
        cache: KeyValues | None = None,
        cache_position: Array | int = 0,
    ) -> tuple[Float[Array, "rows length width"], KeyValues | None]:
        """Like `layers.Attention`; `key_values` may have fewer rows than `x` (see `decode`)."""
        c = self.config
        query = _to_heads(c, "query", self.dtype, 1 / c.head_width)(x)
        if key_values is None:
            key_values = _key_values(c, self.dtype, x)
            if cache is not None:
                key_values = cache = cache.write(key_values, cache_position)
        # Rows that share keys and values become further queries of one row: nothing is copied.
        grouped = query.reshape(key_values.key.shape[0], -1, c.num_heads, c.head_width)
        attended = dot_product_attention(
            grouped,
            key_values.key.astype(self.dtype),
            key_values.value.astype(self.dtype),
            mask=mask,
            bias=bias,
            scale=1.0,
            kernel=c.attention,
        )
        out = nn.DenseGeneral(
            c.width,
            axis=(-2, -1),
            use_bias=False,
            kernel_init=_fan_in(),
            dtype=self.dtype,
            name="out",
        )
        return out(attended.reshape(query.shape)), cache


class T5FeedForward(nn.Module):
    """Two linear maps with an activation between them; gated: with a third one beside the first."""

    config: T5Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        c = self.config
        activation = T5_ACTIVATIONS[c.activation]
        hidden = _linear(c.mlp_width, self.dtype, "up")(x)
        if c.gated:
            hidden *= activation(_linear(c.mlp_width, self.dtype, "gate")(x))
        else:
            hidden = activation(hidden)
        return _linear(c.width, self.dtype, "down")(Dropout(c.dropout)(hidden))


def _fan_in(scale: float = 1.0):
    return nn.initializers.variance_scaling(scale, "fan_in", "normal")


def _linear(width: int, dtype: jnp.dtype, name: str | None = None) -> nn.Dense:
    return nn.Dense(width, use_bias=False, kernel_init=_fan_in(), dtype=dtype, name=name)


def _to_heads(config: T5Config, name: str, dtype: jnp.dtype, variance: float = 1.0):
    return nn.DenseGeneral(
        (config.num_heads, config.head_width),
        use_bias=False,
        kernel_init=_fan_in(variance),
        dtype=dtype,
        name=name,
    )


def _key_values(config: T5Config, dtype: jnp.dtype, features: Array) -> KeyValues:
    key, value = (_to_heads(config, name, dtype)(features) for name in ("key", "value"))
    return KeyValues(key, value)


def _rms_norm(config: T5Config, dtype: jnp.dtype, name: str) -> nn.RMSNorm:
    return nn.RMSNorm(epsilon=config.layer_norm_epsilon, dtype=dtype, name=name)


def position_buckets(
    offset: Int[Array, "query key"], *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Int[Array, "query key"]:
    """The bucket of each distance: one each for short distances, wider ones for longer ones.

    The width of the buckets in the second half grows as a power of the distance, so that the last
    one ends at `max_distance`; everything beyond is in it, too.

    Args:
      offset: position of the key minus position of the query.
      bidirectional: half of the buckets are for keys behind the query; otherwise all such keys are
        in bucket 0, and a mask is expected to hide them.
    """
    buckets = 0
    if bidirectional:
        num_buckets //= 2
        buckets = jnp.where(offset > 0, num_buckets, 0)
        distance = jnp.abs(offset)
    else:
        distance = jnp.maximum(-offset, 0)
    # By a table made on the host, since a device's logarithm may round to the next bucket.
    distances = np.arange(max_distance + 1)
    exact = num_buckets // 2
    share = np.log(np.maximum(distances, 1) / exact) / np.log(max_distance / exact)
    wide = exact + (np.float32(share) * (num_buckets - exact)).astype(int)
    table = np.where(distances < exact, distances, np.minimum(wide, num_buckets - 1))
    return buckets + jnp.asarray(table)[jnp.minimum(distance, max_distance)]


def shift_right(ids: Int[Array, "batch length"], start_token_id: int) -> Int[Array, "batch length"]:
    """What the decoder reads while it is to say `ids`: the start token, then all but the last."""
    return jnp.pad(ids[:, :-1], ((0, 0), (1, 0)), constant_values=start_token_id)
