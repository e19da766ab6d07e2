"""Weights of the image encoders and towers of transformers as jaxblip parameter trees.

Beside those of `reference`: BLIP and SigLIP.
"""

from __future__ import annotations

import copy
import functools

import jax.numpy as jnp
import torch
import transformers

from jaxblip.interop.entries import Layout, norm
from jaxblip.interop.families.siglip import siglip_layout, siglip_model, siglip_vision_layout
from jaxblip.interop.families.vision import joint_vit_entries, vit_config
from jaxblip.models.layers import layer_norm
from jaxblip.models.siglip import Siglip
from jaxblip.models.vit import AttentionPooling, VisionTransformer, VitConfig
from reference_weights import params_of
from tiny_checkpoints import shapes_of


def gradients(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of `model` with the gradients of the parameters in their place.

    What turns weights into a parameter tree turns it into the tree of the gradients.
    """
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
            ours.copy_(torch.zeros_like(ours) if theirs.grad is None else theirs.grad)
    return twin


def vision_shapes(config: VitConfig) -> dict:
    """Abstract parameters of an image encoder, of the norm behind it and of SigLIP's pooling."""
    side = config.image_size_px
    tokens = jnp.zeros((1, config.num_tokens, config.width))
    return {
        "vision": shapes_of(VisionTransformer(config), jnp.zeros((1, side, side, 3))),
        "vision_norm": shapes_of(layer_norm(config.layer_norm_epsilon, jnp.float32), tokens),
        "image_pooling": shapes_of(AttentionPooling(config), tokens),
    }


def blip_vit_params(model: transformers.BlipVisionModel) -> dict:
    """Parameters of `VisionTransformer` (without the norm behind it) in the BLIP variant."""
    config = vit_config(model.config.to_dict())
    entries = (*joint_vit_entries(config), *norm("post_layernorm", "vision_norm"))
    shapes = {"vision": vision_shapes(config)["vision"]}
    return params_of(model, Layout(entries), shapes)["vision"]


def _siglip_vision_params(model: transformers.SiglipVisionModel, part: str) -> dict:
    config = vit_config(model.config.to_dict())
    shapes = {part: vision_shapes(config)[part]}
    return params_of(model, siglip_vision_layout(config), shapes)[part]


def siglip_vit_params(model: transformers.SiglipVisionModel) -> dict:
    """Parameters of `VisionTransformer` (without the norm behind it) in the SigLIP variant."""
    return _siglip_vision_params(model, "vision")


def siglip_pooling_params(model: transformers.SiglipVisionModel) -> dict:
    """Parameters of `AttentionPooling`."""
    return _siglip_vision_params(model, "image_pooling")


@functools.cache
def siglip_shapes(model: Siglip) -> dict:
    """Abstract parameters of `Siglip`."""
    side = model.vision_config.image_size_px
    return shapes_of(model, jnp.zeros((1, side, side, 3)), jnp.zeros((1, 2), int))


def siglip_params(model: transformers.SiglipModel) -> dict:
    """Parameters of `Siglip`."""
    ours = siglip_model(model.config.to_dict())
    return params_of(model, siglip_layout(ours), siglip_shapes(ours))
