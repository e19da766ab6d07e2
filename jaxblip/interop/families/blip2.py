"""BLIP-2 as a whole: transformers' two classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxblip.errors import UserError
from jaxblip.interop.entries import Layout, linear, norm
from jaxblip.interop.families.llama import (
    ARCHITECTURES,
    INVERSE_FREQUENCIES,
    hf_llama_config,
    llama_config,
    llama_entries,
)
from jaxblip.interop.families.opt import hf_opt_config, opt_config, opt_entries
from jaxblip.interop.families.qformer import (
    BLIP2_TYPE,
    INSTRUCTBLIP_TYPE,
    QFormerNames,
    hf_qformer_config,
    qformer_config,
    qformer_entries,
)
from jaxblip.interop.families.t5 import hf_t5_config, t5_config, t5_entries
from jaxblip.interop.families.vision import (
    POSITION_IDS,
    hf_vision_config,
    joint_vit_entries,
    vit_config,
)
from jaxblip.models.blip2 import Blip2Stage1, Blip2Stage2
from jaxblip.models.llama import LlamaConfig
from jaxblip.models.opt import OptConfig
from jaxblip.models.qformer import QFormerConfig
from jaxblip.models.t5 import T5Config
from jaxblip.models.vit import VitConfig

VISION_TYPE = "blip_2_vision_model"

# What no class of transformers holds: the generative head, and the temperature of the contrast.
ONLY_IN_TRAINING = ("itg_head", "temperature")

# Model types of the parts, by that of the whole.
PARTS = {
    "blip-2": (VISION_TYPE, BLIP2_TYPE),
    "instructblip": ("instructblip_vision_model", INSTRUCTBLIP_TYPE),
}

# Language models by what transformers calls them, and by our config.
CONFIG_OF_TYPE = {
    "opt": opt_config,
    "t5": t5_config,
    **dict.fromkeys(ARCHITECTURES, llama_config),
}
ENTRIES_OF_CONFIG = {OptConfig: opt_entries, LlamaConfig: llama_entries, T5Config: t5_entries}
HF_CONFIG_OF_CONFIG = {
    OptConfig: hf_opt_config,
    LlamaConfig: hf_llama_config,
    T5Config: hf_t5_config,
}


def blip2_layout(model: Blip2Stage2) -> Layout:
    """A checkpoint of `Blip2ForConditionalGeneration`."""
    return stage2_layout(model, QFormerNames())


def stage2_layout(model: Blip2Stage2, names: QFormerNames) -> Layout:
    """A checkpoint of a class with a language model; `names` are those of its Q-Former."""
    language_model = model.language_model_config
    entries = (
        *joint_vit_entries(model.vision_config, "vision_model."),
        *norm("vision_model.post_layernorm", "vision_norm"),
        *qformer_entries(model.qformer_config, names),
        *linear("language_projection", "projection"),
        *_of(ENTRIES_OF_CONFIG, language_model)(
            language_model, "language_model.", "language_model/"
        ),
    )
    return Layout(entries, ignored=(POSITION_IDS, INVERSE_FREQUENCIES))


def blip2_retrieval_layout(model: Blip2Stage1) -> Layout:
    """A checkpoint of `Blip2ForImageTextRetrieval`, which has no place for the ITG head."""
    entries = (
        *joint_vit_entries(model.vision_config, "vision_model."),
        *norm("vision_model.post_layernorm", "vision_norm"),
        *qformer_entries(model.qformer_config),
        *linear("vision_projection", "image_projection"),
        *linear("text_projection", "text_projection"),
        *linear("itm_head", "itm_head"),
    )
    return Layout(entries, ignored=(POSITION_IDS,), absent=ONLY_IN_TRAINING)


def blip2_model(hf: Mapping[str, Any], dtype: Any = jnp.float32) -> Blip2Stage2:
    """The model that the config.json of a `Blip2ForConditionalGeneration` describes.

    Raises:
      UserError: the field and the value that jaxblip does not cover.
    """
    return stage2_model(hf, "blip-2", dtype)


def stage2_model(hf: Mapping[str, Any], kind: str, dtype: Any) -> Blip2Stage2:
    """The model that the config.json of a class with a language model describes.

    Args:
      kind: `model_type` of the whole, of `PARTS`.

    Raises:
      UserError: the field and the value that jaxblip does not cover.
    """
    vision, text = _vision(hf, kind), dict(hf.get("text_config") or {})
    model_type = text.get("model_type", "opt")
    if model_type not in CONFIG_OF_TYPE:
        raise UserError(
            f"text_config.model_type={model_type!r} is no language model of BLIP-2 here: it has "
            f"{', '.join(CONFIG_OF_TYPE)}."
        )
    return Blip2Stage2(
        vision,
        _qformer(hf, kind),
        CONFIG_OF_TYPE[model_type](text),
        vision_norm_epsilon=vision.layer_norm_epsilon,
        dtype=dtype,
    )


def hf_blip2_config(
    model: Blip2Stage2, *, image_token_index: int | None = None, **tokens: int
) -> dict[str, Any]:
    """The config.json of a `Blip2ForConditionalGeneration`.

    Args:
      image_token_index: id of the placeholder of a visual token in the tokenizer.
      tokens: ids of the language model, as in `hf_opt_config`.
    """
    architecture = "Blip2ForConditionalGeneration"
    return hf_stage2_config(model, "blip-2", architecture, image_token_index, tokens)


def hf_stage2_config(
    model: Blip2Stage2,
    kind: str,
    architecture: str,
    image_token_index: int | None,
    tokens: Mapping[str, int],
) -> dict[str, Any]:
    """The config.json of a class with a language model: `stage2_model` makes `model` of it again.

    Args:
      kind, architecture: the class's model type, of `PARTS`, and its name.
      image_token_index, tokens: as in `hf_blip2_config`.
    """
    language_model = model.language_model_config
    text = _of(HF_CONFIG_OF_CONFIG, language_model)(language_model, **tokens)
    return _hf_config(model, architecture, kind) | {
        "text_config": text,
        "image_token_index": image_token_index,
    }


def blip2_retrieval_model(
    hf: Mapping[str, Any], dec_token_id: int | None = None, dtype: Any = jnp.float32
) -> Blip2Stage1:
    """The model that the config.json of a `Blip2ForImageTextRetrieval` describes.

    Args:
      dec_token_id: of the tokenizer; by default the last, which `[DEC]` is in BLIP-2's.
    """
    vision, qformer = _vision(hf), _qformer(hf)
    if not qformer.has_text:
        raise UserError(
            "qformer_config.use_qformer_text_input is False: the Q-Former of this checkpoint has "
            "no text side, so it is of stage 2."
        )
    return Blip2Stage1(
        vision,
        qformer,
        dec_token_id=qformer.vocab_size - 1 if dec_token_id is None else dec_token_id,
        embed_dim=hf.get("image_text_hidden_size", 256),
        vision_norm_epsilon=vision.layer_norm_epsilon,
        dtype=dtype,
    )


def hf_blip2_retrieval_config(
    model: Blip2Stage1, *, image_token_index: int | None = None
) -> dict[str, Any]:
    """The config.json of a `Blip2ForImageTextRetrieval`; arguments as in `hf_blip2_config`."""
    return _hf_config(model, "Blip2ForImageTextRetrieval") | {
        "image_text_hidden_size": model.embed_dim,
        "image_token_index": image_token_index,
    }


def export_notes(model: Blip2Stage1 | Blip2Stage2) -> tuple[str, ...]:
    """What transformers' classes compute otherwise than `model`, one sentence each."""
    ours, theirs = model.vision_norm_epsilon, model.vision_config.layer_norm_epsilon
    if ours == theirs:
        return ()
    note = (
        f"transformers norms the image features with the encoder's epsilon {theirs}, not with "
        f"{ours} (model.vision_norm_epsilon), so its outputs differ slightly."
    )
    return (note,)


