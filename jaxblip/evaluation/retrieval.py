"""Image-text retrieval: recall at k, and the re-ranking of ITC's best candidates by ITM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxblip.errors import UserError

# (image indices [pairs], text indices [pairs]) -> match logits [pairs], the mean over the queries
ItmScores = Callable[
    [Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]],
    Float[np.ndarray, " pairs"],
]


class Candidates(NamedTuple):
    """The best matches by similarity, best first; equal ones in the order of their index."""

    texts: Int[np.ndarray, "images k"]  # the k best texts of each image
    images: Int[np.ndarray, "texts k"]  # the k best images of each text


class Reranked(NamedTuple):
    """Final scores; the two directions differ because each re-ranks its own candidates."""

    image_to_text: Float[np.ndarray, "images texts"]
    text_to_image: Float[np.ndarray, "images texts"]


def image_to_text_recall(
    scores: Float[np.ndarray, "images texts"],
    image_of_text: Int[np.ndarray, " texts"],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[int, float]:
    """Share of images (0-1) that find ANY of their texts among the k with the highest score.

    Ties never flatter: the rank of an image's best text is the number of other images' texts that
    score at least as high. A k beyond the gallery is a hit.

    Raises:
        ValueError: shapes that disagree, an index out of range, or an image without a text.
        UserError: a score that is NaN.
    """
    scores, image_of_text = _checked(scores, image_of_text)
    own = image_of_text == np.arange(len(scores))[:, None]
    best_own = np.where(own, scores, -np.inf).max(axis=1, keepdims=True)
    ranks = ((scores >= best_own) & ~own).sum(axis=1)
    return {k: float((ranks < k).mean()) for k in ks}


def text_to_image_recall(
    scores: Float[np.ndarray, "images texts"],
    image_of_text: Int[np.ndarray, " texts"],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[int, float]:
    """Share of texts (0-1) whose one image is among the k with the highest score.

    Ties and errors as in `image_to_text_recall`.
    """
    scores, image_of_text = _checked(scores, image_of_text)
    of_target = scores[image_of_text, np.arange(scores.shape[1])]
    ranks = (scores >= of_target).sum(axis=0) - 1  # without the target itself
    return {k: float((ranks < k).mean()) for k in ks}


def recall_at_k(
    scores: Float[np.ndarray, "images texts"],
    image_of_text: Int[np.ndarray, " texts"],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Both directions from one score matrix: {"i2t_r1": ..., "t2i_r1": ...}, shares of 0-1.

    The protocol of COCO and Flickr30K with five captions an image (BLIP-2, section 4.4): an image
    may find any of its texts; each text is a query of its own.
    """
    i2t = image_to_text_recall(scores, image_of_text, ks)
    t2i = text_to_image_recall(scores, image_of_text, ks)
    return _named(i2t, t2i)


def top_k_candidates(similarity: Float[np.ndarray, "images texts"], k: int) -> Candidates:
    """The k best texts of each image and images of each text; fewer where the gallery is smaller.

    Raises:
        ValueError: k below 1.
        UserError: a similarity that is NaN.
    """
    if k < 1:
        raise ValueError(f"k is {k}; re-ranking needs at least 1 candidate")
    similarity = _without_nan(similarity, "similarity")

    def best(rows: Float[np.ndarray, "queries gallery"]) -> Int[np.ndarray, "queries k"]:
        # Row by row: the index of a whole COCO test set would take a gigabyte.
        return np.stack([np.argsort(-row, kind="stable")[:k] for row in rows])

    return Candidates(texts=best(similarity), images=best(similarity.T))


def rerank(
    similarity: Float[np.ndarray, "images texts"],
    candidates: Candidates,
    itm_scores: ItmScores,
) -> Reranked:
    """Scores the candidates by match logit + ITC similarity and ranks all others below them.

    Follows the retrieval evaluation of LAVIS (`compute_sim_matrix`): the similarity is the cosine,
    without temperature. Outside the candidates the order of the similarity stays, where LAVIS
    gives them all one value.

    Args:
        similarity: ITC similarities.
        candidates: from `top_k_candidates`.
        itm_scores: called once with every pair that is a candidate in either direction, each once
            and sorted by image, so that the caller can batch them.

    Raises:
        UserError: a match logit that is NaN.
        ValueError: `itm_scores` returned another shape than it was given.
    """
    similarity = np.asarray(similarity, np.float64)
    num_images, num_texts = similarity.shape
    chosen_by_image = np.zeros(similarity.shape, bool)
    chosen_by_image[np.arange(num_images)[:, None], candidates.texts] = True
    chosen_by_text = np.zeros(similarity.shape, bool)
    chosen_by_text[candidates.images, np.arange(num_texts)[:, None]] = True

    images, texts = np.nonzero(chosen_by_image | chosen_by_text)
    logits = np.asarray(itm_scores(images, texts), np.float64)
    if logits.shape != images.shape:
        raise ValueError(f"itm_scores returned shape {logits.shape} for {len(images)} pairs")
    total = np.zeros(similarity.shape)
    total[images, texts] = _without_nan(logits, "ITM logit") + similarity[images, texts]

    def merge(chosen: np.ndarray, axis: int) -> Float[np.ndarray, "images texts"]:
        lowest_inside = np.where(chosen, total, np.inf).min(axis=axis, keepdims=True)
        highest_outside = np.where(chosen, -np.inf, similarity).max(axis=axis, keepdims=True)
        # where nothing is outside, the shift is used for nothing
        shift = lowest_inside - 1 - np.where(np.isfinite(highest_outside), highest_outside, 0)
        return np.where(chosen, total, similarity + shift)

    return Reranked(merge(chosen_by_image, axis=1), merge(chosen_by_text, axis=0))


def retrieval_metrics(
    similarity: Float[np.ndarray, "images texts"],
    reranked: Reranked,
    image_of_text: Int[np.ndarray, " texts"],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Recall by ITC alone (`itc_i2t_r1`, ...) and after `rerank` (`i2t_r1`, ...), shares of 0-1."""
    by_itc = recall_at_k(similarity, image_of_text, ks)
    final = _named(
        image_to_text_recall(reranked.image_to_text, image_of_text, ks),
        text_to_image_recall(reranked.text_to_image, image_of_text, ks),
    )
    return {**{f"itc_{name}": value for name, value in by_itc.items()}, **final}


def _named(i2t: dict[int, float], t2i: dict[int, float]) -> dict[str, float]:
    return {f"i2t_r{k}": v for k, v in i2t.items()} | {f"t2i_r{k}": v for k, v in t2i.items()}


def _checked(scores, image_of_text):
    scores, image_of_text = np.asarray(scores), np.asarray(image_of_text)
    if scores.ndim != 2 or image_of_text.shape != scores.shape[1:]:
        raise ValueError(
            f"scores have shape {scores.shape} and image_of_text {image_of_text.shape}; "
            "expected [images, texts] and [texts]"
        )
    present = np.unique(image_of_text)
    if not np.array_equal(present, np.arange(len(scores))):
        raise ValueError(
            f"image_of_text names {len(present)} images from {present.min(initial=0)} to "
            f"{present.max(initial=0)}; expected each of 0 to {len(scores) - 1} at least once"
        )
    return _without_nan(scores, "score"), image_of_text


def _without_nan(values, what: str):
    values = np.asarray(values)
    if bad := int(np.isnan(values).sum()):
        raise UserError(
            f"{bad} of {values.size} values of the {what} are NaN: the model has diverged or its "
            "parameters are damaged; evaluate an earlier checkpoint"
        )
    return values
