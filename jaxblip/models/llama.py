"""Decoder language models of the LLaMA family: LLaMA, Vicuna, SmolLM2, Mistral, Qwen2 and Qwen3.

One decoder covers them all; `LlamaConfig` says in what they differ beside their sizes:

===================  =========  ========  ========  =======  ==============  =====================
                     rope_type  qkv_bias  out_bias  qk_norm  sliding_window  key and value heads
===================  =========  ========  ========  =======  ==============  =====================
LLaMA 1, 2, Vicuna   default    no        no        no       no              all; LLaMA-2-70B few
LLaMA 3              llama3     no        no        no       no              few
SmolLM2              default    no        no        no       no              few, or all (1.7B)
Mistral              default    no        no        no       in the first    few
Qwen2                default    yes       no        no       no              few
Qwen3                default    no        no        yes      no              few, own `head_width`
===================  =========  ========  ========  =======  ==============  =====================

LLaMA 3.0 has the default rotary embedding, with `rope_theta` 500,000; long-context Vicuna the
"linear" one. The head is tied to the word embeddings in SmolLM2, in LLaMA 3.2 of 1B and 3B, and in
the smaller Qwen2 and Qwen3.

Reference implementations: transformers `modeling_llama.py`, `modeling_mistral.py`,
`modeling_qwen2.py` and `modeling_qwen3.py`.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxblip.errors import UserError
from jaxblip.models.attention import Mask, dense_mask, dot_product_attention
from jaxblip.models.decoder import DecoderLanguageModel
from jaxblip.models.layers import (
    KeyValues,
    Linear,
    check_heads,
    check_remat,
    float32_sums,
    scan_layers,
)

ROPE_TYPES = ("default", "linear", "llama3")

# Cosine and sine of each position's angles, in float32.
Rotation = tuple[Float[Array, "batch length half"], Float[Array, "batch length half"]]


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Size and variant of a LLaMA-like language model; the defaults are Vicuna-7B v1.1's.

    Attributes:
      num_kv_heads: heads of keys and values, each shared by a group of query heads (grouped-query
        attention); 0 = one for each query head.
      head_width: 0 = `width / num_heads`.
      max_positions: the length the model was trained for; rotary embeddings have no table.
      tied_head: the word embeddings are the output head as well.
      qkv_bias: biases of queries, keys and values.
      out_bias: bias of the attention's output.
      mlp_bias: biases of the feed-forward network.
      qk_norm: RMS norm of each head's queries and keys, before their rotation.
      sliding_window: tokens that a token sees, itself included; 0 = all before it.
      rope_theta: base of the rotary frequencies.
      rope_type: "default"; "linear": all frequencies divided by `rope_factor`; "llama3": the slow
        ones divided, the fast ones kept, those between interpolated (LLaMA 3.1).
      rope_low_freq_factor: "llama3": a wave that fits less often into `rope_original_positions` is
        slow.
      rope_high_freq_factor: "llama3": a wave that fits more often into it is fast.
      rope_original_positions: "llama3": the length before the context was extended.
      remat: what the backward pass computes again, a name of `layers.REMAT_POLICIES`.
      attention: the kernel that computes attention, one of `kernels.KERNELS`.
    """

    is_encoder_decoder: ClassVar[bool] = False

    vocab_size: int = 32000
    width: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 0
    head_width: int = 0
    mlp_width: int = 11008
    max_positions: int = 2048
    norm_epsilon: float = 1e-6
    tied_head: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int = 0
    rope_theta: float = 10000.0
    rope_type: str = "default"
    rope_factor: float = 1.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_positions: int = 8192
    initializer_range: float = 0.02
    remat: str = "none"
    attention: str = "auto"

    def __post_init__(self):
        check_remat(self)
        if not self.head_width:
            check_heads(self)
        heads, kv_heads, head_width = self.attention_shape
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise UserError(
                f"LlamaConfig: num_kv_heads={kv_heads} does not divide num_heads={heads}; set one "
                "to fit the other."
            )
        if head_width < 2 or head_width % 2:
            raise UserError(
                f"LlamaConfig: the heads are {head_width} wide, but rotary embeddings turn pairs: "
                "set head_width, or width / num_heads, to an even number."
            )
        if self.sliding_window < 0:
            raise UserError(
                f"LlamaConfig: sliding_window={self.sliding_window} must be 0 (none) or positive."
            )
        if self.rope_type not in ROPE_TYPES:
            raise UserError(
                f"LlamaConfig: rope_type={self.rope_type!r} must be one of {', '.join(ROPE_TYPES)}."
            )
        if self.rope_type != "default" and self.rope_factor < 1:
            raise UserError(f"LlamaConfig: rope_factor={self.rope_factor} must be at least 1.")
        low, high = self.rope_low_freq_factor, self.rope_high_freq_factor
        if self.rope_type == "llama3" and not 0 < low < high:
            raise UserError(
                f"LlamaConfig: rope_low_freq_factor={low} must be positive and less than "
                f"rope_high_freq_factor={high}."
            )

    @property
    def attention_shape(self) -> tuple[int, int, int]:
        """Query heads, heads of keys and values, and the width of one."""
        head_width = self.head_width or self.width // self.num_heads
        return self.num_heads, self.num_kv_heads or self.num_heads, head_width

    def cache_shape(self, batch: int, capacity: int) -> tuple[int, int, int, int, int]:
        """Shape of the cached keys, or values: `(layers, batch, capacity, heads, width)`."""
        _, kv_heads, head_width = self.attention_shape
        return self.num_layers, batch, capacity, kv_heads, head_width

    @property
    def kernel_init(self):
        return nn.initializers.normal(self.initializer_range)


