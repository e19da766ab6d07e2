"""BLIP: transformers' classes for retrieval, captioning and visual question answering."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxblip.errors import UserError
from jaxblip.interop.entries import (
    Entries,
    Layout,
    embedding,
    linear,
    linear_from_heads,
    norm,
    plain,
)
from jaxblip.interop.families.vision import (
    POSITION_IDS,
    hf_vision_config,
    joint_vit_entries,
    vit_config,
)
from jaxblip.models.blip import BlipCaptioner, BlipQuestionAnswering, BlipRetrieval
from jaxblip.models.med import MedConfig
from jaxblip.models.vit import VitConfig

VISION_TYPE = "blip_vision_model"

# What no class of transformers holds: the temperature of the contrast.
ONLY_IN_TRAINING = ("temperature",)


def blip_retrieval_layout(model: BlipRetrieval) -> Layout:
    """A checkpoint of `BlipForImageTextRetrieval`."""
    entries = (
        *_vision_entries(model.vision_config),
        *med_entries(model.text_config, "text_encoder.", "text/"),
        *linear("vision_proj", "image_projection"),
        *linear("text_proj", "text_projection"),
        *linear("itm_head", "itm_head"),
    )
    return Layout(entries, ignored=(POSITION_IDS,), absent=ONLY_IN_TRAINING)


def blip_captioner_layout(model: BlipCaptioner) -> Layout:
    """A checkpoint of `BlipForConditionalGeneration`."""
    entries = (
        *_vision_entries(model.vision_config),
        *med_decoder_entries(model.text_config, "text_decoder.", "decoder/"),
    )
    return Layout(entries, ignored=(POSITION_IDS,))


def blip_question_answering_layout(model: BlipQuestionAnswering) -> Layout:
    """A checkpoint of `BlipForQuestionAnswering`."""
    entries = (
        *_vision_entries(model.vision_config),
        *med_entries(model.text_config, "text_encoder.", "text/"),
        *med_decoder_entries(model.text_config, "text_decoder.", "decoder/"),
    )
    return Layout(entries, ignored=(POSITION_IDS,))


def _vision_entries(config: VitConfig) -> Entries:
    return (
        *joint_vit_entries(config, "vision_model."),
        *norm("vision_model.post_layernorm", "vision_norm"),
    )


def med_entries(
    config: MedConfig, theirs: str = "", ours: str = "", heads: tuple[str, ...] = ()
) -> Entries:
    """The parameters of `Med`: `BlipTextModel` without its pooler.

    Args:
      heads: names under which files have the word table once more, as the tied output.
    """
    at, text = f"{theirs}embeddings", f"{ours}text_embeddings"
    entries = [
        *embedding(f"{at}.word_embeddings", f"{text}/token_embedding", aliases=heads),
        *embedding(f"{at}.position_embeddings", f"{text}/position_embedding"),
        *norm(f"{at}.LayerNorm", f"{ours}embedding_norm"),
    ]
    for i in range(config.num_layers):
        layer, block = f"{theirs}encoder.layer.{i}", f"{ours}layers"
        for theirs_name, name, key_values in (
            ("attention", "attention", f"{block}/attention"),
            ("crossattention", "cross_attention", f"{ours}source_key_values"),
        ):
            attention = f"{layer}.{theirs_name}"
            entries += [
                *linear(f"{attention}.self.query", f"{block}/{name}/query", i),
                *linear(f"{attention}.self.key", f"{key_values}/key", i),
                *linear(f"{attention}.self.value", f"{key_values}/value", i),
                *linear_from_heads(f"{attention}.output.dense", f"{block}/{name}/out", i),
                *norm(f"{attention}.output.LayerNorm", f"{block}/{name}_norm", i),
            ]
        entries += [
            *linear(f"{layer}.intermediate.dense", f"{block}/mlp/up", i),
            *linear(f"{layer}.output.dense", f"{block}/mlp/down", i),
            *norm(f"{layer}.output.LayerNorm", f"{block}/mlp_norm", i),
        ]
    return tuple(entries)


def med_decoder_entries(config: MedConfig, theirs: str = "", ours: str = "") -> Entries:
    """The parameters of `MedDecoder`: `BlipTextLMHeadModel`."""
    head = f"{theirs}cls.predictions"
    return (
        *med_entries(config, f"{theirs}bert.", ours, heads=(f"{head}.decoder.weight",)),
        *linear(f"{head}.transform.dense", f"{ours}itg_head/dense"),
        *norm(f"{head}.transform.LayerNorm", f"{ours}itg_head/norm"),
        *plain(f"{head}.bias", f"{ours}itg_head/bias", aliases=(f"{head}.decoder.bias",)),
    )


# Fields that must have one value. Without `is_decoder` transformers leaves out the cross-attention.
_REQUIRED = {"hidden_act": "gelu", "is_decoder": True, "tie_word_embeddings": True}
_DEFAULTS = _REQUIRED | {
    "vocab_size": 30524,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,  # the original code has 12, and so do published configs
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.02,
    "bos_token_id": 30522,
}


def med_config(hf: Mapping[str, Any]) -> MedConfig:
    """The text stack that a `text_config` of transformers' BLIP describes.

    Args:
      hf: the section of the config.json. Fields that it leaves out have the defaults of
        transformers' `BlipTextConfig`.

    Raises:
      UserError: the field and the value that `MedConfig` does not cover.
    """
    fields = _DEFAULTS | dict(hf)
    for field, value in _REQUIRED.items():
        if fields[field] != value:
            raise UserError(
                f"text_config.{field}={fields[field]!r} is not covered, only {value!r}: every "
                "published BLIP has it."
            )
    return MedConfig(
        vocab_size=fields["vocab_size"],
        width=fields["hidden_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=fields["num_attention_heads"],
        mlp_width=fields["intermediate_size"],
        max_positions=fields["max_position_embeddings"],
        layer_norm_epsilon=fields["layer_norm_eps"],
        hidden_dropout=float(fields["hidden_dropout_prob"]),
        attention_dropout=float(fields["attention_probs_dropout_prob"]),
        initializer_range=fields["initializer_range"],
    )


def blip_retrieval_model(
    hf: Mapping[str, Any], enc_token_id: int | None = None, dtype: Any = jnp.float32
) -> BlipRetrieval:
    """The model that the config.json of a `BlipForImageTextRetrieval` describes.

    Args:
      enc_token_id: 30523 for BLIP's own way of reading a text with its image; None for that of
        transformers.
    """
    return BlipRetrieval(
        **_configs(hf),
        embed_dim=hf.get("image_text_hidden_size", 256),
        enc_token_id=enc_token_id,
        dtype=dtype,
    )


def blip_captioner(hf: Mapping[str, Any], dtype: Any = jnp.float32) -> BlipCaptioner:
    """The model that the config.json of a `BlipForConditionalGeneration` describes."""
    return BlipCaptioner(**_configs(hf), dec_token_id=_dec_token_id(hf), dtype=dtype)


def blip_question_answering_model(
    hf: Mapping[str, Any], enc_token_id: int | None = None, dtype: Any = jnp.float32
) -> BlipQuestionAnswering:
    """The model that the config.json of a `BlipForQuestionAnswering` describes.

    Args:
      enc_token_id: as in `blip_retrieval_model`.
    """
    return BlipQuestionAnswering(
        **_configs(hf), dec_token_id=_dec_token_id(hf), enc_token_id=enc_token_id, dtype=dtype
    )


def _configs(hf: Mapping[str, Any]) -> dict[str, Any]:
    vision = {"model_type": VISION_TYPE} | dict(hf.get("vision_config") or {})
    return {
        "vision_config": vit_config(vision),
        "text_config": med_config(hf.get("text_config") or {}),
    }


def _dec_token_id(hf: Mapping[str, Any]) -> int:
    return (_DEFAULTS | dict(hf.get("text_config") or {}))["bos_token_id"]


def hf_blip_retrieval_config(model: BlipRetrieval, **text: Any) -> dict[str, Any]:
    """The config.json of a `BlipForImageTextRetrieval`; arguments as in `hf_blip_captioner_config`.

    An `enc_token_id` has no place in it: transformers reads the texts as they are.
    """
    config = _hf_config(model, "BlipForImageTextRetrieval", text)
    return config | {"image_text_hidden_size": model.embed_dim}


def hf_blip_captioner_config(model: BlipCaptioner, **text: Any) -> dict[str, Any]:
    """The config.json of a `BlipForConditionalGeneration`.

    Args:
      text: further fields of its `text_config`, which the model itself does not know:
        `sep_token_id` (102) that ends a text, `pad_token_id` (0), and the `label_smoothing` of
        the loss.
    """
    return _hf_config(
        model, "BlipForConditionalGeneration", {"bos_token_id": model.dec_token_id} | text
    )


def hf_blip_question_answering_config(model: BlipQuestionAnswering, **text: Any) -> dict[str, Any]:
    """The config.json of a `BlipForQuestionAnswering`; arguments and notes as of the two above.

    Raises:
      UserError: image and text differ in width, which that class does not allow.
    """
    widths = model.vision_config.width, model.text_config.width
    if widths[0] != widths[1]:
        raise UserError(
            f"BlipForQuestionAnswering cannot have images of width {widths[0]} with texts of width "
            f"{widths[1]}, since its decoder reads both: set one to fit the other."
        )
    return _hf_config(
        model, "BlipForQuestionAnswering", {"bos_token_id": model.dec_token_id} | text
    )


def export_notes(model: BlipRetrieval | BlipCaptioner | BlipQuestionAnswering) -> tuple[str, ...]:
    """What transformers' classes compute otherwise than `model`, one sentence each."""
    enc_token_id = getattr(model, "enc_token_id", None)
    if enc_token_id is None:
        return ()
    note = (
        f"A text that is read with its image begins here with the token {enc_token_id} "
        "(model.enc_token_id), but in transformers with what input_ids begins with: there, put "
        "that token first."
    )
    return (note,)


def _hf_config(
    model: BlipRetrieval | BlipCaptioner | BlipQuestionAnswering,
    architecture: str,
    text: Mapping[str, Any],
) -> dict[str, Any]:
    c = model.text_config
    return {
        "architectures": [architecture],
        "model_type": "blip",
        "vision_config": hf_vision_config(model.vision_config, VISION_TYPE),
        "text_config": _REQUIRED
        | {
            "model_type": "blip_text_model",
            "encoder_hidden_size": model.vision_config.width,
            "vocab_size": c.vocab_size,
            "hidden_size": c.width,
            "num_hidden_layers": c.num_layers,
            "num_attention_heads": c.num_heads,
            "intermediate_size": c.mlp_width,
            "max_position_embeddings": c.max_positions,
            "layer_norm_eps": c.layer_norm_epsilon,
            "hidden_dropout_prob": c.hidden_dropout,
            "attention_probs_dropout_prob": c.attention_dropout,
            "initializer_range": c.initializer_range,
            **text,
        },
    }
