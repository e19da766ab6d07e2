"""Image encoders: names of transformers' EVA-CLIP, BLIP, CLIP and SigLIP, of LAVIS and BLIP.

The norm behind the encoder is no part of it (`vision_norm`), so the layouts of the assemblies add
it under its own name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxblip.errors import UserError
from jaxblip.interop.entries import (
    Entries,
    flat,
    joint_qkv,
    linear,
    linear_from_heads,
    norm,
    patch_convolution,
    plain,
)
from jaxblip.models.vit import VitConfig

POSITION_IDS = r"(.*\.)?position_ids"  # an index buffer that older versions of transformers saved


def joint_vit_entries(config: VitConfig, theirs: str = "", ours: str = "vision/") -> Entries:
    """`Blip2VisionModel`, `InstructBlipVisionModel` and `BlipVisionModel`: one joint `qkv`."""
    at = f"{theirs}embeddings"
    entries = [
        *patch_convolution(f"{at}.patch_embedding", f"{ours}patch_embedding"),
        *_with_ones(f"{at}.class_embedding", f"{ours}cls_token", 2),
        *_with_ones(f"{at}.position_embedding", f"{ours}position_embedding", 1),
    ]
    for i in range(config.num_layers):
        layer, block = f"{theirs}encoder.layers.{i}", f"{ours}layers"
        entries += [
            *norm(f"{layer}.layer_norm1", f"{block}/attention_norm", i),
            *joint_qkv(
                f"{layer}.self_attn.qkv.weight",
                f"{block}/attention",
                i,
                bias=f"{layer}.self_attn.qkv.bias",
                key_bias=config.key_bias,
            ),
            *linear_from_heads(f"{layer}.self_attn.projection", f"{block}/attention/out", i),
            *norm(f"{layer}.layer_norm2", f"{block}/mlp_norm", i),
            *linear(f"{layer}.mlp.fc1", f"{block}/mlp/up", i),
            *linear(f"{layer}.mlp.fc2", f"{block}/mlp/down", i),
        ]
    return tuple(entries)


def clip_vit_entries(config: VitConfig, theirs: str = "", ours: str = "vision/") -> Entries:
    """`CLIPVisionModel` and `SiglipVisionModel`."""
    at = f"{theirs}embeddings"
    entries = [
        *patch_convolution(
            f"{at}.patch_embedding", f"{ours}patch_embedding", bias=config.patch_bias
        ),
        *plain(f"{at}.position_embedding.weight", f"{ours}position_embedding"),
        *clip_layers_entries(config.num_layers, f"{theirs}encoder.layers.", f"{ours}layers"),
    ]
    if config.has_cls_token:
        entries += plain(f"{at}.class_embedding", f"{ours}cls_token")
    if config.pre_norm:
        entries += norm(f"{theirs}pre_layrnorm", f"{ours}pre_norm")  # so misspelt
    return tuple(entries)


def clip_layers_entries(num_layers: int, theirs: str, ours: str) -> Entries:
    """The blocks of either tower of transformers' CLIP and SigLIP."""
    entries = []
    for i in range(num_layers):
        layer = f"{theirs}{i}"
        entries += [
            *norm(f"{layer}.layer_norm1", f"{ours}/attention_norm", i),
            *linear(f"{layer}.self_attn.q_proj", f"{ours}/attention/query", i),
            *linear(f"{layer}.self_attn.k_proj", f"{ours}/attention/key", i),
            *linear(f"{layer}.self_attn.v_proj", f"{ours}/attention/value", i),
            *linear_from_heads(f"{layer}.self_attn.out_proj", f"{ours}/attention/out", i),
            *norm(f"{layer}.layer_norm2", f"{ours}/mlp_norm", i),
            *linear(f"{layer}.mlp.fc1", f"{ours}/mlp/up", i),
            *linear(f"{layer}.mlp.fc2", f"{ours}/mlp/down", i),
        ]
    return tuple(entries)


def lavis_vit_entries(config: VitConfig, theirs: str = "", ours: str = "vision/") -> Entries:
    """The image encoder of LAVIS's files and of BLIP's: timm's names, or OpenAI's if `pre_norm`."""
    return (_openai_clip if config.pre_norm else _timm)(config, theirs, ours)


