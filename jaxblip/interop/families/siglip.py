"""SigLIP, and SigLIP 2 at fixed resolution: the names of `SiglipModel` and `SiglipVisionModel`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxblip.errors import UserError
from jaxblip.interop.entries import (
    Entries,
    Layout,
    also_under,
    joint_qkv,
    linear,
    linear_from_heads,
    norm,
    plain,
)
from jaxblip.interop.families.clip import clip_text_entries, hf_text_tower, text_tower
from jaxblip.interop.families.vision import (
    POSITION_IDS,
    clip_vit_entries,
    hf_vision_config,
    vit_config,
)
from jaxblip.models.siglip import Siglip, SiglipTextConfig
from jaxblip.models.vit import VitConfig

VISION_TYPE = "siglip_vision_model"


def siglip_layout(model: Siglip) -> Layout:
    """A checkpoint of `SiglipModel`."""
    entries = (
        *_vision(model.vision_config),
        *clip_text_entries(model.text_config, "text_model."),
        *linear("text_model.head", "text_projection"),
        *_scalar("logit_scale"),
        *_scalar("logit_bias"),
    )
    return Layout(entries, ignored=(POSITION_IDS,))


def siglip_vision_layout(config: VitConfig) -> Layout:
    """A checkpoint of `SiglipVisionModel`: `vision`, `vision_norm` and `image_pooling`.

    transformers 4 has its names under "vision_model."; 5 writes them bare and reads both.
    """
    return Layout(also_under(_vision(config), "vision_model.", ""), ignored=(POSITION_IDS,))


def pooling_entries(theirs: str = "head.", ours: str = "image_pooling/") -> Entries:
    """The parameters of `AttentionPooling`."""
    attention = f"{theirs}attention"
    return (
        *plain(f"{theirs}probe", f"{ours}query_tokens", their_shape=lambda shape: (1, *shape)),
        *joint_qkv(
            f"{attention}.in_proj_weight",
            f"{ours}attention",
            key_values=f"{ours}token_key_values",
            bias=f"{attention}.in_proj_bias",
        ),
        *linear_from_heads(f"{attention}.out_proj", f"{ours}attention/out"),
        *norm(f"{theirs}layernorm", f"{ours}mlp_norm"),
        *linear(f"{theirs}mlp.fc1", f"{ours}mlp/up"),
        *linear(f"{theirs}mlp.fc2", f"{ours}mlp/down"),
    )


def _vision(config: VitConfig) -> Entries:
    return (
        *clip_vit_entries(config, "vision_model."),
        *norm("vision_model.post_layernorm", "vision_norm"),
        *pooling_entries("vision_model.head."),
    )


def _scalar(name: str) -> Entries:
    return plain(name, name, their_shape=lambda shape: (1,))


_TEXT_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 64,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0,
}


def siglip_model(hf: Mapping[str, Any], dtype: Any = jnp.float32) -> Siglip:
    """The model that the config.json of a `SiglipModel` describes.

    Raises:
      UserError: the field and the value that `Siglip` does not cover.
    """
    if hf.get("model_type", "siglip") != "siglip":
        raise UserError(
            f"model_type={hf['model_type']!r} is not covered, only 'siglip', which the checkpoints "
            "of SigLIP 2 at fixed resolution have, too."
        )
    vision = vit_config({"model_type": VISION_TYPE} | dict(hf.get("vision_config") or {}))
    fields = _TEXT_DEFAULTS | dict(hf.get("text_config") or {})
    text = text_tower(SiglipTextConfig, "SigLIP", fields)
    projection_size = fields.get("projection_size")
    if (text.width if projection_size is None else projection_size) != vision.width:
        raise UserError(
            f"text_config.projection_size={projection_size} with hidden_size={text.width} is not "
            f"covered: texts must be embedded in the width of the image tower, {vision.width}."
        )
    return Siglip(vision, text, vision_norm_epsilon=vision.layer_norm_epsilon, dtype=dtype)


def hf_siglip_config(model: Siglip, **tokens: int) -> dict[str, Any]:
    """The config.json of a `SiglipModel`, of which `siglip_model` makes `model` again.

    Args:
      tokens: ids of the text tower that the model itself does not know: `bos_token_id`,
        `eos_token_id`, `pad_token_id`.
    """
    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "vision_config": hf_vision_config(model.vision_config, VISION_TYPE),
        "text_config": hf_text_tower(model.text_config)
        | {"model_type": "siglip_text_model", "projection_size": model.vision_config.width}
        | tokens,
    }


def hf_siglip_vision_config(config: VitConfig) -> dict[str, Any]:
    """The config.json of a `SiglipVisionModel`, of which `vit_config` makes `config` again."""
    return hf_vision_config(config, VISION_TYPE) | {"architectures": ["SiglipVisionModel"]}
