"""Vision transformers: CLIP ViT and EVA-CLIP ViT-g, from uint8-normalised images to tokens."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxblip.errors import UserError
from jaxblip.models.layers import PreNormBlock, check_heads, layer_norm, scan_layers


@dataclasses.dataclass(frozen=True)
class VitConfig:
    """Size and variant of a vision transformer.

    Attributes:
      pre_norm: layer norm after the embeddings (CLIP's `ln_pre`).
      patch_bias: EVA-CLIP's patch convolution has a bias, CLIP's has none.
      key_bias: EVA-CLIP's attention has query and value biases only.
      remat: recompute each block in the backward pass; without effect on a frozen encoder.
    """

    image_size_px: int = 224
    patch_size_px: int = 16
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    activation: str = "gelu"
    layer_norm_epsilon: float = 1e-6
    pre_norm: bool = False
    patch_bias: bool = True
    key_bias: bool = True
    initializer_range: float = 0.02
    remat: bool = False

    def __post_init__(self):
        check_heads(self)
        if self.image_size_px % self.patch_size_px:
            raise UserError(
                f"Images of {self.image_size_px} px cannot be cut into patches of "
                f"patch_size_px={self.patch_size_px}: set data.image_size_px to a multiple of it."
            )

    @property
    def num_tokens(self) -> int:
        """Patches plus the class token."""
        return (self.image_size_px // self.patch_size_px) ** 2 + 1


class VisionTransformer(nn.Module):
    """Image to tokens, class token first, without a final norm.

    BLIP-2 norms the tokens with a trained `vision_norm` of its own (LAVIS `ln_vision`), so the
    final norm of CLIP is not part of the encoder.
    """

    config: VitConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch tokens embed"]:
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        patches = nn.Conv(
            c.width,
            kernel_size=(c.patch_size_px, c.patch_size_px),
            strides=(c.patch_size_px, c.patch_size_px),
            padding="VALID",
            use_bias=c.patch_bias,
            kernel_init=nn.initializers.lecun_normal(),
            dtype=self.dtype,
            name="patch_embedding",
        )(images)
        x = patches.reshape(patches.shape[0], -1, c.width)
        cls_token = self.param("cls_token", init, (c.width,))
        cls_token = jnp.broadcast_to(cls_token, (x.shape[0], 1, c.width))
        x = jnp.concatenate([cls_token.astype(x.dtype), x], axis=1)
        x += self.param("position_embedding", init, (c.num_tokens, c.width)).astype(x.dtype)
        if c.pre_norm:
            x = layer_norm(c.layer_norm_epsilon, self.dtype, "pre_norm")(x)
        layers = scan_layers(PreNormBlock, c.num_layers, remat=c.remat)(
            c.num_heads,
            c.mlp_width,
            c.activation,
            c.layer_norm_epsilon,
            init,
            key_bias=c.key_bias,
            dtype=self.dtype,
            name="layers",
        )
        x, _ = layers(x)
        return x
