import numpy as np
import pytest

from jaxblip.errors import UserError
from jaxblip.evaluation.retrieval import (
    recall_at_k,
    rerank,
    retrieval_metrics,
    top_k_candidates,
)


def slow_recall(i2t_scores, t2i_scores, image_of_text, ks):
    """Sorts each query's gallery with the wrong answers first among equals, and looks."""
    num_images, num_texts = i2t_scores.shape
    result = {}
    for k in ks:
        hits = 0
        for i in range(num_images):
            order = sorted(
                range(num_texts), key=lambda t: (-i2t_scores[i, t], image_of_text[t] == i)
            )
            hits += any(image_of_text[t] == i for t in order[:k])
        result[f"i2t_r{k}"] = hits / num_images
        hits = 0
        for t in range(num_texts):
            order = sorted(
                range(num_images), key=lambda i: (-t2i_scores[i, t], image_of_text[t] == i)
            )
            hits += image_of_text[t] in order[:k]
        result[f"t2i_r{k}"] = hits / num_texts
    return result


def slow_rerank(similarity, itm, k):
    """Each direction: a list of the top k by match logit + similarity, then the rest as it was."""
    num_images, num_texts = similarity.shape
    i2t, t2i = np.zeros((2, num_images, num_texts))
    for i in range(num_images):
        order = sorted(range(num_texts), key=lambda t: (-similarity[i, t], t))
        top = sorted(order[:k], key=lambda t: -(itm[i, t] + similarity[i, t]))
        for place, t in enumerate(top + order[k:]):
            i2t[i, t] = -place
    for t in range(num_texts):
        order = sorted(range(num_images), key=lambda i: (-similarity[i, t], i))
        top = sorted(order[:k], key=lambda i: -(itm[i, t] + similarity[i, t]))
        for place, i in enumerate(top + order[k:]):
            t2i[i, t] = -place
    return i2t, t2i


def random_case(seed, num_images=7, num_texts=19):
    rng = np.random.default_rng(seed)
    image_of_text = np.concatenate(
        [np.arange(num_images), rng.integers(0, num_images, num_texts - num_images)]
    )
    return rng, rng.permutation(image_of_text)


@pytest.mark.parametrize("levels", [3, 1000], ids=["many ties", "few ties"])
@pytest.mark.parametrize("seed", range(5))
def test_recall_agrees_with_sorting(seed, levels):
    rng, image_of_text = random_case(seed)
    scores = rng.integers(0, levels, (7, 19)).astype(np.float32)
    ks = (1, 2, 5, 10, 50)
    assert recall_at_k(scores, image_of_text, ks) == pytest.approx(
        slow_recall(scores, scores, image_of_text, ks)
    )


def test_any_caption_of_the_image_counts_and_each_text_is_a_query():
    # image 0 has texts 0-2; only text 2 is near it. Image 1 has text 3.
    scores = np.array([[0.1, 0.2, 0.9, 0.3], [0.5, 0.6, 0.1, 0.7]])
    recall = recall_at_k(scores, np.array([0, 0, 0, 1]), ks=(1, 2))
    assert recall == {"i2t_r1": 1.0, "i2t_r2": 1.0, "t2i_r1": 0.5, "t2i_r2": 1.0}


def test_a_model_that_knows_nothing_scores_nothing():
    recall = recall_at_k(np.zeros((20, 40)), np.arange(40) % 20)
    assert set(recall.values()) == {0.0}


def test_texts_of_the_same_image_do_not_compete():
    scores = np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert recall_at_k(scores, np.array([0, 0, 1]), ks=(1,))["i2t_r1"] == 1.0


def test_k_beyond_the_gallery_always_hits():
    scores = np.zeros((3, 3))
    assert recall_at_k(scores, np.arange(3), ks=(3, 10)) == {
        "i2t_r3": 1.0, "i2t_r10": 1.0, "t2i_r3": 1.0, "t2i_r10": 1.0,
    }  # fmt: skip


def test_candidates_are_the_best_in_each_direction():
    similarity = np.array([[0.3, 0.9, 0.9], [0.8, 0.1, 0.2]])
    candidates = top_k_candidates(similarity, 2)
    np.testing.assert_array_equal(candidates.texts, [[1, 2], [0, 2]])
    np.testing.assert_array_equal(candidates.images, [[1, 0], [0, 1], [0, 1]])
    assert top_k_candidates(similarity, 10).texts.shape == (2, 3)


@pytest.mark.parametrize("k", [1, 3, 7, 19, 100])
def test_metrics_agree_with_re_ranking_lists(k):
    for seed in range(5):
        rng, image_of_text = random_case(seed)
        similarity = rng.normal(size=(7, 19)).astype(np.float32)
        itm = rng.normal(size=(7, 19)) * 5
        itm[np.arange(7)[:, None] == image_of_text] += 5
        reranked = rerank(similarity, top_k_candidates(similarity, k), lambda i, t: itm[i, t])
        metrics = retrieval_metrics(similarity, reranked, image_of_text)
        itc = slow_recall(similarity, similarity, image_of_text, (1, 5, 10))
        final = slow_recall(*slow_rerank(similarity, itm, k), image_of_text, (1, 5, 10))
        assert metrics == pytest.approx({**{f"itc_{n}": v for n, v in itc.items()}, **final})


def test_outside_the_candidates_ranks_below_and_in_order_of_similarity():
    similarity = np.array([[0.9, 0.8, 0.7, 0.6]])
    scores = rerank(
        similarity,
        top_k_candidates(similarity, 2),
        lambda images, texts: np.where(texts == 0, -50.0, -40.0),
    ).image_to_text[0]
    assert np.argsort(-scores).tolist() == [1, 0, 2, 3]
    assert scores[1] == pytest.approx(-40.0 + 0.8)


def test_the_match_model_sees_every_pair_once_and_only_candidates():
    rng, image_of_text = random_case(0)
    similarity = rng.normal(size=(7, 19))
    candidates = top_k_candidates(similarity, 2)
    seen = []

    def itm_scores(images, texts):
        seen.extend(zip(images.tolist(), texts.tolist(), strict=True))
        return np.zeros(len(images))

    rerank(similarity, candidates, itm_scores)
    wanted = {(i, t) for i, row in enumerate(candidates.texts.tolist()) for t in row}
    wanted |= {(i, t) for t, row in enumerate(candidates.images.tolist()) for i in row}
    assert len(seen) == len(wanted) and set(seen) == wanted


def test_nan_is_an_error():
    scores = np.eye(3)
    scores[1, 2] = np.nan
    with pytest.raises(UserError, match="1 of 9 values of the score are NaN"):
        recall_at_k(scores, np.arange(3))
    with pytest.raises(UserError, match="similarity are NaN"):
        top_k_candidates(scores, 1)
    with pytest.raises(UserError, match="ITM logit are NaN"):
        rerank(np.eye(3), top_k_candidates(np.eye(3), 2), lambda i, t: np.full(len(i), np.nan))


@pytest.mark.parametrize("image_of_text", [[0, 1], [0, 1, 3], [0, 1, -1], [0, 1, 1]])
def test_wrong_text_owners_are_an_error(image_of_text):
    with pytest.raises(ValueError):
        recall_at_k(np.eye(3), np.array(image_of_text))


def test_wrong_number_of_match_logits_is_an_error():
    with pytest.raises(ValueError, match="returned shape"):
        rerank(np.eye(3), top_k_candidates(np.eye(3), 2), lambda i, t: np.zeros(1))
    with pytest.raises(ValueError, match="k is 0"):
        top_k_candidates(np.eye(3), 0)
