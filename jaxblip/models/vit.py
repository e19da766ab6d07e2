"""Vision transformers, from normalised images to tokens: EVA-CLIP, CLIP, BLIP and SigLIP.

One encoder covers them all; `VitConfig` says in what they differ:

=============  =========  =============  ==========  ==========  ==========  ========  ======
               pre_norm   has_cls_token  patch_bias  key_bias    activation  epsilon   final
=============  =========  =============  ==========  ==========  ==========  ========  ======
EVA-CLIP       no         yes            yes         no          gelu        1e-6      no
CLIP           yes        yes            no          yes         quick_gelu  1e-5      class
BLIP           no         yes            yes         yes         gelu        1e-6      all
SigLIP (1, 2)  no         no             yes         yes         gelu_tanh   1e-6      all
=============  =========  =============  ==========  ==========  ==========  ========  ======

The final norm is never part of the encoder: every assembly has it as `vision_norm`, trained or
not. The last column says what the original model norms with it: CLIP its class token; BLIP and
SigLIP all tokens; EVA-CLIP as BLIP-2 uses it nothing, and BLIP-2's `vision_norm` is a new one, over
all tokens. The tokens before the last block, which BLIP-2 reads (paper §3.1), are those of an
encoder with one block fewer.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxblip.errors import UserError
from jaxblip.models.layers import (
    Attention,
    FeedForward,
    KeyValueProjection,
    PreNormBlock,
    check_activation,
    check_heads,
    check_remat,
    layer_norm,
    scan_layers,
)
from jaxblip.models.positions import sincos2d_positions

POSITION_INITS = ("normal", "sincos2d")


@dataclasses.dataclass(frozen=True)
class VitConfig:
    """Size and variant of a vision transformer.

    Attributes:
      activation: a name of `layers.ACTIVATIONS`.
      pre_norm: layer norm after the embeddings (CLIP's `ln_pre`).
      has_cls_token: a learned token stands before the patches; SigLIP has none.
      patch_bias: CLIP's patch convolution has no bias, all others have one.
      key_bias: EVA-CLIP's attention has query and value biases only.
      crop_to_patches: cut off the pixels at the right and at the bottom that fill no patch, as
        SigLIP so400m/14 does at 384 px; without it, such an image size is an error.
      position_init: what the position table starts from, "normal" (as CLIP) or "sincos2d": fixed
        sines of both coordinates, a start that tells places apart (as in big_vision, but trained).
      remat: what the backward pass computes again, a name of `layers.REMAT_POLICIES`; without
        effect on a frozen encoder.
      attention: the kernel that computes attention, one of `kernels.KERNELS`.
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
    has_cls_token: bool = True
    patch_bias: bool = True
    key_bias: bool = True
    crop_to_patches: bool = False
    initializer_range: float = 0.02
    position_init: str = "normal"
    remat: str = "none"
    attention: str = "auto"

    def __post_init__(self):
        check_heads(self)
        check_activation(self)
        check_remat(self)
        if self.position_init not in POSITION_INITS:
            raise UserError(
                f"position_init={self.position_init!r} is none of {', '.join(POSITION_INITS)}: "
                "choose one."
            )
        if self.image_size_px % self.patch_size_px and not self.crop_to_patches:
            raise UserError(
                f"Images of {self.image_size_px} px cannot be cut into patches of "
                f"patch_size_px={self.patch_size_px}: set data.image_size_px to a multiple of it."
            )

    @property
    def num_tokens(self) -> int:
        """Patches, plus the class token where there is one."""
        return (self.image_size_px // self.patch_size_px) ** 2 + self.has_cls_token


class VisionTransformer(nn.Module):
    """Image to tokens, the class token (if any) first, without a final norm."""

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
        if c.has_cls_token:
            cls_token = self.param("cls_token", init, (c.width,))
            cls_token = jnp.broadcast_to(cls_token, (x.shape[0], 1, c.width))
            x = jnp.concatenate([cls_token.astype(x.dtype), x], axis=1)
        position_init = init if c.position_init == "normal" else self._sincos2d
        positions = self.param("position_embedding", position_init, (c.num_tokens, c.width))
        x += positions.astype(x.dtype)
        if c.pre_norm:
            x = layer_norm(c.layer_norm_epsilon, self.dtype, "pre_norm")(x)
        layers = scan_layers(PreNormBlock, c.num_layers, remat=c.remat)(
            c.num_heads,
            c.mlp_width,
            c.activation,
            c.layer_norm_epsilon,
            init,
            key_bias=c.key_bias,
            attention_kernel=c.attention,
            dtype=self.dtype,
            name="layers",
        )
        x, _ = layers(x)
        return x

    def _sincos2d(self, key: Key[Array, ""], shape: tuple[int, int]) -> Array:
        del key
        c = self.config
        table = sincos2d_positions(c.image_size_px // c.patch_size_px, c.width)
        return jnp.zeros(shape).at[-len(table) :].set(table)  # a class token has no place


class AttentionPooling(nn.Module):
    """One vector for all tokens: a learned query attends to them (SigLIP's head).

    The reference is transformers' `SiglipMultiheadAttentionPoolingHead`: no norm before the
    attention, no residual around it, then the feed-forward half of a pre-norm block. Its sizes are
    the encoder's. It reads tokens after `vision_norm`, with or without a class token among them.
    """

    config: VitConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Float[Array, "batch tokens width"]) -> Float[Array, "batch width"]:
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        head_width = c.width // c.num_heads
        key_values = KeyValueProjection(
            c.num_heads, head_width, init, self.dtype, name="token_key_values"
        )(tokens)
        query = self.param("query_tokens", init, (1, c.width)).astype(tokens.dtype)
        query = jnp.broadcast_to(query, (tokens.shape[0], 1, c.width))
        attention = Attention(
            c.num_heads, head_width, init, kernel=c.attention, dtype=self.dtype, name="attention"
        )
        x, _ = attention(query, key_values=key_values)
        normed = layer_norm(c.layer_norm_epsilon, self.dtype, "mlp_norm")(x)
        mlp = FeedForward(c.mlp_width, c.activation, init, self.dtype, name="mlp")
        return (x + mlp(normed))[:, 0]