def _timm(config: VitConfig, theirs: str, ours: str) -> Entries:
    entries = [
        *patch_convolution(f"{theirs}patch_embed.proj", f"{ours}patch_embedding"),
        *_with_ones(f"{theirs}cls_token", f"{ours}cls_token", 2),
        *_with_ones(f"{theirs}pos_embed", f"{ours}position_embedding", 1),
    ]
    for i in range(config.num_layers):
        layer, block = f"{theirs}blocks.{i}", f"{ours}layers"
        entries += [
            *norm(f"{layer}.norm1", f"{block}/attention_norm", i),
            *joint_qkv(
                f"{layer}.attn.qkv.weight",
                f"{block}/attention",
                i,
                bias=f"{layer}.attn.qkv.bias" if config.key_bias else None,
            ),
            *linear_from_heads(f"{layer}.attn.proj", f"{block}/attention/out", i),
            *norm(f"{layer}.norm2", f"{block}/mlp_norm", i),
            *linear(f"{layer}.mlp.fc1", f"{block}/mlp/up", i),
            *linear(f"{layer}.mlp.fc2", f"{block}/mlp/down", i),
        ]
        if not config.key_bias:  # EVA-CLIP
            entries += flat(f"{layer}.attn.q_bias", f"{block}/attention/query/bias", i)
            entries += flat(f"{layer}.attn.v_bias", f"{block}/attention/value/bias", i)
    return tuple(entries)


def _openai_clip(config: VitConfig, theirs: str, ours: str) -> Entries:
    entries = [
        *patch_convolution(f"{theirs}conv1", f"{ours}patch_embedding", bias=False),
        *plain(f"{theirs}class_embedding", f"{ours}cls_token"),
        *plain(f"{theirs}positional_embedding", f"{ours}position_embedding"),
        *norm(f"{theirs}ln_pre", f"{ours}pre_norm"),
    ]
    for i in range(config.num_layers):
        layer, block = f"{theirs}transformer.resblocks.{i}", f"{ours}layers"
        entries += [
            *norm(f"{layer}.ln_1", f"{block}/attention_norm", i),
            *joint_qkv(
                f"{layer}.attn.in_proj_weight",
                f"{block}/attention",
                i,
                bias=f"{layer}.attn.in_proj_bias",
            ),
            *linear_from_heads(f"{layer}.attn.out_proj", f"{block}/attention/out", i),
            *norm(f"{layer}.ln_2", f"{block}/mlp_norm", i),
            *linear(f"{layer}.mlp.c_fc", f"{block}/mlp/up", i),
            *linear(f"{layer}.mlp.c_proj", f"{block}/mlp/down", i),
        ]
    return tuple(entries)


def _with_ones(theirs: str, ours: str, count: int) -> Entries:
    """Theirs has axes of length 1 in front."""
    return plain(theirs, ours, their_shape=lambda shape: (1,) * count + tuple(shape))


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
    # The joint bias that is stored has zeros for the keys, or else "key_bias" was added.
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
    variant = VARIANTS[model_type] | ({"key_bias": True} if fields.get("key_bias") else {})
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
        **variant,
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


_USUAL = {"pre_norm": False, "patch_bias": True, "key_bias": True, "has_cls_token": True}


def hf_vision_config(config: VitConfig, model_type: str) -> dict[str, Any]:
    """The `vision_config` of which `vit_config` makes `config` again.

    Args:
      model_type: of the target class, such as "blip_2_vision_model".

    Raises:
      UserError: that class has no encoder of this variant.
    """
    for field, value in (_USUAL | VARIANTS[model_type]).items():
        given = getattr(config, field)
        # The joint bias of EVA-CLIP's classes has a place for a keys' bias, although it has none.
        if given != value and not (field == "key_bias" and given):
            raise UserError(
                f"An image encoder with {field}={given} cannot be exported as {model_type}: that "
                f"class has {field}={value}."
            )
    return {
        "model_type": model_type,
        "image_size": config.image_size_px,
        "patch_size": config.patch_size_px,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_width,
        "hidden_act": {ours: theirs for theirs, ours in ACTIVATIONS.items()}[config.activation],
        "layer_norm_eps": config.layer_norm_epsilon,
    }
