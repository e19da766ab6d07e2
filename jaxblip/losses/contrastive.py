"""Image-text contrastive loss (ITC) over the global batch: BLIP-2 §3.2, CLIP §2.3."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@flax.struct.dataclass
class ContrastiveOutput:
    """The loss and the scores that hard negatives are drawn from."""

    loss: Float[Array, ""]
    image_to_text: Float[Array, "batch batch"]  # logits; row i scores all texts for image i
    text_to_image: Float[Array, "batch batch"]  # logits; row i scores all images for text i


def similarity(
    image: Float[Array, "images *queries embed"], text: Float[Array, "texts embed"]
) -> Float[Array, "images texts"]:
    """Cosine similarity of L2-normalised embeddings; the largest over an image's queries."""
    if image.ndim == 2:
        return image @ text.T
    return jnp.einsum("iqe,te->iqt", image, text).max(axis=1)


def same_image(image_id: Int[Array, " batch"]) -> Array:
    """True where two rows of the batch belong to one image: bool `[batch, batch]`."""
    return image_id[:, None] == image_id[None, :]


def contrastive_loss(
    image: Float[Array, "batch *queries embed"],
    text: Float[Array, "batch embed"],
    logit_scale: Float[Array, ""],
    *,
    image_id: Int[Array, " batch"] | None = None,
    label_smoothing: float = 0.0,
    gradient_to_all: bool = False,
) -> ContrastiveOutput:
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
    """
    other = (lambda x: x) if gradient_to_all else jax.lax.stop_gradient
    image_to_text = similarity(image, other(text)) * logit_scale
    text_to_image = similarity(other(image), text).T * logit_scale

    batch = text.shape[0]
    positives = jnp.eye(batch) if image_id is None else same_image(image_id).astype(jnp.float32)
    targets = positives / positives.sum(axis=1, keepdims=True)
    targets = (1 - label_smoothing) * targets + label_smoothing / batch

    def cross_entropy(logits):
        return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits, axis=1), axis=1))

    loss = (cross_entropy(image_to_text) + cross_entropy(text_to_image)) / 2
    return ContrastiveOutput(loss, image_to_text, text_to_image)