def _vision(hf: Mapping[str, Any], kind: str = "blip-2") -> VitConfig:
    vision_type, _ = PARTS[kind]
    return vit_config({"model_type": vision_type} | dict(hf.get("vision_config") or {}))


def _qformer(hf: Mapping[str, Any], kind: str = "blip-2") -> QFormerConfig:
    _, qformer_type = PARTS[kind]
    section = {"model_type": qformer_type} | dict(hf.get("qformer_config") or {})
    return qformer_config(section, hf.get("num_query_tokens", 32))


def _hf_config(
    model: Blip2Stage1 | Blip2Stage2, architecture: str, kind: str = "blip-2"
) -> dict[str, Any]:
    vision, (vision_type, qformer_type) = model.vision_config, PARTS[kind]
    return {
        "architectures": [architecture],
        "model_type": kind,
        "num_query_tokens": model.qformer_config.num_query_tokens,
        "vision_config": hf_vision_config(vision, vision_type),
        "qformer_config": hf_qformer_config(model.qformer_config, vision.width, qformer_type),
    }


def _of(table: Mapping[type, Any], config: Any) -> Any:
    if type(config) not in table:
        raise UserError(
            f"A language model of {type(config).__name__} has no place in BLIP-2 checkpoints: they "
            f"have {', '.join(kind.__name__ for kind in table)}."
        )
    return table[type(config)]
