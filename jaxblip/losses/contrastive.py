"""Image-text contrastive loss (ITC) over the global batch: BLIP-2 §3.2, CLIP §2.3.

On a mesh the images stay where they are and the texts come to them: each device scores its images
against all texts, and memory grows as batch x batch / devices. With a block size it scores so many
texts at a time, and once more in the backward pass: no array is as large as batch x batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def contrastive_loss(
    image: Float[Array, "batch *queries embed"],
    text: Float[Array, "batch embed"],
    logit_scale: Float[Array, ""],
    *,
    image_id: Int[Array, " batch"] | None = None,
    label_smoothing: float = 0.0,
    gradient_to_all: bool = False,
    block_size: int = 0,
) -> Float[Array, ""]:
    """Cross-entropy of each image over all texts and of each text over all images, averaged.

    Args:
      image: L2-normalised; BLIP-2 has one embedding a query, CLIP one an image.
      text: L2-normalised.
      logit_scale: what the similarities are multiplied by, 1 / temperature.
      image_id: rows of the same id are all positives, with equal shares.
      label_smoothing: share of the target that is uniform over the batch.
      gradient_to_all: let gradient flow to the side that the rows are compared with, as CLIP does.
        Without it the image embeddings learn only from the rows of images, and the text
        embeddings only from the rows of texts, as in BLIP-2's reference code, whose gather
        operation carries no gradient.
      block_size: texts that are compared with all images at a time (`over_blocks`).
    """
    batch = len(text)
    image_id = jnp.arange(batch) if image_id is None else image_id

    def block(text, text_image_id):
        of_images, of_texts = similarities(image, text, gradient_to_all)
        positive = same_image(image_id, text_image_id)
        return (
            _parts(of_images * logit_scale, positive, axis=1),
            _parts(of_texts * logit_scale, positive, axis=0),
        )

    of_images, of_texts = over_blocks(block, block_size, text, image_id)
    # A block has all scores of its texts, but only some of each image.
    log_total, *sums = of_images
    of_images = jax.nn.logsumexp(log_total, axis=0), *(x.sum(axis=0) for x in sums)

    def cross_entropy(log_total, of_positives, num_positives, of_all):
        target = (1 - label_smoothing) * of_positives / num_positives
        return jnp.mean(log_total - target - label_smoothing * of_all / batch)

    return (cross_entropy(*of_images) + cross_entropy(*of_texts)) / 2


def _parts(logits: Float[Array, "images texts"], positive: Bool[Array, "images texts"], axis: int):
    """What a cross-entropy along `axis` is made of; each part can be taken over several blocks."""
    return (
        jax.nn.logsumexp(logits, axis),
        jnp.sum(logits * positive, axis),
        jnp.sum(positive, axis),
        jnp.sum(logits, axis),
    )


def same_image(image_id: Int[Array, " rows"], other: Int[Array, " others"]) -> Array:
    """True where a row and another one belong to one image: bool `[rows, others]`."""
    return image_id[:, None] == other[None, :]


def over_blocks(function: Callable, block_size: int, *of_texts: Array) -> Any:
    """What `function` returns for each block of texts, stacked on a new first axis.

    Block k of n has the texts k, k + n, k + 2n, …, so that each device has its share of every one.
    Nothing inside a block is kept for the backward pass.

    Args:
      function: of the rows of a block, in as many arrays as `of_texts` has.
      block_size: largest number of rows in a block; 0 = all.
      of_texts: arrays `[batch, ...]`.
    """
    number = num_blocks(len(of_texts[0]), block_size)
    if number == 1:
        return jax.tree.map(lambda x: x[None], function(*of_texts))
    blocks = [x.reshape(-1, number, *x.shape[1:]).swapaxes(0, 1) for x in of_texts]
    function = jax.checkpoint(function, prevent_cse=False)
    return jax.lax.map(lambda block: function(*block), blocks)


def num_blocks(batch: int, block_size: int) -> int:
    """The smallest number of equal blocks of at most `block_size` rows; 1 where that is 0."""
    least = -(-batch // block_size) if block_size else 1
    return next(number for number in range(least, batch + 1) if batch % number == 0)


def similarity(
    image: Float[Array, "images *queries embed"], text: Float[Array, "texts embed"]
) -> Float[Array, "images texts"]:
    """Cosine similarity of L2-normalised embeddings; the largest over an image's queries."""
    return similarities(image, text, True)[0]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def similarities(
    image: Float[Array, "images *queries embed"],
    text: Float[Array, "texts embed"],
    gradient_to_all: bool,
) -> tuple[Float[Array, "images texts"], Float[Array, "images texts"]]:
    """`similarity` twice: for comparing each image with texts, and each text with images.

    The maximum goes over one query after the other, so that no array has images x texts x queries
    elements. The gradient of a pair goes to the query that has the maximum (the first of several).

    Args:
      gradient_to_all: the gradients of both go to images and texts. Without it, that of the first
        goes to the images only, and that of the second to the texts only.
    """
    best, _ = _best_query(image, text)
    return best, best


def _best_query(image, text) -> tuple[Float[Array, "images texts"], Int[Array, "images texts"]]:
    """The largest similarity over the queries, and which query has it."""
    queries, numbers = _queries(image)

    def compare(best, query):
        (score, winner), (query, number) = best, query
        new = query @ text.T
        # The maximum lets no NaN by, as the comparison does.
        return (jnp.maximum(score, new), jnp.where(new > score, number, winner)), None

    score = queries[0] @ text.T
    first = score, jnp.zeros(score.shape, numbers.dtype)
    return jax.lax.scan(compare, first, (queries[1:], numbers[1:]))[0]


def _queries(image) -> tuple[Float[Array, "queries images embed"], Int[Array, " queries"]]:
    queries = image[None] if image.ndim == 2 else jnp.moveaxis(image, 1, 0)
    return queries, jnp.arange(len(queries), dtype=jnp.int16)


def _similarities_forward(image, text, gradient_to_all):
    best, winner = _best_query(image, text)
    return (best, best), (image, text, winner)


def _similarities_backward(gradient_to_all, residuals, gradients):
    image, text, winner = residuals
    to_image, to_text = gradients
    if gradient_to_all:
        to_image = to_text = to_image + to_text

    def share(of_text, query):
        query, number = query
        won = winner == number
        of_text += jnp.where(won, to_text, 0.0).T @ query
        return of_text, jnp.where(won, to_image, 0.0) @ text

    of_text, of_queries = jax.lax.scan(share, jnp.zeros_like(text), _queries(image))
    return jnp.moveaxis(of_queries, 0, -2).reshape(image.shape), of_text


similarities.defvjp(_similarities_forward, _similarities_backward)
