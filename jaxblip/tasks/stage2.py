"""The `stage2` task: the Q-Former's output as soft prompts of a frozen language model."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from jaxblip.errors import UserError
from jaxblip.losses.language_modeling import chunked_token_cross_entropy
from jaxblip.models.blip2 import Blip2Stage2
from jaxblip.models.language_models import make_language_model
from jaxblip.models.lora import adapted
from jaxblip.tasks.base import LossOutput, Task
from jaxblip.tasks.parts import (
    language_model_config,
    make_connector,
    qformer_config,
    vision_config,
)


class Stage2Task(Task):
    """Language-modelling loss on the text after the visual tokens (BLIP-2 §3.3).

    A decoder-only language model reads the visual tokens, the prompt and the caption, and the loss
    is about the caption. Of an encoder-decoder model, the encoder reads the visual tokens and the
    prompt, with `loss.prefix_lm` also the caption's first words (`input_ids`), and the loss is
    about what is left, which the decoder says (`text_ids`).
    """

    frozen = ("vision", "language_model")
    qformer_has_text: ClassVar[bool] = False

    @property
    def fields(self) -> tuple[str, ...]:
        if self.model.language_model_config.is_encoder_decoder:
            return (self.image_field, "text_ids", "text_mask", "input_ids", "input_mask")
        return (self.image_field, "text_ids", "text_mask", "prompt_length")

    def _check(self) -> None:
        super()._check()
        data = self.config.data
        if data.frames < 1:
            raise UserError(f"data.frames={data.frames} must be 1 or more: 1 is for images.")
        if data.frames > 1 and data.features:
            raise UserError(
                f"data.features={data.features!r} has the features of one image an example, and "
                f"data.frames={data.frames} wants several: set --config.data.features=."
            )

    def build_model(self) -> Blip2Stage2:
        config = self.config
        # A frozen language model runs without dropout; LAVIS leaves it on for OPT by accident.
        model = Blip2Stage2(
            vision_config(config),
            qformer_config(config, has_text=self.qformer_has_text),
            language_model_config(config, is_frozen=True),
            vision_norm_epsilon=config.model.vision_norm_epsilon,
            dtype=self.dtype,
            connector=make_connector(config, self.dtype),
            num_frames=config.data.frames,
        )
        visual, text = model.num_visual_tokens, config.data.max_text_tokens
        limit = config.model.language_model.get("max_positions", visual + text)
        if visual + text > limit:
            name, frames = config.model.connector, config.data.frames
            fields = {"qformer": "qformer.num_query_tokens", "perceiver": "perceiver.num_latents"}
            what = f"config.model.{fields[name]}={visual}" if name in fields else (
                f"The {visual} tokens of the image encoder, which model.connector={name!r} keeps,"
            )  # fmt: skip
            if frames > 1:
                what = f"The {visual} visual tokens of data.frames={frames} images"
            raise UserError(
                f"{what} and data.max_text_tokens={text} together are more than "
                f"config.model.language_model.max_positions={limit}: lower one of the first two."
            )
        return model

    def loss(self, params, batch, rng) -> LossOutput:
        text_ids, counts = batch["text_ids"], batch["text_mask"]
        hidden = self.apply(params, *self.model_inputs(batch), method="hidden", rng=rng)
        if "prompt_length" in batch:
            counts = counts & (jnp.arange(text_ids.shape[1]) >= batch["prompt_length"][:, None])
        score = partial(self.apply, params, method="logits")
        chunk = self.config.loss.vocab_chunk
        tokens = chunked_token_cross_entropy(score, hidden, text_ids, counts, chunk=chunk)
        metrics = {"lm": tokens.loss, "token_accuracy": tokens.accuracy}
        return LossOutput(tokens.loss, tokens.num_tokens, metrics)

    @property
    def language_model(self) -> nn.Module:
        """The language model by itself, as decoding wants it."""
        model = make_language_model(self.model.language_model_config, self.dtype)
        return adapted(model, self.lora)
