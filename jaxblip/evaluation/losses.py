"""Losses on any source: of texts with their perplexity, and of batches where these are compared."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxblip.data import inputs, run_sources
from jaxblip.data.text import fill_prompt, join_prompt
from jaxblip.decoding.generation import jit_on_mesh
from jaxblip.evaluation.base import Evaluation, Metrics, Parts
from jaxblip.evaluation.kept import Kept
from jaxblip.evaluation.retrieval import similarity
from jaxblip.sharding import batch_shards
from jaxblip.tasks import Task, make_task
from jaxblip.training.state import Params, merge_params


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
        prompts = run_sources.prompts_of_entries(self.config, len(self.set.rows))
        examples, images = [], []
        entries = zip(
            self.set.rows, self.set.captions, self.set.instructions, prompts, strict=True
        )
        for row, captions, instruction, prompt in entries:
            preprocess = dataclasses.replace(preprocess, prompt=prompt)
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


class InBatchEvaluation(Evaluation):
    """The losses of a contrastive task over held-out batches, as its training log has them.

    The metrics of the task (`itc`, `itm`, `itm_accuracy`, ...) and `itc_accuracy`, the share of
    images and texts that are most similar to each other among those of their batch. Batches are
    those of training, or smaller where the set is; what is left over beyond whole batches does not
    count, because chance depends on the size. Each image stands there once, with its first caption.
    """

    @property
    def metric_names(self) -> tuple[str, ...]:
        names = {
            "clip": ("itc", "logit_scale"),
            "blip_retrieval": ("itc", "itm", "itm_accuracy", "temperature"),
            "stage1": ("itc", "itm", "itg", "itm_accuracy", "itg_accuracy", "temperature"),
        }
        return ("loss", "itc_accuracy", *names[self.config.task])

    def _prepare(self, parts: Parts) -> None:
        size = min(self.config.batch_size, len(self.set.images))
        # A smaller batch may not divide over the devices; then each of them has all of it.
        self._divides = size % batch_shards(self._mesh) == 0
        jit = partial(jit_on_mesh, mesh=self._mesh) if self._divides else jax.jit
        ids, mask = self._encode([captions[0] for captions in self.set.captions])
        fields = {
            "image": self.set.images,
            "text_ids": ids,
            "text_mask": mask,
            "image_id": np.arange(len(ids), dtype=np.int32),
        }
        self._batches = [
            {name: array[first : first + size] for name, array in fields.items()}
            for first in range(0, len(ids) - size + 1, size)
        ]
        task = _scored_task(self.task)
        self._measured = jit(
            lambda params, frozen, batch: _in_batch(task, merge_params(params, frozen), batch),
            out_shardings=NamedSharding(self._mesh, PartitionSpec()),
        )

    def run(self, params: Params, frozen: Params, kept: Kept | None = None) -> Metrics:
        def place(array):
            if self._divides:
                return self._map.place(array, np.arange(len(array)))
            return self._map.whole_array(array)

        found = []
        for batch in self._batches:
            measured = self._measured(params, frozen, jax.tree.map(place, batch))
            found.append(jax.device_get(measured))
        return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def _in_batch(task: Task, params: Params, batch: dict[str, Any]) -> dict[str, Any]:
    output = task.loss(params, batch, None)
    images = batch["image"]
    read = task.image_features(params, images) if hasattr(task, "image_features") else images
    embeds = task.embed_images(params, read)
    words = task.embed_texts(params, batch["text_ids"], batch["text_mask"])
    scores = similarity(embeds[:, None] if embeds.ndim == 2 else embeds, words)
    own = jnp.arange(len(scores))
    hits = [(scores.argmax(axis=axis) == own).mean() for axis in (0, 1)]
    return {"loss": output.loss, "itc_accuracy": sum(hits) / 2, **output.metrics}


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
