"""BLIP's captions and answers: `ImageToText` for decoders that look at their source."""

from __future__ import annotations

from collections.abc import Sequence

from jaxblip.data.text import clean_question
from jaxblip.decoding.cross_attending import (
    ReadSource,
    decode_source,
    image_source,
    prefill_source,
    question_source,
    source_log_likelihoods,
)
from jaxblip.decoding.image_to_text import (
    SHORTEST_PROMPT,
    ImageToText,
    Prompt,
    power_of_two,
    random_key,
)
from jaxblip.errors import UserError


class BlipToText(ImageToText):
    """Captions, by the task `blip_caption`: a prompt is what they begin with. Nothing streams."""

    def _visual_tokens(self, params, images):
        return self.task.apply(params, self.task.normalize_images(images), method="image_features")

    def _read_rows(self, params, features, index, prompt_ids, prompt_valid) -> ReadSource:
        return image_source(self.task.model, features[index], prompt_ids, prompt_valid)

    def _prefilled(self, params, features, index, prompt_ids, prompt_valid, **room):
        read = self._read_rows(params, features, index, prompt_ids, prompt_valid)
        return prefill_source(self.task.model, params, read, **room)

    def _decoded(self, params, logits, state, said, seeds, *, config):
        rng = random_key(seeds)
        return decode_source(self.task.model, params, logits, state, config, rng, said)

    def _scored(self, params, read, ids, valid):
        return source_log_likelihoods(self.task.model, params, read, ids, valid)

    def _positions(self) -> int:
        return self.task.config.model.text.max_positions


class BlipToAnswer(BlipToText):
    """Answers, by the task `blip_vqa`: a prompt is the question, which an encoder reads."""

    def prompt_tokens(self, text: str) -> list[int]:
        """`[CLS] question [SEP]`, the question cleaned as for training."""
        question = clean_question(text, self.task.config.data.max_words).strip()
        if not question:
            raise UserError("A run of the task 'blip_vqa' answers questions: give one.")
        return [*self.encoder.prompt_ids(question), self.encoder.stop_id]

    def _read_rows(self, params, features, index, prompt_ids, prompt_valid) -> ReadSource:
        question = prompt_ids, prompt_valid
        return question_source(self.task.model, params, features[index], *question)

    def prompt_of_example(self, instruction: str = "", prompt: str | None = None) -> Prompt:
        return self.prompt(instruction)  # by itself, without any prompt

    def _prompt_length(self, prompts: Sequence[Prompt], max_new_tokens: int) -> int:
        longest, limit = max(len(prompt.tokens) for prompt in prompts), self._positions()
        if longest > limit:
            raise UserError(
                f"A question of {longest} tokens is too long: the encoder has {limit} positions; "
                "shorten it."
            )
        return min(power_of_two(longest, SHORTEST_PROMPT), limit)

    def _check_positions(self, prompt: int, candidate: int) -> None:
        super()._check_positions(1, candidate)  # the decoder reads [DEC] and the candidate
