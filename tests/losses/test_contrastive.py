"""The contrastive loss against PyTorch (plain loops, a gather without gradient) and in blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxblip import sharding
from jaxblip.losses.contrastive import (
    contrastive_loss,
    num_blocks,
    same_image,
    similarities,
    similarity,
)
from jaxblip.losses.matching import sample_hard_negatives

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
@pytest.mark.parametrize("block_size", [0, 2])
def test_value_and_gradients_are_those_of_torch(
    queries, gradient_to_all, image_id, label_smoothing, block_size
):
    inputs = [*embeddings(queries), np.float32(TEMPERATURE)]

    def loss(image, text, temperature):
        return contrastive_loss(
            image,
            text,
            1 / temperature,
            image_id=image_id,
            label_smoothing=label_smoothing,
            gradient_to_all=gradient_to_all,
            block_size=block_size,
        )

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

    def received(direction):
        """The gradients of one direction's scores: to the images and to the texts."""

        def total(image, text):
            return similarities(image, text, gradient_to_all)[direction].sum()

        return [bool(jnp.any(grad)) for grad in jax.grad(total, (0, 1))(image, text)]

    assert received(0) == [True, gradient_to_all]
    assert received(1) == [gradient_to_all, True]


def test_a_query_that_is_not_finite_is_not_passed_over():
    image, text = embeddings(QUERIES)
    image[2, QUERIES - 1] = np.nan
    assert np.isnan(similarity(image, text)[2]).all()
    assert np.isnan(contrastive_loss(image, text, jnp.float32(1.0)))


def plain_maximum(image, text):
    """All queries at once: the gradient of ties aside, the same."""
    return jnp.einsum("iqe,te->iqt", image, text).max(axis=1)


def test_similarity_is_that_of_all_queries_at_once():
    rng = np.random.default_rng(1)
    image, text = rng.normal(size=(5, 32, 8)), rng.normal(size=(7, 8))
    weights = rng.normal(size=(5, 7))

    def total(function, image, text):
        return jnp.sum(function(image, text) * weights)

    with jax.enable_x64(True):
        found = jax.value_and_grad(functools.partial(total, similarity), (0, 1))(image, text)
        expected = jax.value_and_grad(functools.partial(total, plain_maximum), (0, 1))(image, text)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found, expected)


def test_same_image():
    expected = [[a == b for a in IMAGE_ID] for b in IMAGE_ID]
    assert np.array_equal(same_image(jnp.asarray(IMAGE_ID), jnp.asarray(IMAGE_ID)), expected)


@pytest.mark.parametrize(
    ("batch", "block_size", "expected"),
    [(12, 0, 1), (12, 12, 1), (12, 20, 1), (12, 6, 2), (12, 5, 3), (12, 1, 12), (7, 3, 7)],
)
def test_blocks_are_equal_and_no_larger_than_asked_for(batch, block_size, expected):
    assert num_blocks(batch, block_size) == expected


def compiled(batch, queries, block_size, devices):
    """The loss, its gradients and hard negatives, and the bytes that a device needs for them."""
    mesh = sharding.make_mesh({"data": devices}, jax.devices()[:devices])
    rows = sharding.batch_sharding(mesh)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def step(image, text, scale, image_id, rng):
        loss = functools.partial(contrastive_loss, image_id=image_id, block_size=block_size)
        negatives = sample_hard_negatives(
            rng, image, text, scale, image_id, block_size=block_size
        )
        return jax.value_and_grad(loss, (0, 1, 2))(image, text, scale), negatives

    shapes = (
        jax.ShapeDtypeStruct((batch, queries, EMBED), jnp.float32, sharding=rows),
        jax.ShapeDtypeStruct((batch, EMBED), jnp.float32, sharding=rows),
        jax.ShapeDtypeStruct((), jnp.float32, sharding=whole),
        jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=rows),
        jax.eval_shape(lambda: jax.random.key(0)),
    )
    results = (whole, (rows, rows, whole)), (rows, rows, whole)
    program = jax.jit(step, out_shardings=results).lower(*shapes).compile()

    def run(image, text, scale, image_id, rng):
        arrays = image, text, scale, image_id
        places = rows, rows, whole, rows
        return program(*map(jax.device_put, arrays, places), jax.device_put(rng, whole))

    return run, program.memory_analysis().temp_size_in_bytes


def test_on_a_mesh_memory_is_batch_by_batch_by_devices():
    batch, queries = 1024, 32
    scores = 4 * batch**2
    (run_alone, alone), (run_shared, shared), (run_in_blocks, in_blocks) = (
        compiled(batch, queries, *options) for options in [(0, 1), (0, 8), (64, 8)]
    )
    assert alone < queries * scores / 2  # nothing is batch x batch x queries
    assert shared < alone / 6
    assert in_blocks < scores / 8 < shared / 8

    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(batch, queries, EMBED)), rng.normal(size=(batch, EMBED))
    image_id = rng.integers(0, batch // 2, batch).astype(np.int32)
    inputs = np.float32(image), np.float32(text), np.float32(2.0), image_id, jax.random.key(3)
    expected, negatives = run_alone(*inputs)
    for found, others in run_shared(*inputs), run_in_blocks(*inputs):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), found, expected
        )
        texts, images, exist = map(np.asarray, others)
        assert exist and not (image_id[texts] == image_id).any()
        assert not (image_id[images] == image_id).any()
    jax.tree.map(np.testing.assert_array_equal, run_shared(*inputs)[1], negatives)
