"""The contrastive loss against PyTorch: plain loops, and a gather without gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxblip.losses.contrastive import contrastive_loss, same_image, similarity

ROWS, QUERIES, EMBED, PROCESSES = 6, 3, 5, 2
IMAGE_ID = np.array([4, 7, 4, 9, 7, 4], np.int32)  # three captions of one image, two of another
TEMPERATURE = 0.2


def embeddings(queries):
    rng = np.random.default_rng(0)
    shape = (ROWS, queries, EMBED) if queries else (ROWS, EMBED)
    image, text = rng.normal(size=shape), rng.normal(size=(ROWS, EMBED))
    return [
        (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32) for x in (image, text)
    ]


def plain_similarity(image, text):
    """`[images, texts]`, by loops over images, texts and queries."""
    rows = []
    for one_image in image:
        queries = one_image.reshape(-1, EMBED)
        rows.append(torch.stack([max(query @ one_text for query in queries) for one_text in text]))
    return torch.stack(rows)


def plain_targets(image_id):
    targets = torch.zeros(ROWS, ROWS, dtype=torch.float64)
    for i in range(ROWS):
        same = [j for j in range(ROWS) if image_id[j] == image_id[i]]
        for j in same:
            targets[i, j] = 1.0 / len(same)
    return targets


def torch_loss(image, text, temperature, image_id, label_smoothing, gradient_to_all):
    """As `PROCESSES` processes compute it: each its own rows against the gathered batch."""
    gathered_image, gathered_text = image, text
    if not gradient_to_all:
        gathered_image, gathered_text = image.detach(), text.detach()
    targets = torch.arange(ROWS) if image_id is None else plain_targets(image_id)
    losses = []
    for rows in torch.arange(ROWS).chunk(PROCESSES):
        logits_of_images = plain_similarity(image[rows], gathered_text) / temperature
        logits_of_texts = plain_similarity(gathered_image, text[rows]).T / temperature
        for logits in (logits_of_images, logits_of_texts):
            losses.append(
                torch.nn.functional.cross_entropy(
                    logits, targets[rows], label_smoothing=label_smoothing
                )
            )
    return sum(losses) / len(losses)


@pytest.mark.parametrize("queries", [0, QUERIES])
@pytest.mark.parametrize("gradient_to_all", [False, True])
@pytest.mark.parametrize("image_id", [None, IMAGE_ID])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_value_and_gradients_are_those_of_torch(
    queries, gradient_to_all, image_id, label_smoothing
):
    inputs = [*embeddings(queries), np.float32(TEMPERATURE)]

    def loss(image, text, temperature):
        output = contrastive_loss(
            image,
            text,
            1 / temperature,
            image_id=image_id,
            label_smoothing=label_smoothing,
            gradient_to_all=gradient_to_all,
        )
        return output.loss

    value, grads = jax.value_and_grad(loss, argnums=(0, 1, 2))(*map(jnp.asarray, inputs))
    theirs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in inputs]
    expected = torch_loss(*theirs, image_id, label_smoothing, gradient_to_all)
    expected.backward()
    assert float(value) == pytest.approx(expected.item(), rel=1e-5)
    for grad, their in zip(grads, theirs, strict=True):
        np.testing.assert_allclose(grad, their.grad, rtol=1e-4, atol=1e-5)


def test_similarity_is_the_largest_over_the_queries():
    image, text = embeddings(QUERIES)
    expected = plain_similarity(torch.tensor(image), torch.tensor(text))
    np.testing.assert_allclose(similarity(image, text), expected, rtol=1e-5, atol=1e-6)

    # Only the query that won gets a gradient.
    grad = jax.grad(lambda x: similarity(x, text)[1, 2])(jnp.asarray(image))
    winner = np.argmax(image[1] @ text[2])
    np.testing.assert_allclose(grad[1, winner], text[2])
    assert np.count_nonzero(np.abs(grad).sum(axis=-1)) == 1


@pytest.mark.parametrize("gradient_to_all", [False, True])
def test_which_side_carries_gradient(gradient_to_all):
    image, text = map(jnp.asarray, embeddings(QUERIES))

    def received(name):
        """The gradients of one direction's logits: to the images and to the texts."""

        def total(image, text):
            scale = jnp.float32(1.0)
            output = contrastive_loss(image, text, scale, gradient_to_all=gradient_to_all)
            return getattr(output, name).sum()

        return [bool(jnp.any(grad)) for grad in jax.grad(total, (0, 1))(image, text)]

    assert received("image_to_text") == [True, gradient_to_all]
    assert received("text_to_image") == [gradient_to_all, True]


def test_the_logits_score_rows_against_the_batch():
    image, text = embeddings(QUERIES)
    output = contrastive_loss(image, text, jnp.float32(5.0))
    expected = 5.0 * plain_similarity(torch.tensor(image), torch.tensor(text)).numpy()
    np.testing.assert_allclose(output.image_to_text, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(output.text_to_image, expected.T, rtol=1e-5, atol=1e-6)


def test_same_image():
    expected = [[a == b for a in IMAGE_ID] for b in IMAGE_ID]
    assert np.array_equal(same_image(jnp.asarray(IMAGE_ID)), expected)