class LlamaLanguageModel(DecoderLanguageModel):
    """A model of the family, its head tied to the word embeddings or not."""

    config: LlamaConfig

    def setup(self):
        c = self.config
        self.token_embedding = nn.Embed(
            c.vocab_size, c.width, embedding_init=c.kernel_init, dtype=self.dtype
        )
        in_axes = (nn.broadcast, nn.broadcast, 0, nn.broadcast)
        scanned = scan_layers(LlamaBlock, c.num_layers, remat=c.remat, in_axes=in_axes)
        self.layers = scanned(c, self.dtype)
        self.final_norm = RmsNorm(c.norm_epsilon, self.dtype)
        if not c.tied_head:
            self.lm_head = nn.Dense(
                c.vocab_size,
                use_bias=False,
                kernel_init=c.kernel_init,
                dtype=self.dtype,
                dot_general=float32_sums,
            )

    def layer_inputs(self, embeddings, positions, mask):
        if self.config.sliding_window:
            mask = last_visible(dense_mask(mask), self.config.sliding_window)
        return embeddings, mask, rotary_tables(self.config, positions)

    def head(self):
        return super().head() if self.config.tied_head else None

    def logits(self, hidden: Float[Array, "*batch width"]) -> Float[Array, "*batch vocab"]:
        """Scores of the next token, in float32."""
        return super().logits(hidden) if self.config.tied_head else self.lm_head(hidden)


class LlamaBlock(nn.Module):
    """The pre-norm transformer block of the family."""

    config: LlamaConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        mask: Mask,
        rotation: Rotation,
        cache: KeyValues | None = None,
        cache_position: Array | int = 0,
    ) -> tuple[Float[Array, "batch length width"], KeyValues | None]:
        """Returns the output and the updated cache, as `scan_layers` wants it."""
        epsilon = self.config.norm_epsilon
        normed = RmsNorm(epsilon, self.dtype, name="attention_norm")(x)
        attended, cache = LlamaAttention(self.config, self.dtype, name="attention")(
            normed, mask, rotation, cache, cache_position
        )
        x = x + attended
        normed = RmsNorm(epsilon, self.dtype, name="mlp_norm")(x)
        return x + LlamaFeedForward(self.config, self.dtype, name="mlp")(normed), cache


