"""InstructBLIP's texts: `ImageToText` with a Q-Former that reads the prompt as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxblip import sharding
from jaxblip.data import inputs
from jaxblip.data.text import fill_prompt
from jaxblip.data.tokenizers import TextEncoder
from jaxblip.decoding.generation import jit_on_mesh
from jaxblip.decoding.image_to_text import (
    SHORTEST_PROMPT,
    Batch,
    ImageToText,
    Prompt,
    Tokens,
    power_of_two,
)
from jaxblip.tasks.instruct import InstructTask


class InstructToText(ImageToText):
    """Texts by the task `instruct`.

    An image is encoded once; the Q-Former looks at it anew for each prompt.
    """

    def __init__(self, task: InstructTask, tokenizer: Any, mesh: Mesh, qformer_tokenizer: Any):
        super().__init__(task, tokenizer, mesh)
        self._max_tokens = task.config.model.qformer.max_positions
        self._trained_on = inputs.instruction_encoder(task.config, qformer_tokenizer)
        # The task's `max_instruction_tokens` is about training; a user's words stay if they can.
        self._reads = TextEncoder(qformer_tokenizer, self._max_tokens, "qformer", truncation="left")
        rows = sharding.batch_sharding(mesh)
        self._query = jit_on_mesh(self._queried, mesh, out_shardings=rows)

    def prompt(self, text: str) -> Prompt:
        """What both read of the words of a user; the Q-Former as many as it has positions."""
        return super().prompt(text)._replace(instruction=_tokens(self._reads, text))

    def prompt_of_example(self, instruction: str = "", prompt: str | None = None) -> Prompt:
        prompt = self.task.config.data.prompt if prompt is None else prompt
        text = fill_prompt(prompt, instruction) or instruction
        read = super().prompt_of_example(instruction, prompt)
        return read._replace(instruction=_tokens(self._trained_on, text))

    def _visual_tokens(self, params, images):
        return self.task.apply(params, self.task.normalize_images(images), method="image_features")

    def _queried(self, params, features, index, ids, valid):
        return self.task.apply(params, features[index], ids, valid, method="query")

    def _seen(
        self, params: Any, batch: Batch, prompts: Sequence[Prompt]
    ) -> tuple[jax.Array, jax.Array]:
        features, index = super()._seen(params, batch, prompts)
        instructions = [prompt.instruction for prompt in prompts]
        length = power_of_two(max(map(len, instructions)), SHORTEST_PROMPT)
        length = min(length, self._max_tokens)
        arrays = self._row_tokens(batch, instructions, length, self._reads.pad_id)
        visual = self._query(params, features, index, *arrays)
        return visual, self._place(np.arange(len(batch.index), dtype=np.int32))


def _tokens(encoder: TextEncoder, text: str) -> Tokens:
    ids, valid = encoder.row([text])
    return ids[valid].tolist()
