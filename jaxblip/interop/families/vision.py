"""Image encoders: the names of transformers' EVA-CLIP, BLIP and CLIP, and of LAVIS.

The norm behind the encoder is no part of it (`vision_norm`), so the layouts of the assemblies add
it under its own name.
"""

from __future__ import annotations

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
from jaxblip.interop.vision import ACTIVATIONS, VARIANTS
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
    """`CLIPVisionModel`."""
    at = f"{theirs}embeddings"
    return (
        *patch_convolution(
            f"{at}.patch_embedding", f"{ours}patch_embedding", bias=config.patch_bias
        ),
        *plain(f"{at}.class_embedding", f"{ours}cls_token"),
        *plain(f"{at}.position_embedding.weight", f"{ours}position_embedding"),
        *norm(f"{theirs}pre_layrnorm", f"{ours}pre_norm"),  # so misspelt
        *clip_layers_entries(config.num_layers, f"{theirs}encoder.layers.", f"{ours}layers"),
    )


def clip_layers_entries(num_layers: int, theirs: str, ours: str) -> Entries:
    """The blocks of either tower of transformers' CLIP."""
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
    """The image encoder of a LAVIS checkpoint: EVA-CLIP's names, or OpenAI's where `pre_norm`."""
    return (_openai_clip if config.pre_norm else _eva)(config, theirs, ours)


def _eva(config: VitConfig, theirs: str, ours: str) -> Entries:
    entries = [
        *patch_convolution(f"{theirs}patch_embed.proj", f"{ours}patch_embedding"),
        *_with_ones(f"{theirs}cls_token", f"{ours}cls_token", 2),
        *_with_ones(f"{theirs}pos_embed", f"{ours}position_embedding", 1),
    ]
    for i in range(config.num_layers):
        layer, block = f"{theirs}blocks.{i}", f"{ours}layers"
        entries += [
            *norm(f"{layer}.norm1", f"{block}/attention_norm", i),
            *joint_qkv(f"{layer}.attn.qkv.weight", f"{block}/attention", i),
            *flat(f"{layer}.attn.q_bias", f"{block}/attention/query/bias", i),
            *flat(f"{layer}.attn.v_bias", f"{block}/attention/value/bias", i),
            *linear_from_heads(f"{layer}.attn.proj", f"{block}/attention/out", i),
            *norm(f"{layer}.norm2", f"{block}/mlp_norm", i),
            *linear(f"{layer}.mlp.fc1", f"{block}/mlp/up", i),
            *linear(f"{layer}.mlp.fc2", f"{block}/mlp/down", i),
        ]
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
