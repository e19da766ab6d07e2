"""The `language_model` task: a decoder language model trained on text alone."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxblip.losses.language_modeling import token_cross_entropy
from jaxblip.models.attention import causal_mask
from jaxblip.models.opt import OptConfig, OptLanguageModel, token_positions
from jaxblip.tasks.base import LossOutput, Task
from jaxblip.tasks.parts import language_model_config


class TextModel(nn.Module):
    """A language model as a part, so that its parameters have the path they have in stage 2."""

    config: OptConfig
    dtype: str

    def setup(self):
        self.language_model = OptLanguageModel(self.config, self.dtype)

    def __call__(self, text_ids, text_valid):
        """Logits `[batch, text, vocab]`: position t scores the token t + 1."""
        hidden, _ = self.language_model(
            self.language_model.embed(text_ids),
            token_positions(text_valid),
            causal_mask(text_valid),
        )
        return self.language_model.logits(hidden)


class LanguageModelTask(Task):
    """Next-token cross-entropy; the first token (BOS) is given."""

    fields = ("text_ids", "text_mask")

    def build_model(self) -> TextModel:
        return TextModel(language_model_config(self.config), self.dtype)

    def loss(self, params, batch, rng) -> LossOutput:
        text_ids, text_mask = batch["text_ids"], batch["text_mask"]
        logits = self.apply(params, text_ids, text_mask, rng=rng)
        tokens = token_cross_entropy(logits[:, :-1], text_ids[:, 1:], text_mask[:, 1:])
        metrics = {"lm": tokens.loss, "token_accuracy": tokens.accuracy}
        return LossOutput(tokens.loss, tokens.num_tokens, metrics)

    def token_sums(self, params, text_ids, text_mask):
        """Sums over each text's tokens: `[batch, 3]`, of loss, correct guesses, and tokens."""
        logits = self.apply(params, text_ids, text_mask)
        rows = jax.vmap(token_cross_entropy)(
            logits[:, None, :-1], text_ids[:, None, 1:], text_mask[:, None, 1:]
        )
        sums = [rows.loss * rows.num_tokens, rows.accuracy * rows.num_tokens, rows.num_tokens]
        return jnp.stack(sums, axis=1)