class LlamaAttention(nn.Module):
    """Grouped-query self-attention with rotary positions; the cache holds rotated keys."""

    config: LlamaConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch query width"],
        mask: Mask,
        rotation: Rotation,
        cache: KeyValues | None = None,
        cache_position: Array | int = 0,
    ) -> tuple[Float[Array, "batch query width"], KeyValues | None]:
        """The output, and the cache with this call written into it (None without a cache)."""
        c = self.config
        heads, kv_heads, head_width = c.attention_shape
        dense = partial(Linear, kernel_init=c.kernel_init, dtype=self.dtype)
        to_heads = partial(dense, use_bias=c.qkv_bias)
        query = to_heads((heads, head_width), name="query")(x)
        key = to_heads((kv_heads, head_width), name="key")(x)
        value = to_heads((kv_heads, head_width), name="value")(x)
        if c.qk_norm:
            query = RmsNorm(c.norm_epsilon, self.dtype, name="query_norm")(query)
            key = RmsNorm(c.norm_epsilon, self.dtype, name="key_norm")(key)
        query, key_values = rotate(query, rotation), KeyValues(rotate(key, rotation), value)
        if cache is not None:
            key_values = cache = cache.write(key_values, cache_position)
        attended = dot_product_attention(
            query,
            key_values.key.astype(query.dtype),
            key_values.value.astype(query.dtype),
            mask=mask,
            kernel=c.attention,
        )
        out = dense(x.shape[-1], axis=(-2, -1), use_bias=c.out_bias, name="out")(attended)
        return out, cache


class LlamaFeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202): one linear map gates another."""

    config: LlamaConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        c = self.config
        dense = partial(Linear, use_bias=c.mlp_bias, kernel_init=c.kernel_init, dtype=self.dtype)
        gate = nn.silu(dense(c.mlp_width, name="gate")(x))
        return dense(x.shape[-1], name="down")(gate * dense(c.mlp_width, name="up")(x))


class RmsNorm(nn.Module):
    """Root-mean-square norm in float32; its result is cast before it is scaled, as in LLaMA."""

    epsilon: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return scale.astype(self.dtype) * x.astype(self.dtype)


def rotary_frequencies(config: LlamaConfig) -> Float[np.ndarray, " half"]:
    """Angle, in radians, by which each pair of a head turns from one position to the next."""
    _, _, head_width = config.attention_shape
    frequencies = config.rope_theta ** (-np.arange(0, head_width, 2) / head_width)
    if config.rope_type == "linear":
        frequencies = frequencies / config.rope_factor
    if config.rope_type == "llama3":
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        turns = config.rope_original_positions * frequencies / (2 * np.pi)
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = kept * frequencies + (1.0 - kept) * frequencies / config.rope_factor
    return frequencies.astype(np.float32)


def rotary_tables(config: LlamaConfig, positions: Int[Array, "batch length"]) -> Rotation:
    """The rotation of each position. In bfloat16, positions beyond 256 would fall together."""
    angles = positions[..., None].astype(jnp.float32) * rotary_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "batch length heads width"], rotation: Rotation
) -> Float[Array, "batch length heads width"]:
    """Turns the pairs (i, i + width / 2) of each head, as transformers pairs them.

    Meta's own checkpoints pair neighbours, and have the rows of queries and keys in another order.
    """
    cos, sin = (table[:, :, None] for table in rotation)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def last_visible(mask: Mask, window: int) -> Mask:
    """Of what each query sees under a causal mask, the last `window` positions.

    Counted by visible positions, not by places, so padding may stand anywhere, and the places of a
    cache that are not written yet do not count.
    """
    from_here_on = jax.lax.cumsum(mask.astype(jnp.int32), axis=mask.ndim - 1, reverse=True)
    return mask & (from_here_on <= window)
