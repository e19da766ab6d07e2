"""SigLIP and SigLIP 2 at fixed resolution: two towers, one space, a logit for each single pair.

SigLIP: arXiv 2303.15343; SigLIP 2: arXiv 2502.14786, the same networks with another vocabulary.
Reference implementation: transformers `modeling_siglip.py`.
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxblip.models.attention import padding_mask
from jaxblip.models.clip import ClipTextConfig, TextTower
from jaxblip.models.layers import l2_normalize, layer_norm
from jaxblip.models.vit import AttentionPooling, VisionTransformer, VitConfig


@dataclasses.dataclass(frozen=True)
class SiglipTextConfig(ClipTextConfig):
    """Size of the text tower; the defaults are those of SigLIP B/16."""

    vocab_size: int = 32000
    max_positions: int = 64
    width: int = 768
    num_heads: int = 12
    mlp_width: int = 3072
    activation: str = "gelu_tanh"
    layer_norm_epsilon: float = 1e-6


class SiglipTextTower(TextTower):
    """Transformer over the text in both directions; its feature is that of the last position."""

    def __call__(
        self,
        text_ids: Int[Array, "batch text"],
        text_valid: Bool[Array, "batch text"] | None = None,
    ) -> Float[Array, "batch width"]:
        """The normed state of the last position, whether it holds a token or padding.

        Args:
          text_ids: padded to `max_positions`: the released models were trained at that length
            only, and the feature depends on where the text ends.
          text_valid: positions that may be looked at; by default all of them, padding included,
            as the released models were trained.
        """
        mask = None if text_valid is None else padding_mask(text_valid)
        return self.hidden(text_ids, mask)[:, -1]


class Siglip(nn.Module):
    """Both towers, and the learned scale and bias of the logits.

    The shared space is as wide as the image tower, which has no projection.

    Attributes:
      initial_logit_scale: SigLIP §3.2; `logit_scale` holds its logarithm.
      initial_logit_bias: SigLIP §3.2: nearly all pairs are negative, so training starts near there.
    """

    vision_config: VitConfig
    text_config: SiglipTextConfig
    initial_logit_scale: float = 10.0
    initial_logit_bias: float = -10.0
    vision_norm_epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.vision = VisionTransformer(self.vision_config, self.dtype)
        self.vision_norm = layer_norm(self.vision_norm_epsilon, self.dtype)
        self.image_pooling = AttentionPooling(self.vision_config, self.dtype)
        self.text = SiglipTextTower(self.text_config, self.dtype)
        self.text_projection = nn.Dense(self.vision_config.width)
        log_scale = nn.initializers.constant(math.log(self.initial_logit_scale))
        self.logit_scale = self.param("logit_scale", log_scale, ())
        bias = nn.initializers.constant(self.initial_logit_bias)
        self.logit_bias = self.param("logit_bias", bias, ())

    def embed_images(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch embed"]:
        """L2-normalised image embeddings, pooled from all tokens."""
        tokens = self.vision_norm(self.vision(images))
        return l2_normalize(self.image_pooling(tokens).astype(jnp.float32))

    def embed_texts(
        self,
        text_ids: Int[Array, "batch text"],
        text_valid: Bool[Array, "batch text"] | None = None,
    ) -> Float[Array, "batch embed"]:
        """L2-normalised text embeddings."""
        text = self.text(text_ids, text_valid)
        return l2_normalize(self.text_projection(text.astype(jnp.float32)))

    def logits(
        self, image: Float[Array, "images embed"], text: Float[Array, "texts embed"]
    ) -> Float[Array, "images texts"]:
        """Log-odds that an image and a text belong together, for each pair on its own."""
        return image @ text.T * jnp.exp(self.logit_scale) + self.logit_bias

    def __call__(self, images, text_ids, text_valid=None):
        return self.embed_images(images), self.embed_texts(text_ids, text_valid)
