"""InstructBLIP as a whole: transformers' class, which is BLIP-2's with a text side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxblip.errors import UserError
from jaxblip.interop.entries import Layout
from jaxblip.interop.families.blip2 import hf_stage2_config, stage2_layout, stage2_model
from jaxblip.interop.families.qformer import INSTRUCTBLIP
from jaxblip.models.blip2 import Blip2Stage2

MODEL_TYPE, ARCHITECTURE = "instructblip", "InstructBlipForConditionalGeneration"


def instructblip_layout(model: Blip2Stage2) -> Layout:
    """A checkpoint of `InstructBlipForConditionalGeneration`.

    Raises:
      UserError: the Q-Former of `model` has no text side.
    """
    _check_text_side(model)
    return stage2_layout(model, INSTRUCTBLIP)


def instructblip_model(hf: Mapping[str, Any], dtype: Any = jnp.float32) -> Blip2Stage2:
    """The model that the config.json of an `InstructBlipForConditionalGeneration` describes.

    Raises:
      UserError: the field and the value that jaxblip does not cover.
    """
    return stage2_model(hf, MODEL_TYPE, dtype)


def hf_instructblip_config(
    model: Blip2Stage2, *, image_token_index: int | None = None, **tokens: int
) -> dict[str, Any]:
    """The config.json of an `InstructBlipForConditionalGeneration`.

    Args:
      image_token_index: id of the placeholder of a visual token in the language model's tokenizer.
      tokens: ids of the language model, as in `hf_opt_config`.

    Raises:
      UserError: the Q-Former of `model` has no text side.
    """
    _check_text_side(model)
    return hf_stage2_config(model, MODEL_TYPE, ARCHITECTURE, image_token_index, tokens)


def _check_text_side(model: Blip2Stage2) -> None:
    if not model.qformer_config.has_text:
        raise UserError(
            "The model's Q-Former has no text side (qformer_config.has_text=False), which every "
            "InstructBLIP checkpoint has: export it as BLIP-2."
        )
