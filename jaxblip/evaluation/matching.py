"""Images and texts that find each other: retrieval, and zero-shot classification."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Bool, Float

from jaxblip.data.eval_set import EvalSet
from jaxblip.data.text import clean_caption
from jaxblip.decoding.generation import jit_on_mesh
from jaxblip.errors import UserError
from jaxblip.evaluation import retrieval
from jaxblip.evaluation.base import Evaluation, Metrics, Parts
from jaxblip.evaluation.classification import class_embeddings, class_prompts
from jaxblip.evaluation.kept import Kept
from jaxblip.evaluation.lists import read_lines
from jaxblip.evaluation.retrieval import Neighbours, check_finite, recalls
from jaxblip.sharding import batch_sharding
from jaxblip.training.state import Params, merge_params


class _Matching(Evaluation):
    """Embeddings of both sides, by a task that has them."""

    @property
    def _has_features(self) -> bool:
        """Whether images are embedded from features, which ITM reads, too."""
        return hasattr(self.task, "image_features")

    def _image_side(self, all_params, images):
        """Features of a batch of images, where there are any, and embeddings `[b, queries, e]`."""
        task, read = self.task, images
        if self._has_features:
            read = task.image_features(all_params, images)
        embeds = task.embed_images(all_params, read)
        embeds = embeds[:, None] if embeds.ndim == 2 else embeds
        return (read, embeds) if self._has_features else (embeds[:, 0, :0], embeds)

    def _embedded(self, params: Params, frozen: Params, texts: list[str]) -> tuple[np.ndarray, ...]:
        """Features and embeddings of the images, token ids and masks and embeddings of the texts.

        Raises:
          UserError: some embeddings are NaN.
        """
        ids, mask = self._encode(texts)
        features, images = self._map(self._side, params, frozen, self.set.images)
        words = self._map(self.task.embed_texts, params, frozen, ids, mask)
        check_finite(images, "values of the embeddings of images")
        return features, images, ids, mask, check_finite(words, "values of the embeddings of texts")

    def _prepare(self, parts: Parts) -> None:
        self._side = self._image_side  # one object, which is compiled once


class RetrievalEvaluation(_Matching):
    """Recall at 1, 5 and 10 in both directions, as shares of 0 to 1.

    Of `stage1` and `blip_retrieval` by ITC alone (`itc_i2t_r1`, ...), and when the
    `config.eval.rerank_top_k` best of each query are re-ranked by ITM (`i2t_r1`, ...). With
    `config.eval.folds` the set is divided into as many galleries, whose recalls are averaged:
    five of COCO's 5,000 test images are the protocol "COCO 1K".
    """

    @property
    def metric_names(self) -> tuple[str, ...]:
        before = ("itc_", "") if "rerank_top_k" in self.config.eval else ("",)
        ways = [f"{start}{way}" for start in before for way in ("i2t", "t2i")]
        return tuple(f"{way}_r{k}" for way in ways for k in retrieval.KS)

    def _check(self) -> None:
        settings = self.config.eval
        if settings.get("rerank_top_k", 1) < 1:
            raise UserError(
                f"eval.rerank_top_k={settings.rerank_top_k} leaves nothing to re-rank: set it to 1 "
                "or more."
            )
        for field, least in (("folds", 1), ("captions_per_image", 0)):
            if settings[field] < least:
                raise UserError(f"eval.{field}={settings[field]} must be {least} or more.")

    def _prepare(self, parts: Parts) -> None:
        super()._prepare(parts)
        settings, count = self.config.eval, len(self.set.rows)
        if count % settings.folds:
            raise UserError(
                f"eval.folds={settings.folds} does not divide the {count} images of "
                f"{settings.source}: set eval.max_images to a multiple of it."
            )
        most = settings.captions_per_image or None
        captions = [texts[:most] for texts in self.set.captions]
        self._captions = [text for texts in captions for text in texts]
        self._image_of_text = np.repeat(np.arange(count), list(map(len, captions)))
        self._texts_of = partial(_texts_of_images, k=settings.get("rerank_top_k", 1))
        self._images_of = partial(_images_of_texts, k=settings.get("rerank_top_k", 1))
        spec = batch_sharding(self._mesh).spec
        self._read = jit_on_mesh(
            lambda params, frozen, features: self.task.apply(
                merge_params(params, frozen), features, method="read_image"
            ),
            self._mesh,
            out_shardings=NamedSharding(self._mesh, PartitionSpec(None, *spec)),
        )

    def run(self, params: Params, frozen: Params, kept: Kept | None = None) -> Metrics:
        kept = kept or Kept()
        features, images, ids, mask, words = self._embedded(params, frozen, self._captions)
        tokens = tuple(map(self._map.whole_array, (ids, mask)))
        size = len(images) // self.config.eval.folds
        self.predictions, of_folds = [], []
        for fold, first in enumerate(range(0, len(images), size)):
            of_fold = slice(first, first + size)
            texts = np.flatnonzero(self._image_of_text // size == fold)
            image_of_text = self._image_of_text[texts] - first
            i2t, t2i = self._neighbours(params, frozen, images[of_fold], words[texts],
                                        image_of_text)  # fmt: skip
            best, metrics = i2t.best[:, 0], recalls(i2t.ranks, t2i.ranks)
            if self._has_features:
                metrics = recalls(i2t.ranks, t2i.ranks, prefix="itc_")
                scored = features[of_fold], texts, tokens
                logits = self._logits(params, frozen, i2t, t2i, scored, kept, f"itm {fold}")
                own_texts = image_of_text[i2t.best] == np.arange(size)[:, None]
                own_images = t2i.best == image_of_text[:, None]
                of_images, best = retrieval.rerank(i2t, logits[0], own_texts)
                of_texts, _ = retrieval.rerank(t2i, logits[1], own_images)
                metrics |= recalls(of_images, of_texts)
            self.predictions += [self._captions[texts[text]] for text in best]
            of_folds.append(metrics)
        return {name: float(np.mean([m[name] for m in of_folds])) for name in of_folds[0]}

    def _neighbours(self, params, frozen, images, words, image_of_text) -> tuple[Neighbours, ...]:
        """What the images find among the texts, and these among the images."""
        whole = tuple(map(self._map.whole_array, (images, words, image_of_text)))
        numbers = np.arange(len(images))
        i2t = self._map(self._texts_of, params, frozen, images, numbers, whole=whole[1:])
        t2i = self._map(self._images_of, params, frozen, words, image_of_text, whole=whole[:1])
        return i2t, t2i

    def _logits(self, params, frozen, i2t, t2i, scored, kept, part) -> tuple[np.ndarray, ...]:
        """ITM logits of the candidates of both directions, each pair computed once."""
        features, texts, tokens = scored
        count = len(texts)
        of_images = np.arange(len(i2t.best))[:, None] * count + i2t.best
        of_texts = t2i.best.astype(np.int64) * count + np.arange(count)[:, None]
        pairs = np.unique(np.concatenate([of_images.ravel(), of_texts.ravel()]))

        def batches(start: int) -> Iterator[list[float]]:
            # A block of images at a time: their keys and values stay on the device for all pairs.
            block = self._map.batch_size
            for first in range(0, len(features), block):
                begin, end = np.searchsorted(pairs, [first * count, (first + block) * count])
                if begin < start or begin == end:
                    continue
                rows = np.resize(np.arange(first, min(first + block, len(features))), block)
                image = self._read(params, frozen, self._map.place(features, rows))
                which = pairs[begin:end] // count - first, texts[pairs[begin:end] % count]
                found = self._map(self.task.match, params, frozen, *which, whole=(image, *tokens))
                yield found.astype(float).tolist()

        logits = np.array(kept.collect(part, batches), np.float32)
        return tuple(logits[np.searchsorted(pairs, codes)] for codes in (of_images, of_texts))


class ClassificationEvaluation(_Matching):
    """Zero-shot accuracy at 1 and 5 (0 to 1): the class whose prompts are nearest to an image.

    `config.eval.classes` is a file with the name of a class a line, `config.eval.templates` the
    prompts. The captions of an image are the names of its classes, one of which is to be found.
    """

    metric_names = ("top1_accuracy", "top5_accuracy")

    def _check(self) -> None:
        settings = self.config.eval
        if not settings.classes:
            raise UserError(
                "config.eval.classes is empty: classification needs a file with the name of a "
                "class a line."
            )
        self._names = read_lines(settings.classes, "config.eval.classes")
        self._prompts = class_prompts(self._names, settings.templates)

    def _prepare(self, parts: Parts) -> None:
        super()._prepare(parts)
        self._true = self._classes_of(self.set, self.source)
        self._compare = _compare

    def _classes_of(self, images: EvalSet, source: str) -> Bool[np.ndarray, "images classes"]:
        """Of which classes each image is; UserError where some are of none."""
        number = {name: place for place, name in enumerate(self._names)}
        of_images = [
            {number[text.strip()] for text in texts if text.strip() in number}
            for texts in images.texts
        ]
        unknown = Counter(
            texts[0] for texts, known in zip(images.texts, of_images, strict=True) if not known
        )
        if unknown:
            name, times = unknown.most_common(1)[0]
            raise UserError(
                f"{unknown.total()} of {len(of_images)} images of {source} are of no class of "
                f"{self.config.eval.classes}, such as {name!r} ({times}): write the names "
                "as the captions have them."
            )
        true = np.zeros((len(of_images), len(self._names)), bool)
        for row, classes in enumerate(of_images):
            true[row, list(classes)] = True
        return true

    def run(self, params: Params, frozen: Params, kept: Kept | None = None) -> Metrics:
        max_words = self.config.data.max_words
        prompts = [clean_caption(prompt, max_words) for prompt in self._prompts]
        _, images, _, _, words = self._embedded(params, frozen, prompts)
        classes = self._map.whole_array(class_embeddings(words, len(self._names)))
        return self._accuracies(self._map(self._compare, params, frozen, images, whole=(classes,)))

    def _accuracies(self, scores: Float[np.ndarray, "images classes"]) -> Metrics:
        # the place of the first true one, ties behind all others
        best = np.where(self._true, scores, -np.inf).max(axis=1, keepdims=True)
        ranks = ((scores >= best) & ~self._true).sum(axis=1)
        self.predictions = [self._names[place] for place in scores.argmax(axis=1)]
        return {f"top{k}_accuracy": float((ranks < k).mean()) for k in (1, 5)}

    def references(self) -> list[list[str]]:
        return self.set.texts


def _texts_of_images(_: Any, words, image_of_text, images, numbers, *, k: int) -> Neighbours:
    k = min(k, len(words))
    return retrieval.texts_of_images(words, image_of_text, images, numbers, k=k)


def _images_of_texts(_: Any, images, words, image_of_text, *, k: int) -> Neighbours:
    return retrieval.images_of_texts(images, words, image_of_text, k=min(k, len(images)))


def _compare(_: Any, classes, images):
    return retrieval.similarity(images, classes)
