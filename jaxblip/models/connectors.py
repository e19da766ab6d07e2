"""What may stand between image encoder and language model in place of a Q-Former.

Each makes visual tokens of the image's, `[batch, tokens, vision_width]`; BLIP-2's `projection`
behind it takes them to the width of the language model. None of them reads text.

===========  ==========================================  ======================================
name         visual tokens                               parameters before `projection`
===========  ==========================================  ======================================
linear       those of the image encoder                  none
mlp          those of the image encoder                  a linear map, then GELU (LLaVA-1.5)
perceiver    `num_latents`                               a perceiver resampler (Flamingo)
===========  ==========================================  ======================================
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxblip.errors import UserError
from jaxblip.models.layers import (
    ACTIVATIONS,
    Attention,
    FeedForward,
    KeyValueProjection,
    Linear,
    check_remat,
    layer_norm,
    scan_layers,
)

QFORMER = "qformer"
CONNECTORS = (QFORMER, "linear", "mlp", "perceiver")

Tokens = Float[Array, "batch tokens vision_width"]


@dataclasses.dataclass(frozen=True)
class PerceiverConfig:
    """Size of a perceiver resampler, which is as wide as the image encoder, as in Flamingo.

    Attributes:
      num_latents: visual tokens.
      mlp_ratio: hidden units of the feed-forward networks over the width.
      remat: what the backward pass computes again, a name of `layers.REMAT_POLICIES`.
    """

    num_latents: int = 64
    num_layers: int = 6
    num_heads: int = 16
    mlp_ratio: int = 4
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    remat: str = "none"

    def __post_init__(self):
        check_remat(self)
        for field in ("num_latents", "num_layers", "num_heads", "mlp_ratio"):
            if getattr(self, field) < 1:
                raise UserError(f"PerceiverConfig: {field}={getattr(self, field)} is less than 1.")


class EveryToken(nn.Module):
    """The tokens of the image encoder as they are, for a projection of each."""

    @nn.nowrap
    def num_tokens(self, num_image_tokens: int) -> int:
        """How many visual tokens there are of an image."""
        return num_image_tokens

    def __call__(self, features: Tokens) -> Tokens:
        return features


class MlpConnector(nn.Module):
    """The first of two linear maps, and GELU; `projection` is the second (arXiv 2310.03744).

    LLaVA leaves out the class token and norms nothing before; here all tokens are taken, behind
    `vision_norm`, as a Q-Former takes them.
    """

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.nowrap
    def num_tokens(self, num_image_tokens: int) -> int:
        """How many visual tokens there are of an image."""
        return num_image_tokens

    @nn.compact
    def __call__(self, features: Tokens) -> Float[Array, "batch tokens width"]:
        return ACTIVATIONS["gelu"](Linear(self.width, dtype=self.dtype, name="up")(features))


class PerceiverBlock(nn.Module):
    """Latents attend to [image tokens, latents]; then a feed-forward network."""

    config: PerceiverConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, latents: Float[Array, "batch latents width"], features: Tokens
    ) -> tuple[Float[Array, "batch latents width"], None]:
        c, width = self.config, latents.shape[-1]
        init = nn.initializers.normal(c.initializer_range)

        def norm(name):
            return layer_norm(c.layer_norm_epsilon, self.dtype, name)

        heads = c.num_heads, width // c.num_heads, init
        normed = norm("attention_norm")(latents)
        seen = jnp.concatenate([norm("token_norm")(features), normed], axis=1)
        key_values = KeyValueProjection(*heads, self.dtype, name="key_values")(seen)
        attention = Attention(*heads, dtype=self.dtype, name="attention")
        attended, _ = attention(normed, key_values=key_values)
        latents = latents + attended
        mlp = FeedForward(c.mlp_ratio * width, "gelu", init, self.dtype, name="mlp")
        return latents + mlp(norm("mlp_norm")(latents)), None


class PerceiverResampler(nn.Module):
    """Learned latents that read an image (Flamingo, arXiv 2204.14198, A.1.1).

    Norms stand before attention and feed-forward network, and behind the last block, as in
    OpenFlamingo; the linear maps have biases, and the activation is GELU. A video's position in
    time, which Flamingo adds to the tokens, is left out.
    """

    config: PerceiverConfig
    dtype: jnp.dtype = jnp.float32

    @nn.nowrap
    def num_tokens(self, num_image_tokens: int) -> int:
        """How many visual tokens there are of an image."""
        return self.config.num_latents

    @nn.compact
    def __call__(self, features: Tokens) -> Float[Array, "batch latents vision_width"]:
        c, (batch, _, width) = self.config, features.shape
        init = nn.initializers.normal(c.initializer_range)
        latents = self.param("latents", init, (c.num_latents, width))
        latents = jnp.broadcast_to(latents, (batch, *latents.shape)).astype(self.dtype)
        blocks = scan_layers(PerceiverBlock, c.num_layers, remat=c.remat)
        latents, _ = blocks(c, self.dtype, name="layers")(latents, features.astype(self.dtype))
        return layer_norm(c.layer_norm_epsilon, self.dtype, "final_norm")(latents)


Connector = EveryToken | MlpConnector | PerceiverResampler
