"""Loss and perplexity of texts on any source, by the tasks whose models say texts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxblip.data import inputs
from jaxblip.data.text import fill_prompt, join_prompt
from jaxblip.evaluation.base import Evaluation, Metrics, Parts
from jaxblip.evaluation.kept import Kept
from jaxblip.tasks import Task, make_task
from jaxblip.training.state import Params


class LossEvaluation(Evaluation):
    """`loss` (nats a token), `perplexity`, `token_accuracy` of every caption or answer of the set.

    Without label smoothing, and of whole captions: an encoder reads the prompt alone. Of
    `language_model` texts have as many captions as in training.
    """

    metric_names = ("loss", "perplexity", "token_accuracy")

    def _prepare(self, parts: Parts) -> None:
        if self.config.task == "language_model":
            self._sums = self.task.token_sums
            self._arrays = self._texts_as_trained()
            self._rows = (np.arange(len(self._arrays[0])),) * len(self._arrays)
            return
        scored = _scored_task(self.task)
        self._sums = _RowSums(scored)
        fields = scored.fields[1:]  # behind the image
        tokenizers = parts.tokenizer, parts.qformer_tokenizer
        preprocess = inputs.make_preprocess(scored.config, fields, *tokenizers)
        examples, images = [], []
        entries = zip(self.set.rows, self.set.captions, self.set.instructions, strict=True)
        for row, captions, instruction in entries:
            for caption in captions:
                example = {"captions": [caption], "instruction": instruction}
                examples.append(preprocess.texts(example, np.random.default_rng(0)))
                images.append(row)
        texts = [np.stack([each[field] for each in examples]) for field in fields]
        self._arrays = [self.set.images, *texts]
        self._rows = (np.array(images), *[np.arange(len(images))] * len(texts))

    def run(self, params: Params, frozen: Params, kept: Kept | None = None) -> Metrics:
        sums = self._map(self._sums, params, frozen, *self._arrays, rows=self._rows)
        loss, accuracy, tokens = sums.sum(axis=0, dtype=np.float64)
        loss, accuracy = float(loss / tokens), float(accuracy / tokens)
        return {"loss": loss, "perplexity": float(np.exp(loss)), "token_accuracy": accuracy}

    def _texts_as_trained(self) -> list[np.ndarray]:
        """The task's fields for texts as in training, where several captions may make up one.

        A text begins with each caption once, and goes on with those that follow it in the set, the
        first behind the last, so that all captions count alike. An encoder reads the prompt alone.
        """
        config, has_encoder = self.config, inputs.has_encoder(self.config)
        texts, prompts = [], []
        for captions, instruction in zip(self.set.captions, self.set.instructions, strict=True):
            prompt = fill_prompt(config.data.prompt, instruction)
            prompted = [join_prompt(prompt, caption) for caption in captions]
            for first, caption in enumerate(captions):
                others = prompted[first + 1 :] + prompted[:first]
                begin = caption if has_encoder else prompted[first]
                texts.append([begin, *others[: config.data.captions_per_text - 1]])
                if has_encoder:
                    prompts.append(inputs.prompt_ids(config, self._encode, instruction))
        arrays = list(map(np.stack, zip(*map(self._encode.row, texts), strict=True)))
        if has_encoder:
            lengths = np.array(list(map(len, prompts)))
            mask = np.arange(lengths.max()) < lengths[:, None]
            ids = np.full(mask.shape, self._encode.pad_id, np.int32)
            ids[mask] = np.concatenate(prompts)
            arrays += [ids, mask]
        return arrays


class _RowSums:
    """Sums over each row's tokens, `[batch, 3]`: of loss, correct guesses, and tokens."""

    def __init__(self, task: Task):
        self._task = task

    def __call__(self, params: Params, *batch: Any):
        fields = self._task.fields

        def of_row(*row):
            alone = {field: array[None] for field, array in zip(fields, row, strict=True)}
            output = self._task.loss(params, alone, None)
            accuracy = output.metrics["token_accuracy"]
            return jnp.stack([output.loss, accuracy, jnp.ones(())]) * output.weight

        return jax.vmap(of_row)(*batch)


def _scored_task(task: Task) -> Task:
    """The task as it reads images, each text behind the prompt, and counts nothing but words."""
    config = task.config.copy_and_resolve_references()
    for field, value in (("label_smoothing", 0.0), ("prefix_lm", False)):
        if field in config.loss:
            config.loss[field] = value
    for field, value in (("templates", ()), ("features", "")):
        if field in config.data:
            config.data[field] = value
    return make_task(config)
