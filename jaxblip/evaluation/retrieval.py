"""Image-text retrieval: recall at k, and the re-ranking of ITC's best candidates by ITM.

A gallery of any size: queries are compared with it a block at a time, and what is left of a block
is the rank of each query's own and its k best.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxblip.errors import UserError

KS = (1, 5, 10)


class Neighbours(NamedTuple):
    """What queries, images or texts, find in a gallery of the other.

    Attributes:
      ranks: number of things in the gallery that are not the query's and score at least as high as
        the best of its own. Ties never flatter.
      best: the k things with the highest score, best first; equal ones in the order of their index.
      scores: of these.
    """

    ranks: Int[np.ndarray, " queries"]
    best: Int[np.ndarray, "queries k"]
    scores: Float[np.ndarray, "queries k"]


def neighbours(
    scores: Float[Array, "queries gallery"], own: Bool[Array, "queries gallery"], k: int
) -> Neighbours:
    """Of a block of queries; on the device.

    Args:
      own: what belongs to each query: something, for each.
    """
    best_own = jnp.where(own, scores, -jnp.inf).max(axis=1, keepdims=True)
    ranks = jnp.sum((scores >= best_own) & ~own, axis=1)
    found, best = jax.lax.top_k(scores, k)
    return Neighbours(ranks, best, found)


def similarity(
    images: Float[Array, "images queries embed"], texts: Float[Array, "texts embed"]
) -> Float[Array, "images texts"]:
    """The largest of the cosines between an image's query tokens and a text (BLIP-2 §3.2).

    A running maximum: there is never an array of images x queries x texts.
    """

    def compare(tokens):
        return jnp.matmul(tokens, texts.T, precision=jax.lax.Precision.HIGHEST)

    def larger(best, tokens):
        return jnp.maximum(best, compare(tokens)), None

    first, others = images[:, 0], jnp.moveaxis(images[:, 1:], 1, 0)
    return jax.lax.scan(larger, compare(first), others)[0]


def texts_of_images(texts, image_of_text, images, numbers, *, k: int) -> Neighbours:
    """A block of images, with their numbers, among all texts."""
    own = image_of_text[None, :] == numbers[:, None]
    return neighbours(similarity(images, texts), own, k)


def images_of_texts(images, texts, image_of_text, *, k: int) -> Neighbours:
    """A block of texts among all images."""
    own = jnp.arange(len(images))[None, :] == image_of_text[:, None]
    return neighbours(similarity(images, texts).T, own, k)


def rerank(
    found: Neighbours, logits: Float[np.ndarray, "queries k"], own: Bool[np.ndarray, "queries k"]
) -> tuple[Int[np.ndarray, " queries"], Int[np.ndarray, " queries"]]:
    """Ranks, and the best thing of each query, when the candidates are scored anew.

    A candidate's score is its ITM logit of "match" plus its similarity, and all candidates stand
    before all others, which stay in the order of their similarity. So it is in the evaluation of
    LAVIS (`compute_sim_matrix`), but that all others have one score there. The similarity is the
    cosine, without temperature.

    Args:
      found: the candidates of each query, its k best by similarity.
      logits: of each candidate.
      own: whether it belongs to the query.
    """
    total = check_finite(logits, "ITM logits") + np.asarray(found.scores, np.float64)
    best_own = np.where(own, total, -np.inf).max(axis=1, keepdims=True)
    among = ((total >= best_own) & ~own).sum(axis=1)
    # Where nothing of the query is among them, its best is behind all that are as similar.
    ranks = np.where(own.any(axis=1), among, found.ranks)
    return ranks, found.best[np.arange(len(total)), total.argmax(axis=1)]


def recall(ranks: Int[np.ndarray, " queries"], ks: Sequence[int] = KS) -> dict[int, float]:
    """Share of queries (0-1) of which something stands among the first k."""
    return {k: float((np.asarray(ranks) < k).mean()) for k in ks}


def recalls(
    of_images: Int[np.ndarray, " images"],
    of_texts: Int[np.ndarray, " texts"],
    ks: Sequence[int] = KS,
    prefix: str = "",
) -> dict[str, float]:
    """Both directions by name: {"i2t_r1": ..., "t2i_r1": ...}.

    The protocol of COCO and Flickr30K with five captions an image (BLIP-2, section 4.4): an image
    may find any of its texts; each text is a query of its own.
    """
    both = {"i2t": recall(of_images, ks), "t2i": recall(of_texts, ks)}
    return {f"{prefix}{way}_r{k}": value for way, of in both.items() for k, value in of.items()}


def check_finite(values: Float[np.ndarray, "..."], what: str) -> Float[np.ndarray, "..."]:
    """The values, where none is NaN, which would rank first.

    Raises:
      UserError: some are.
    """
    values = np.asarray(values, np.float32)
    if bad := int(np.isnan(values).sum()):
        raise UserError(
            f"{bad} of {values.size} {what} are NaN: the model has diverged or its parameters are "
            "damaged; evaluate an earlier checkpoint."
        )
    return values
