"""What is measured for each task, on its evaluation set, with any parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxblip.data import inputs, run_sources
from jaxblip.data.samples import counts_as_text
from jaxblip.data.text import fill_prompt, join_prompt
from jaxblip.decoding.make import make_image_to_text
from jaxblip.errors import UserError
from jaxblip.evaluation.batching import RowMap
from jaxblip.evaluation.captions import caption_metrics, exact_share
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

    def __init__(self, task: Task, tokenizer: Any, mesh: Mesh, qformer_tokenizer: Any = None):
        """Reads the evaluation set.

        Args:
          qformer_tokenizer: of the Q-Former, for the task `instruct`.

        Raises:
          UserError: it cannot be read, `eval.batch_size` does not divide over the mesh, or
            `eval.rerank_top_k` is below 1.
        """
        if task.config.eval.get("rerank_top_k", 1) < 1:
            raise UserError(
                f"eval.rerank_top_k={task.config.eval.rerank_top_k} leaves nothing to re-rank: set "
                "it to 1 or more."
            )
        self.task = task
        self.set = run_sources.read_eval_set(task.config)
        self.predictions: list[str] = []
        self._map = RowMap(mesh, task.config.eval.batch_size)
        self._encode = inputs.text_encoder(task.config, tokenizer)
        if "num_beams" in task.config.eval:
            self._image_to_text = make_image_to_text(task, tokenizer, mesh, qformer_tokenizer)

    def run(self, params: Params, frozen: Params) -> Metrics:
        """Metrics by name.

        `clip`, `stage1`, `blip_retrieval`: recall at 1, 5, 10 in both directions, as fractions; for
        the last two both by ITC alone (`itc_…`) and re-ranked by ITM. `stage2`, `instruct`,
        `blip_caption`, `blip_vqa`: `caption_exact` (fraction) and `bleu4` (0 to 100), of captions,
        or of the answers to each example's instruction.
        `language_model`: `loss` (nats a token), `perplexity`, `token_accuracy`, of texts as in
        training, with as many captions each. All but the last leave a caption for each image in
        `predictions`: the generated one, or the best of the set's.
        """
        measure = {
            "blip_caption": self._captions,
            "blip_retrieval": self._reranked_retrieval,
            "blip_vqa": self._captions,
            "clip": self._contrastive_retrieval,
            "instruct": self._captions,
            "stage1": self._reranked_retrieval,
            "stage2": self._captions,
            "language_model": self._language_model_loss,
        }[self.task.config.task]
        return measure(params, frozen)

    def gallery(self) -> list[dict[str, Any]]:
        """Each image with its prediction and its true captions, as `report.write_report` wants.

        Empty where nothing is predicted.
        """
        if not self.predictions:
            return []
        images = (self.set.images[row] for row in self.set.rows)
        texts = self.set.instructions, self.predictions, self.set.captions
        return [
            {"image": image, "asked": asked, "predicted": caption, "references": references}
            for image, asked, caption, references in zip(images, *texts, strict=True)
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
        # Image by image, because of the queries; BLIP has one embedding, and none.
        similarity = np.stack(
            [(np.atleast_2d(queries) @ text_embeds.T).max(axis=0) for queries in image_embeds]
        )

        def match(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
            arrays, rows = (features, ids, mask), (images, texts, texts)
            return self._map(self.task.match, params, frozen, *arrays, rows=rows)

        candidates = top_k_candidates(similarity, self.task.config.eval.rerank_top_k)
        reranked = rerank(similarity, candidates, match)
        self.predictions = _best_texts(reranked.image_to_text, captions)
        return retrieval_metrics(similarity, reranked, image_of_text)

    def _captions(self, params: Params, frozen: Params) -> Metrics:
        model, data = self._image_to_text, self.set
        self.predictions = model.generate(
            merge_params(params, frozen),
            data.images,
            list(map(model.prompt_of_example, data.instructions)),
            model.decoding_config(),
            rows=data.rows,
        )
        exact = exact_share(self.predictions, data.captions)
        return {"caption_exact": exact, **caption_metrics(self.predictions, data.captions)}

    def _language_model_loss(self, params: Params, frozen: Params) -> Metrics:
        sums = self._map(self.task.token_sums, params, frozen, *self._texts_as_trained())
        loss, accuracy, tokens = sums.sum(axis=0)
        loss, accuracy = float(loss / tokens), float(accuracy / tokens)
        return {"loss": loss, "perplexity": float(np.exp(loss)), "token_accuracy": accuracy}

    def _texts_as_trained(self) -> list[np.ndarray]:
        """The task's fields for texts as in training, where several captions may make up one.

        A text begins with each caption once, and goes on with those that follow it in the set, the
        first behind the last, so that all captions count alike. An encoder reads the prompt alone.
        """
        config, has_encoder = self.task.config, inputs.has_encoder(self.task.config)
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

    def _flat_captions(self) -> tuple[list[str], np.ndarray]:
        """All captions, and the index of each one's image."""
        pairs = [(c, i) for i, captions in enumerate(self.set.captions) for c in captions]
        return [caption for caption, _ in pairs], np.array([image for _, image in pairs])


def _best_texts(scores: np.ndarray, captions: list[str]) -> list[str]:
    """The caption with the highest score for each image."""
    return [captions[best] for best in scores.argmax(axis=1)]
