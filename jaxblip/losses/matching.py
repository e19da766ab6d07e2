"""Image-text matching loss (ITM) with hard negatives: BLIP-2 §3.2, ALBEF §3.2."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxblip.losses.contrastive import same_image


def sample_hard_negatives(
    rng: Key[Array, ""],
    logits: Float[Array, "batch batch"],
    image_id: Int[Array, " batch"] | None = None,
) -> tuple[Int[Array, " batch"], Bool[Array, " batch"]]:
    """Draws one negative a row from softmax(logits), never one of the same image.

    Args:
      logits: ITC scores of each row against all candidates of the global batch.
      image_id: rows of the same id are no negatives of each other; by default only a row's own
        index is none.

    Returns:
      The drawn indices, and False for rows that have no negative at all (one image in the batch);
      their index is meaningless.
    """
    rows = jnp.arange(logits.shape[0])
    excluded = same_image(rows if image_id is None else image_id)
    masked = jnp.where(excluded, -10000.0, jax.lax.stop_gradient(logits).astype(jnp.float32))
    return jax.random.categorical(rng, masked, axis=1), ~excluded.all(axis=1)


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
