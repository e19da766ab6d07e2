"""Image-text matching loss (ITM) with hard negatives: BLIP-2 §3.2, ALBEF §3.2."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxblip.losses.contrastive import over_blocks, same_image, similarity


def sample_hard_negatives(
    rng: Key[Array, ""],
    image: Float[Array, "batch *queries embed"],
    text: Float[Array, "batch embed"],
    logit_scale: Float[Array, ""],
    image_id: Int[Array, " batch"] | None = None,
    *,
    block_size: int = 0,
) -> tuple[Int[Array, " batch"], Int[Array, " batch"], Bool[Array, ""]]:
    """Draws a text for each image and an image for each text from the softmax of the ITC scores.

    By Gumbel noise: the largest of scores with such noise is a draw from their softmax, and the
    largest of several blocks is the largest of all.

    Args:
      image, text, logit_scale: what the ITC scores are made of (`contrastive_loss`).
      image_id: rows of the same id are no negatives of each other; by default only a row's own
        index is none.
      block_size: texts that are scored at a time (`over_blocks`); another one draws otherwise.

    Returns:
      The text of each image, the image of each text, and False where there is no negative at all
      (one image in the batch): then the indices are meaningless.
    """
    batch = len(text)
    image_id = jnp.arange(batch) if image_id is None else image_id
    text_rng, image_rng = jax.random.split(rng)

    def block(text, text_image_id, index):
        excluded = same_image(image_id, text_image_id)
        logits = jnp.where(excluded, -10000.0, similarity(image, text) * logit_scale)
        for_images, for_texts = (
            logits + jax.random.gumbel(jax.random.fold_in(key, index[0]), logits.shape)
            for key in (text_rng, image_rng)
        )
        return for_images.max(axis=1), index[for_images.argmax(axis=1)], for_texts.argmax(axis=0)

    image, text, logit_scale = jax.lax.stop_gradient((image, text, logit_scale))
    best, text_of_image, image_of_text = over_blocks(
        block, block_size, text, image_id, jnp.arange(batch)
    )
    text_of_image = jnp.take_along_axis(text_of_image, best.argmax(axis=0)[None], axis=0)[0]
    # Block k of n has the texts k, k + n, k + 2n, …
    return text_of_image, image_of_text.T.reshape(-1), (image_id != image_id[0]).any()


def matching_loss(
    logits: Float[Array, "pairs 2"], is_match: Bool[Array, " pairs"], valid: Bool[Array, " pairs"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Binary cross-entropy and accuracy over the valid pairs.

    Args:
      logits: scores of [no match, match].
      valid: False leaves a pair out: a negative that could not be drawn.
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=1)
    of_label = jnp.where(is_match, log_probs[:, 1], log_probs[:, 0])
    correct = (logits[:, 1] > logits[:, 0]) == is_match
    count = valid.sum()  # at least the matched pairs
    return -jnp.sum(of_label * valid) / count, jnp.sum(correct * valid) / count
