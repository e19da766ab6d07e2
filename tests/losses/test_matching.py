"""Hard negatives and the matching loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxblip.losses.matching import matching_loss, sample_hard_negatives

ROWS, DRAWS = 6, 20_000
IMAGE_ID = np.array([4, 7, 4, 9, 7, 4], np.int32)
LOGITS = np.random.default_rng(0).normal(size=(ROWS, ROWS)).astype(np.float32) * 1.5


def draw(image_id, logits=LOGITS, draws=DRAWS, block_size=0):
    """Texts of images and images of texts, of many keys `[draws, rows]`, and the valid flag."""
    keys = jax.random.split(jax.random.key(1), draws)
    text = np.eye(len(logits), dtype=np.float32)  # with which the scores are the embeddings

    def one(key):
        return sample_hard_negatives(
            key, logits, text, jnp.float32(1.0), image_id, block_size=block_size
        )

    texts, images, valid = jax.jit(jax.vmap(one))(keys)
    assert (valid == valid[0]).all()
    return np.asarray(texts), np.asarray(images), bool(valid[0])


@pytest.mark.parametrize("image_id", [None, IMAGE_ID])
@pytest.mark.parametrize("block_size", [0, 3, 1])
def test_negatives_are_drawn_from_the_softmax_over_other_images(image_id, block_size):
    texts, images, valid = draw(image_id, block_size=block_size)
    assert valid
    ids = np.arange(ROWS) if image_id is None else image_id
    for indices, logits in (texts, LOGITS), (images, LOGITS.T):
        for row in range(ROWS):
            allowed = [j for j in range(ROWS) if ids[j] != ids[row]]
            weights = {j: np.exp(float(logits[row, j])) for j in allowed}
            for j in range(ROWS):
                share = np.mean(indices[:, row] == j)
                if j not in allowed:
                    assert share == 0
                    continue
                expected = weights[j] / sum(weights.values())
                deviation = np.sqrt(expected * (1 - expected) / DRAWS)
                assert abs(share - expected) < 4.5 * deviation


@pytest.mark.parametrize("block_size", [0, 2])
def test_rows_draw_independently(block_size):
    texts, images, _ = draw(None, np.zeros((ROWS, ROWS), np.float32), block_size=block_size)
    for indices in texts, images:
        # Two rows with the same four candidates agree in a quarter of the draws of both.
        both = (indices[:, 0] != 1) & (indices[:, 1] != 0)
        assert np.mean(indices[both, 0] == indices[both, 1]) == pytest.approx(1 / 4, abs=0.02)
    # An image and the text of the same row have the same five candidates.
    assert np.mean(texts[:, 0] == images[:, 0]) == pytest.approx(1 / 5, abs=0.02)


def test_a_much_better_score_of_the_same_image_does_not_matter():
    logits = LOGITS + np.float32(100.0) * (IMAGE_ID[:, None] == IMAGE_ID[None, :])
    for indices in draw(IMAGE_ID, logits, draws=1000)[:2]:
        assert (IMAGE_ID[indices] != IMAGE_ID).all()


@pytest.mark.parametrize("block_size", [0, 2])
def test_a_batch_of_one_image_has_no_negatives(block_size):
    assert not draw(np.full(ROWS, 3, np.int32), draws=2, block_size=block_size)[2]
    assert not draw(None, LOGITS[:1, :1], draws=2, block_size=block_size)[2]


def test_sampling_carries_no_gradient():
    def total(logits):
        text = jnp.eye(ROWS)
        texts, images, _ = sample_hard_negatives(jax.random.key(0), logits, text, 1.0)
        return jnp.sum((texts + images).astype(jnp.float32))

    assert not jax.grad(total)(jnp.asarray(LOGITS)).any()


def test_value_gradient_and_accuracy_over_the_valid_pairs():
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(9, 2)).astype(np.float32)
    is_match = np.array([1, 1, 1, 0, 0, 0, 0, 0, 0], bool)
    valid = np.array([1, 1, 1, 1, 0, 1, 0, 1, 1], bool)

    def loss(logits):
        return matching_loss(logits, jnp.asarray(is_match), jnp.asarray(valid))

    (value, accuracy), grad = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(logits))
    theirs = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor(is_match.astype(int))
    expected = torch.nn.functional.cross_entropy(theirs[valid], labels[valid])
    expected.backward()
    assert float(value) == pytest.approx(expected.item(), rel=1e-6)
    np.testing.assert_allclose(grad, theirs.grad, rtol=1e-5, atol=1e-7)
    assert not grad[~valid].any()
    right = [logits[i].argmax() == is_match[i] for i in np.flatnonzero(valid)]
    assert float(accuracy) == pytest.approx(np.mean(right))
