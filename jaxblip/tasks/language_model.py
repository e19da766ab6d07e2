"""The `language_model` task: a language model trained on text alone."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxblip.errors import UserError
from jaxblip.losses.language_modeling import chunked_token_cross_entropy, token_cross_entropy
from jaxblip.models.language_models import (
    LanguageModelConfig,
    answer_hidden,
    continued_hidden,
    make_language_model,
)
from jaxblip.tasks.base import LossOutput, Task
from jaxblip.tasks.parts import language_model_config


class TextModel(nn.Module):
    """A language model as a part, so that its parameters have the path they have in stage 2."""

    config: LanguageModelConfig
    dtype: str

    def setup(self):
        self.language_model = make_language_model(self.config, self.dtype)

    def __call__(self, *texts):
        """Scores of the words `[batch, text, vocab]`; arguments as `hidden`."""
        return self.logits(self.hidden(*texts))

    def logits(self, hidden):
        """Scores of the words, by the head of the language model."""
        return self.language_model.logits(hidden)

    def hidden(self, text_ids, text_valid, *others):
        """What `logits` reads, `[batch, text, width]`.

        Of a decoder-only model, position t scores the token t + 1; of an encoder-decoder model,
        whose encoder reads the input, the token t.

        Args:
          others: ids and mask of an encoder's input; for a decoder-only model the segment ids of
            packed rows, or nothing.
        """
        model = self.language_model
        if self.config.is_encoder_decoder:
            input_ids, input_valid = others
            return answer_hidden(model, model.embed(input_ids), input_valid, text_ids)
        return continued_hidden(model, model.embed(text_ids), text_valid, *others)


class LanguageModelTask(Task):
    """Next-token cross-entropy.

    The first token of a decoder-only model (BOS) is given. The encoder of an encoder-decoder model
    reads the prompt, and with `loss.prefix_lm` also the first words of the text.
    """

    @property
    def fields(self) -> tuple[str, ...]:
        if self.model.config.is_encoder_decoder:
            return ("text_ids", "text_mask", "input_ids", "input_mask")
        packed = ("segment_ids",) if self.config.data.packing else ()
        return ("text_ids", "text_mask", *packed)

    def _check(self) -> None:
        super()._check()
        data = self.config.data
        if data.packing and language_model_config(self.config).is_encoder_decoder:
            raise UserError(
                "data.packing=True needs a decoder-only language model, opt or llama, because an "
                "encoder reads the input of one text: set --config.data.packing=False."
            )
        if data.packing and data.captions_per_text != 1:
            raise UserError(
                f"data.packing=True makes every caption a text of its own, and "
                f"data.captions_per_text={data.captions_per_text} one text of several: set one of "
                "them to its default, False or 1."
            )

    def build_model(self) -> TextModel:
        return TextModel(language_model_config(self.config), self.dtype)

    def loss(self, params, batch, rng) -> LossOutput:
        tokens = chunked_token_cross_entropy(
            partial(self.apply, params, method="logits"),
            *self._scored(params, *self.model_inputs(batch), rng=rng),
            chunk=self.config.loss.vocab_chunk,
        )
        metrics = {"lm": tokens.loss, "token_accuracy": tokens.accuracy}
        return LossOutput(tokens.loss, tokens.num_tokens, metrics)

    def token_sums(self, params, *texts):
        """Sums over each text's tokens: `[batch, 3]`, of loss, correct guesses, and tokens.

        Args:
          texts: the arrays of `fields`, in their order.
        """
        hidden, *others = self._scored(params, *texts)
        logits = self.apply(params, hidden, method="logits")
        rows = jax.vmap(token_cross_entropy)(*(array[:, None] for array in (logits, *others)))
        sums = [rows.loss * rows.num_tokens, rows.accuracy * rows.num_tokens, rows.num_tokens]
        return jnp.stack(sums, axis=1)

    def _scored(self, params, *texts, rng=None):
        """What scores tokens, these tokens, and which of them count: `[batch, tokens, ...]`."""
        text_ids, text_mask, *others = texts
        hidden = self.apply(params, *texts, method="hidden", rng=rng)
        if self.model.config.is_encoder_decoder:
            return hidden, text_ids, text_mask
        counts = text_mask[:, 1:]
        for segment_ids in others:  # of packed rows, where no text continues the one before
            counts = counts & (segment_ids[:, 1:] == segment_ids[:, :-1])
        return hidden[:, :-1], text_ids[:, 1:], counts
