"""CLIP: the names of transformers' `CLIPModel` and `CLIPVisionModel`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax.numpy as jnp

from jaxblip.errors import UserError
from jaxblip.interop.entries import (
    Entries,
    Layout,
    also_under,
    embedding,
    linear,
    norm,
    plain,
)
from jaxblip.interop.families.vision import (
    ACTIVATIONS,
    POSITION_IDS,
    clip_layers_entries,
    clip_vit_entries,
    hf_vision_config,
    vit_config,
)
from jaxblip.models.clip import Clip, ClipTextConfig
from jaxblip.models.vit import VitConfig

VISION_TYPE = "clip_vision_model"

TextConfig = TypeVar("TextConfig", bound=ClipTextConfig)


def clip_layout(model: Clip) -> Layout:
    """A checkpoint of `CLIPModel`."""
    entries = (
        *clip_vit_entries(model.vision_config, "vision_model."),
        *norm("vision_model.post_layernorm", "vision_norm"),
        *clip_text_entries(model.text_config, "text_model."),
        *linear("visual_projection", "image_projection", bias=False),
        *linear("text_projection", "text_projection", bias=False),
        *plain("logit_scale", "logit_scale"),
    )
    return Layout(entries, ignored=(POSITION_IDS,))


def clip_vision_layout(config: VitConfig) -> Layout:
    """A checkpoint of `CLIPVisionModel`: `vision` and `vision_norm`.

    transformers 4 has its names under "vision_model."; 5 writes them bare and reads both.
    """
    entries = (
        *clip_vit_entries(config, "vision_model."),
        *norm("vision_model.post_layernorm", "vision_norm"),
    )
    return Layout(also_under(entries, "vision_model.", ""), ignored=(POSITION_IDS,))


def clip_text_entries(
    config: ClipTextConfig, theirs: str = "", ours: str = "text/"
) -> Entries:
    """The parameters of a `TextTower`: `CLIPTextModel`, `SiglipTextModel`."""
    return (
        *embedding(f"{theirs}embeddings.token_embedding", f"{ours}token_embedding"),
        *embedding(f"{theirs}embeddings.position_embedding", f"{ours}position_embedding"),
        *clip_layers_entries(config.num_layers, f"{theirs}encoder.layers.", f"{ours}layers"),
        *norm(f"{theirs}final_layer_norm", f"{ours}final_norm"),
    )


_TEXT_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
}


def clip_text_config(hf: Mapping[str, Any]) -> ClipTextConfig:
    """The text tower that a `text_config` of transformers' CLIP describes.

    Raises:
      UserError: the field and the value that `ClipTextConfig` does not cover.
    """
    return text_tower(ClipTextConfig, "CLIP", _TEXT_DEFAULTS | dict(hf))


def text_tower(kind: type[TextConfig], name: str, fields: Mapping[str, Any]) -> TextConfig:
    """The text tower `kind` that a complete `text_config` describes.

    Args:
      name: of the family, for errors.
    """
    if fields["hidden_act"] not in ACTIVATIONS or fields["attention_dropout"]:
        raise UserError(
            f"A {name} text tower with hidden_act={fields['hidden_act']!r} and attention_dropout="
            f"{fields['attention_dropout']} is not covered: the activations are "
            f"{', '.join(ACTIVATIONS)}, and there is no dropout."
        )
    return kind(
        vocab_size=fields["vocab_size"],
        max_positions=fields["max_position_embeddings"],
        width=fields["hidden_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=fields["num_attention_heads"],
        mlp_width=fields["intermediate_size"],
        activation=ACTIVATIONS[fields["hidden_act"]],
        layer_norm_epsilon=fields["layer_norm_eps"],
    )


def hf_text_tower(text: ClipTextConfig) -> dict[str, Any]:
    """The fields of a `text_config` of which `text_tower` makes `text` again."""
    return {
        "vocab_size": text.vocab_size,
        "hidden_size": text.width,
        "intermediate_size": text.mlp_width,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "max_position_embeddings": text.max_positions,
        "hidden_act": {ours: theirs for theirs, ours in ACTIVATIONS.items()}[text.activation],
        "layer_norm_eps": text.layer_norm_epsilon,
    }


def clip_model(hf: Mapping[str, Any], dtype: Any = jnp.float32) -> Clip:
    """The model that the config.json of a `CLIPModel` describes."""
    vision = vit_config({"model_type": VISION_TYPE} | dict(hf.get("vision_config") or {}))
    return Clip(
        vision,
        clip_text_config(hf.get("text_config") or {}),
        embed_dim=hf.get("projection_dim", 512),
        vision_norm_epsilon=vision.layer_norm_epsilon,
        dtype=dtype,
    )


def hf_clip_config(model: Clip, **tokens: int) -> dict[str, Any]:
    """The config.json of a `CLIPModel`, of which `clip_model` makes `model` again.

    Args:
      tokens: ids of the text tower that the model itself does not know: `bos_token_id`,
        `eos_token_id` (whose place in a text the text embedding is taken from), `pad_token_id`.
    """
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model.embed_dim,
        "vision_config": hf_vision_config(model.vision_config, VISION_TYPE)
        | {"projection_dim": model.embed_dim},
        "text_config": hf_text_tower(model.text_config)
        | {"model_type": "clip_text_model", "projection_dim": model.embed_dim}
        | tokens,
    }


def hf_clip_vision_config(config: VitConfig) -> dict[str, Any]:
    """The config.json of a `CLIPVisionModel`, of which `vit_config` makes `config` again."""
    return hf_vision_config(config, VISION_TYPE) | {"architectures": ["CLIPVisionModel"]}
