"""Decoder language models of the OPT architecture (Zhang et al. 2022, arXiv 2205.01068).

Reference implementation: transformers `modeling_opt.py`, pre-norm variants (all sizes but 350M).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxblip.models.decoder import DecoderLanguageModel
from jaxblip.models.layers import (
    PreNormBlock,
    check_heads,
    check_remat,
    layer_norm,
    scan_layers,
)

POSITION_OFFSET = 2  # OPT's position table starts with two rows that are never used


@dataclasses.dataclass(frozen=True)
class OptConfig:
    """Size of an OPT language model; the defaults are OPT-125M's.

    Attributes:
      remat: what the backward pass computes again, a name of `layers.REMAT_POLICIES`.
      attention: the kernel that computes attention, one of `kernels.KERNELS`.
    """

    is_encoder_decoder: ClassVar[bool] = False

    vocab_size: int = 50272
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    max_positions: int = 2048
    layer_norm_epsilon: float = 1e-5
    dropout: float = 0.0
    initializer_range: float = 0.02
    remat: str = "none"
    attention: str = "auto"

    def __post_init__(self):
        check_heads(self)
        check_remat(self)

    def cache_shape(self, batch: int, capacity: int) -> tuple[int, int, int, int, int]:
        """Shape of the cached keys, or values: `(layers, batch, capacity, heads, width)`."""
        return self.num_layers, batch, capacity, self.num_heads, self.width // self.num_heads


class OptLanguageModel(DecoderLanguageModel):
    """OPT, with the head tied to the word embeddings."""

    config: OptConfig

    def setup(self):
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        self.token_embedding = nn.Embed(
            c.vocab_size, c.width, embedding_init=init, dtype=self.dtype
        )
        self.position_embedding = nn.Embed(
            c.max_positions + POSITION_OFFSET, c.width, embedding_init=init, dtype=self.dtype
        )
        scanned = scan_layers(
            PreNormBlock, c.num_layers, remat=c.remat, in_axes=(nn.broadcast, 0, nn.broadcast)
        )
        self.layers = scanned(
            c.num_heads,
            c.mlp_width,
            "relu",
            c.layer_norm_epsilon,
            init,
            dropout=c.dropout,
            attention_kernel=c.attention,
            dtype=self.dtype,
        )
        self.final_norm = layer_norm(c.layer_norm_epsilon, self.dtype)

    def layer_inputs(self, embeddings, positions, mask):
        return embeddings + self.position_embedding(positions + POSITION_OFFSET), mask


def token_positions(
    valid: Bool[Array, "batch length"], segment_ids: Int[Array, "batch length"] | None = None
) -> Int[Array, "batch length"]:
    """Positions that count only valid tokens; padding (on either side) gets 0 or the last.

    Args:
      segment_ids: of packed rows, where each segment lies in one piece and begins at 0.
    """
    positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
    if segment_ids is None:
        return positions
    begins = jnp.diff(segment_ids, axis=1, prepend=0) != 0
    return positions - jax.lax.cummax(jnp.where(begins, positions, 0), axis=1)
