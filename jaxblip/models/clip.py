"""CLIP: an image tower and a text tower with one shared space (arXiv 2103.00020 §2.3–2.4)."""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxblip.models.attention import Mask, causal_mask
from jaxblip.models.layers import (
    PreNormBlock,
    check_activation,
    check_heads,
    check_remat,
    l2_normalize,
    layer_norm,
    scan_layers,
)
from jaxblip.models.vit import VisionTransformer, VitConfig

MAX_LOG_SCALE = math.log(100.0)  # §2.5: logits are never scaled by more than 100


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """Size of the text tower; the defaults are those of CLIP ViT-B.

    Attributes:
      remat: what the backward pass computes again, a name of `layers.REMAT_POLICIES`.
      attention: the kernel that computes attention, one of `kernels.KERNELS`.
    """

    vocab_size: int = 49408
    max_positions: int = 77
    width: int = 512
    num_layers: int = 12
    num_heads: int = 8
    mlp_width: int = 2048
    activation: str = "quick_gelu"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    remat: str = "none"
    attention: str = "auto"

    def __post_init__(self):
        check_heads(self)
        check_activation(self)
        check_remat(self)


LEGACY_EOS_TOKEN_ID = 2  # what old CLIP configs say, although their end-of-text token is the last


def valid_to_end_of_text(
    text_ids: Int[Array, "batch text"], eos_token_id: int
) -> Bool[Array, "batch text"]:
    """The mask of ids that came without one: True up to the end-of-text token, that included.

    With it, `ClipTextTower` gives the `pooler_output` of transformers' `CLIPTextModel`, also
    where the end-of-text token serves as padding. As there, a text without an end-of-text token
    counts as its first token only.

    Args:
      eos_token_id: of the checkpoint's text config. Configs written before transformers#24773 say
        2, which is not the token's id; then the highest id of a text is the end-of-text token.
    """
    is_legacy = eos_token_id == LEGACY_EOS_TOKEN_ID
    ends = text_ids if is_legacy else text_ids == eos_token_id
    return jnp.arange(text_ids.shape[1]) <= ends.argmax(axis=1)[:, None]  # argmax: the first one


class TextTower(nn.Module):
    """Transformer over a text: word and position embeddings, blocks, a norm."""

    config: ClipTextConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def hidden(
        self, text_ids: Int[Array, "batch text"], mask: Mask | None
    ) -> Float[Array, "batch text width"]:
        """Normed states of all positions."""
        c = self.config
        init = nn.initializers.normal(c.initializer_range)

        def embed(rows, name):
            return nn.Embed(rows, c.width, embedding_init=init, dtype=self.dtype, name=name)

        x = embed(c.vocab_size, "token_embedding")(text_ids)
        x += embed(c.max_positions, "position_embedding")(jnp.arange(text_ids.shape[1]))
        layers = scan_layers(PreNormBlock, c.num_layers, remat=c.remat)(
            c.num_heads,
            c.mlp_width,
            c.activation,
            c.layer_norm_epsilon,
            init,
            attention_kernel=c.attention,
            dtype=self.dtype,
            name="layers",
        )
        x, _ = layers(x, mask)
        return layer_norm(c.layer_norm_epsilon, self.dtype, "final_norm")(x)


class ClipTextTower(TextTower):
    """Causal over the text; its feature is that of the last token."""

    def __call__(
        self, text_ids: Int[Array, "batch text"], text_valid: Bool[Array, "batch text"]
    ) -> Float[Array, "batch width"]:
        x = self.hidden(text_ids, causal_mask(text_valid))
        # The last valid token is the end-of-text token, the only one that has seen all others.
        last = text_valid.sum(axis=1) - 1
        return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]


class Clip(nn.Module):
    """Both towers, their projections, and the learned log-scale of the logits."""

    vision_config: VitConfig
    text_config: ClipTextConfig
    embed_dim: int = 512
    initial_temperature: float = 0.07
    vision_norm_epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.vision = VisionTransformer(self.vision_config, self.dtype)
        self.vision_norm = layer_norm(self.vision_norm_epsilon, self.dtype)
        self.text = ClipTextTower(self.text_config, self.dtype)
        self.image_projection = nn.Dense(self.embed_dim, use_bias=False)
        self.text_projection = nn.Dense(self.embed_dim, use_bias=False)
        initial = nn.initializers.constant(-math.log(self.initial_temperature))
        self.logit_scale = self.param("logit_scale", initial, ())

    def embed_images(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch embed"]:
        """L2-normalised image embeddings, from the class token."""
        class_token = self.vision_norm(self.vision(images)[:, 0])
        return l2_normalize(self.image_projection(class_token.astype(jnp.float32)))

    def embed_texts(
        self, text_ids: Int[Array, "batch text"], text_valid: Bool[Array, "batch text"]
    ) -> Float[Array, "batch embed"]:
        """L2-normalised text embeddings."""
        text = self.text(text_ids, text_valid)
        return l2_normalize(self.text_projection(text.astype(jnp.float32)))

    def __call__(self, images, text_ids, text_valid):
        return self.embed_images(images), self.embed_texts(text_ids, text_valid)
