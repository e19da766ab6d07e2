"""The `stage2` task: the Q-Former's output as soft prompts of a frozen language model."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxblip.losses.language_modeling import token_cross_entropy
from jaxblip.models.blip2 import Blip2Stage2
from jaxblip.models.opt import OptLanguageModel
from jaxblip.tasks.base import LossOutput, Task, normalize_images
from jaxblip.tasks.parts import language_model_config, qformer_config, vision_config


class Stage2Task(Task):
    """Language-modelling loss on the text after the visual tokens (BLIP-2 §3.3)."""

    fields = ("image", "text_ids", "text_mask", "prompt_length")
    frozen = ("vision", "language_model")

    def build_model(self) -> Blip2Stage2:
        config = self.config
        # A frozen language model runs without dropout; LAVIS leaves it on for OPT by accident.
        language_model = dataclasses.replace(language_model_config(config), dropout=0.0)
        return Blip2Stage2(
            vision_config(config),
            qformer_config(config, has_text=False),
            language_model,
            vision_norm_epsilon=config.model.vision_norm_epsilon,
            dtype=self.dtype,
        )

    def loss(self, params, batch, rng) -> LossOutput:
        text_ids, text_mask = batch["text_ids"], batch["text_mask"]
        logits = self.apply(params, *self.model_inputs(batch), rng=rng)
        is_prompt = jnp.arange(text_ids.shape[1]) < batch["prompt_length"][:, None]
        tokens = token_cross_entropy(logits, text_ids, text_mask & ~is_prompt)
        metrics = {"lm": tokens.loss, "token_accuracy": tokens.accuracy}
        return LossOutput(tokens.loss, tokens.num_tokens, metrics)

    @property
    def language_model(self) -> OptLanguageModel:
        """The language model by itself, as decoding wants it."""
        return OptLanguageModel(self.model.language_model_config, self.dtype)

    def prefix(self, params, images, prompt_ids):
        """What the language model continues: `[batch, queries + prompt, lm_width]`.

        Args:
          images: uint8.
          prompt_ids: int `[prompt]`, the same for all images, BOS first.
        """
        return self.apply(params, normalize_images(images), jnp.asarray(prompt_ids), method="prefix")
