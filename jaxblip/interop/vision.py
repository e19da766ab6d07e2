"""Image encoders of Hugging Face checkpoints as `VitConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxblip.errors import UserError
from jaxblip.models.vit import VitConfig

# What a config.json leaves out has the default of the checkpoint's own config class: transformers
# writes only what differs. The classes differ in epsilon, image size and patch size.
_VIT_B = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "attention_dropout": 0.0,
}
_VIT_G = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "num_channels": 3,
    "attention_dropout": 0.0,
    "qkv_bias": True,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "clip_vision_model": dict(
        _VIT_B, image_size=224, patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5
    ),
    "blip_2_vision_model": _VIT_G,
    "instructblip_vision_model": _VIT_G,
    "blip_vision_model": dict(
        _VIT_B, image_size=384, patch_size=16, hidden_act="gelu", layer_norm_eps=1e-5
    ),
    "siglip_vision_model": dict(
        _VIT_B, image_size=224, patch_size=16, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6
    ),
}

# What the class of the checkpoint fixes and no config says.
VARIANTS: dict[str, dict[str, bool]] = {
    "clip_vision_model": {"pre_norm": True, "patch_bias": False},
    # The joint bias that is stored has zeros for the keys.
    "blip_2_vision_model": {"key_bias": False},
    "instructblip_vision_model": {"key_bias": False},
    "blip_vision_model": {},
    "siglip_vision_model": {"has_cls_token": False},
}

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}

# Fields that must have one value, and what another one would mean.
_REQUIRED = {
    "num_channels": (3, "images have three channels"),
    "attention_dropout": (0.0, "the image encoder has no dropout; set it to 0"),
    "qkv_bias": (True, "EVA-CLIP's queries and values have biases"),
}


def vit_config(hf: Mapping[str, Any]) -> VitConfig:
    """The encoder that a vision config of transformers describes.

    It has all blocks of the checkpoint, and no final norm: `vision_norm` stands outside of it, with
    the same `layer_norm_epsilon`. SigLIP's pooling head is `AttentionPooling` of the same config.

    Args:
      hf: the `vision_config` section of a config.json, with `model_type` clip_vision_model,
        blip_2_vision_model, instructblip_vision_model, blip_vision_model or siglip_vision_model
        (which SigLIP 2 of fixed resolution has, too). Fields that it leaves out have the defaults
        of the model type's class; `initializer_range` is not read, since weights follow.

    Raises:
      UserError: the field and the value that no `VitConfig` covers.
    """
    model_type = hf.get("model_type")
    if model_type not in DEFAULTS:
        raise UserError(
            f"vision_config.model_type={model_type!r} is no image encoder of jaxblip: it has "
            f"{', '.join(DEFAULTS)}."
        )
    fields = DEFAULTS[model_type] | dict(hf)
    for field, (value, reason) in _REQUIRED.items():
        if field in DEFAULTS[model_type] and fields[field] != value:
            raise UserError(
                f"vision_config.{field}={fields[field]!r} of {model_type} is not covered, only "
                f"{value!r}: {reason}."
            )
    if fields["hidden_act"] not in ACTIVATIONS:
        raise UserError(
            f"vision_config.hidden_act={fields['hidden_act']!r} of {model_type} is not covered: "
            f"jaxblip has {', '.join(ACTIVATIONS)}."
        )
    image_size, patch_size = (
        _square(model_type, fields, f"{name}_size") for name in ("image", "patch")
    )
    return VitConfig(
        image_size_px=image_size,
        patch_size_px=patch_size,
        width=fields["hidden_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=fields["num_attention_heads"],
        mlp_width=fields["intermediate_size"],
        activation=ACTIVATIONS[fields["hidden_act"]],
        layer_norm_epsilon=fields["layer_norm_eps"],
        # The convolutions of transformers leave out what fills no patch.
        crop_to_patches=image_size % patch_size != 0,
        **VARIANTS[model_type],
    )


def _square(model_type: str, fields: Mapping[str, Any], name: str) -> int:
    """One side in pixels of a size that may be written as [height, width]."""
    value = fields[name]
    sides = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(sides) != 1 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError(
            f"vision_config.{name}={value!r} of {model_type} is not covered: it must be one "
            "positive number of pixels, or the same one for height and width."
        )
    return sides.pop()
