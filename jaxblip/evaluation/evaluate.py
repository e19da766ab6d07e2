"""What is measured for each task, on its evaluation set, with any parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxblip.data import inputs
from jaxblip.data.samples import counts_as_text
from jaxblip.decoding.image_to_text import ImageToText
from jaxblip.evaluation.batching import RowMap
from jaxblip.evaluation.captions import caption_metrics
from jaxblip.evaluation.retrieval import (
    recall_at_k,
    rerank,
    retrieval_metrics,
    top_k_candidates,
)
from jaxblip.tasks import Task
from jaxblip.training.state import Params, merge_params

Metrics = dict[str, float]


class Evaluation:
    """The evaluation of a run: its set, read once, and its compiled functions."""

    def __init__(self, task: Task, tokenizer: Any, mesh: Mesh):
        """Reads the evaluation set.

        Raises:
          UserError: it cannot be read, or `eval.batch_size` does not divide over the mesh.
        """
        self.task = task
        self.set = inputs.read_eval_set(task.config)
        self.predictions: list[str] = []
        self._map = RowMap(mesh, task.config.eval.batch_size)
        self._encode = inputs.text_encoder(task.config, tokenizer)
        if task.config.task == "stage2":
            self._image_to_text = ImageToText(task, tokenizer, mesh)

    def run(self, params: Params, frozen: Params) -> Metrics:
        """Metrics by name.

        `clip` and `stage1`: recall at 1, 5, 10 in both directions, as fractions; for `stage1` both
        by ITC alone (`itc_…`) and re-ranked by ITM. `stage2`: `caption_exact` (fraction) and
        `bleu4` (0 to 100). `language_model`: `loss` (nats a token), `perplexity`,
        `token_accuracy`. All but the last leave a caption for each image in `predictions`: the
        generated one, or the best of the set's.
        """
        measure = {
            "clip": self._contrastive_retrieval,
            "stage1": self._reranked_retrieval,
            "stage2": self._captions,
            "language_model": self._language_model_loss,
        }[self.task.config.task]
        return measure(params, frozen)

    def gallery(self) -> list[dict[str, Any]]:
        """Each image with its prediction and its true captions, as `report.write_report` wants."""
        rows = zip(self.set.images, self.predictions, self.set.captions, strict=True)
        return [
            {"image": image, "predicted": caption, "references": references}
            for image, caption, references in rows
        ]

    def describe(self) -> str:
        """The set in one line, with what was left out of it."""
        captions = sum(len(captions) for captions in self.set.captions)
        text = f"Evaluation set: {len(self.set.images)} images with {captions} captions"
        for what, counter in (("skipped", self.set.skipped), ("converted", self.set.converted)):
            if counter:
                text += f"; {what}: {counts_as_text(counter)}"
        return text + "."

    def _contrastive_retrieval(self, params: Params, frozen: Params) -> Metrics:
        captions, image_of_text = self._flat_captions()
        images = self._map(self.task.embed_images, params, frozen, self.set.images)
        texts = self._map(self.task.embed_texts, params, frozen, *self._encode(captions))
        similarity = images @ texts.T
        self.predictions = _best_texts(similarity, captions)
        return recall_at_k(similarity, image_of_text)

    def _reranked_retrieval(self, params: Params, frozen: Params) -> Metrics:
        captions, image_of_text = self._flat_captions()
        ids, mask = self._encode(captions)
        features = self._map(self.task.image_features, params, frozen, self.set.images)
        image_embeds = self._map(self.task.embed_images, params, frozen, features)
        text_embeds = self._map(self.task.embed_texts, params, frozen, ids, mask)
        similarity = np.stack([(queries @ text_embeds.T).max(axis=0) for queries in image_embeds])

        def match(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
            arrays, rows = (features, ids, mask), (images, texts, texts)
            return self._map(self.task.match, params, frozen, *arrays, rows=rows)

        candidates = top_k_candidates(similarity, self.task.config.eval.rerank_top_k)
        reranked = rerank(similarity, candidates, match)
        self.predictions = _best_texts(reranked.image_to_text, captions)
        return retrieval_metrics(similarity, reranked, image_of_text)

    def _captions(self, params: Params, frozen: Params) -> Metrics:
        model, images = self._image_to_text, self.set.images
        prompts = [inputs.prompt_ids(self.task.config, self._encode)] * len(images)
        self.predictions = model.generate(
            merge_params(params, frozen), images, prompts, model.decoding_config()
        )
        return caption_metrics(self.predictions, self.set.captions)

    def _language_model_loss(self, params: Params, frozen: Params) -> Metrics:
        texts, _ = self._flat_captions()
        arrays = [*self._encode(texts)]
        if inputs.has_encoder(self.task.config):
            prompt = inputs.prompt_ids(self.task.config, self._encode)
            arrays.append(np.tile(np.array(prompt, np.int32), (len(texts), 1)))
            arrays.append(np.ones(arrays[-1].shape, bool))
        sums = self._map(self.task.token_sums, params, frozen, *arrays).sum(axis=0)
        loss, accuracy = sums[:2] / sums[2]
        return {
            "loss": float(loss),
            "perplexity": float(np.exp(loss)),
            "token_accuracy": float(accuracy),
        }

    def _flat_captions(self) -> tuple[list[str], np.ndarray]:
        """All captions, and the index of each one's image."""
        pairs = [(c, i) for i, captions in enumerate(self.set.captions) for c in captions]
        return [caption for caption, _ in pairs], np.array([image for _, image in pairs])


def _best_texts(scores: np.ndarray, captions: list[str]) -> list[str]:
    """The caption with the highest score for each image."""
    return [captions[best] for best in scores.argmax(axis=1)]
