"""Recall at k and re-ranking, against a brute force over all pairs."""

from __future__ import annotations

import numpy as np
import pytest

from jaxblip.errors import UserError
from jaxblip.evaluation.retrieval import (
    check_finite,
    images_of_texts,
    recall,
    recalls,
    rerank,
    similarity,
    texts_of_images,
)


def gallery(seed, num_images=7, queries=3, levels=0):
    """Embeddings and the image of each text; with few levels, many similarities are equal."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 5, num_images)
    image_of_text = rng.permutation(np.repeat(np.arange(num_images), counts))
    images = rng.normal(size=(num_images, queries, 4))
    texts = rng.normal(size=(len(image_of_text), 4))
    if levels:
        images, texts = (np.round(x * levels) for x in (images, texts))
    return images.astype(np.float32), texts.astype(np.float32), image_of_text


def slow_similarity(images, texts):
    return np.array([[max(float(q @ t) for q in image) for t in texts] for image in images])


def slow_rank(scores, own):
    """Place of the best own one when all others with its score stand before it."""
    best = max(score for score, mine in zip(scores, own, strict=True) if mine)
    return sum(score >= best and not mine for score, mine in zip(scores, own, strict=True))


@pytest.mark.parametrize("levels", [0, 1])
@pytest.mark.parametrize("seed", range(5))
def test_ranks_and_candidates_are_those_of_all_pairs(seed, levels):
    images, texts, image_of_text = gallery(seed, levels=levels)
    scores, k = slow_similarity(images, texts), 4
    np.testing.assert_allclose(similarity(images, texts), scores, rtol=1e-5, atol=1e-6)
    own = image_of_text == np.arange(len(images))[:, None]
    i2t = texts_of_images(texts, image_of_text, images, np.arange(len(images)), k=k)
    t2i = images_of_texts(images, texts, image_of_text, k=k)
    for found, rows, mine in ((i2t, scores, own), (t2i, scores.T, own.T)):
        assert found.ranks.tolist() == [slow_rank(*row) for row in zip(rows, mine, strict=True)]
        # equal ones in the order of their index
        order = np.argsort(-np.round(rows, 4), axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(found.best, order)
        np.testing.assert_allclose(
            found.scores, np.take_along_axis(rows, order, axis=1), rtol=1e-5, atol=1e-6
        )


def test_blocks_are_parts_of_the_whole():
    images, texts, image_of_text = gallery(3)
    whole = texts_of_images(texts, image_of_text, images, np.arange(7), k=2)
    parts = [
        texts_of_images(texts, image_of_text, images[start : start + 3],
                        np.arange(start, min(start + 3, 7)), k=2)
        for start in (0, 3, 6)
    ]  # fmt: skip
    for place in range(3):
        joined = np.concatenate([part[place] for part in parts])
        np.testing.assert_allclose(whole[place], joined, rtol=1e-6)


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("seed", range(4))
def test_re_ranking_puts_candidates_first_and_keeps_the_order_of_the_rest(seed, k):
    images, texts, image_of_text = gallery(seed, levels=seed % 2)
    scores = np.asarray(similarity(images, texts), np.float64)
    rng = np.random.default_rng(seed)
    logits = np.round(rng.normal(size=scores.shape))  # with ties
    found = texts_of_images(texts, image_of_text, images, np.arange(len(images)), k=k)
    own = image_of_text[found.best] == np.arange(len(images))[:, None]
    chosen = np.take_along_axis(logits, np.asarray(found.best), axis=1)
    ranks, best = rerank(found, chosen, own)
    for image, row in enumerate(scores):
        candidates = np.argsort(-row, kind="stable")[:k]
        final = np.where(np.isin(np.arange(len(row)), candidates), row + logits[image], row - 1e6)
        assert ranks[image] == slow_rank(final, image_of_text == image)
        assert final[best[image]] == final.max()


def test_an_image_may_find_any_of_its_texts_and_ties_never_flatter():
    images = np.array([[[1.0, 0]], [[0, 1.0]]], np.float32)
    texts = np.array([[0, 1], [1, 0], [0, 1], [0, 1]], np.float32)
    image_of_text = np.array([0, 0, 1, 1])
    i2t = texts_of_images(texts, image_of_text, images, np.arange(2), k=1)
    assert i2t.ranks.tolist() == [0, 1]  # the other image's text is as near as its own
    t2i = images_of_texts(images, texts, image_of_text, k=1)
    assert t2i.ranks.tolist() == [1, 0, 0, 0]
    assert recalls(i2t.ranks, t2i.ranks, ks=(1, 2)) == {
        "i2t_r1": 0.5, "i2t_r2": 1.0, "t2i_r1": 0.75, "t2i_r2": 1.0,
    }  # fmt: skip


def test_a_k_beyond_the_gallery_is_a_hit():
    assert recall(np.array([0, 3]), (1, 10)) == {1: 0.5, 10: 1.0}


def test_a_model_that_has_diverged_is_not_the_best():
    with pytest.raises(UserError, match="1 of 4 embeddings of images are NaN"):
        check_finite(np.array([[0, 1], [np.nan, 0]]), "embeddings of images")
