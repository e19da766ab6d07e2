"""Scaled dot-product attention and the masks of the BLIP-2 family."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxblip.models.dropout import drop

Mask = Bool[Array, "#batch #heads query key"]


def dot_product_attention(
    query: Float[Array, "batch query heads width"],
    key: Float[Array, "batch key kv_heads width"],
    value: Float[Array, "batch key kv_heads width"],
    *,
    mask: Mask | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: jax.Array | None = None,
) -> Float[Array, "batch query heads width"]:
    """Softmax attention; the softmax is in float32 whatever the input's dtype.

    Args:
      key: as many heads as the query, or, without dropout, fewer: each is then shared by a group
        of adjacent query heads, and not repeated in memory.
      mask: True where a query may look. A row with no True gives the mean of the values,
        so padded queries stay finite.
      dropout_rate: dropout of the attention weights (BERT); needs `dropout_rng`.
    """
    if dropout_rate == 0.0:
        return jax.nn.dot_product_attention(query, key, value, mask=mask)
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    logits *= query.shape[-1] ** -0.5
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1)
    weights = drop(weights, dropout_rate, dropout_rng).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def padding_mask(valid: Bool[Array, "batch key"]) -> Mask:
    """Everyone sees every valid key: `[batch, 1, 1, key]`."""
    return valid[:, None, None, :]


def causal_mask(
    valid: Bool[Array, "batch length"], segment_ids: Int[Array, "batch length"] | None = None
) -> Mask:
    """Each position sees the valid positions up to itself: `[batch, 1, length, length]`.

    Args:
      segment_ids: of packed rows; then it sees those of its own segment only.
    """
    length = valid.shape[1]
    mask = jnp.tril(jnp.ones((length, length), bool))[None, None] & valid[:, None, None, :]
    if segment_ids is None:
        return mask
    return mask & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])


# The Q-Former's self-attention masks (BLIP-2 paper, Fig. 2). The sequence is
# [queries, text]; `num_queries` positions, then the text positions.


def unimodal_mask(num_queries: int, text_valid: Bool[Array, "batch text"]) -> Mask:
    """ITC: queries see queries, text sees valid text, and neither sees the other."""
    return _blocks(num_queries, text_valid, text_sees_queries=False, queries_see_text=False)


def bidirectional_mask(num_queries: int, text_valid: Bool[Array, "batch text"]) -> Mask:
    """ITM: queries and valid text all see each other."""
    return _blocks(num_queries, text_valid, text_sees_queries=True, queries_see_text=True)


def multimodal_causal_mask(num_queries: int, text_valid: Bool[Array, "batch text"]) -> Mask:
    """ITG: queries see queries only; text sees all queries and the text up to itself."""
    mask = _blocks(num_queries, text_valid, text_sees_queries=True, queries_see_text=False)
    return mask.at[:, :, num_queries:, num_queries:].set(causal_mask(text_valid))


def _blocks(num_queries, text_valid, *, text_sees_queries: bool, queries_see_text: bool) -> Mask:
    batch, length = text_valid.shape
    to_queries = jnp.concatenate(
        [jnp.ones(num_queries, bool), jnp.full(length, text_sees_queries)]
    )  # by query position: may it look at the query tokens?
    from_queries = jnp.full((batch, num_queries, length), queries_see_text)
    from_text = jnp.ones((batch, length, length), bool)
    to_text = jnp.concatenate([from_queries, from_text], axis=1) & text_valid[:, None, :]
    to_queries = jnp.broadcast_to(
        to_queries[None, :, None], (batch, num_queries + length, num_queries)
    )
    return jnp.concatenate([to_queries, to_text], axis=2)[:, None]


def stage1_mask(num_queries: int, text_valid: Bool[Array, "batch text"]) -> Mask:
    """ITC and ITG in one pass over [queries, ITC text, ITG text].

    The queries see only each other in both losses, so one pass over them serves both: the ITC text
    sees itself as under `unimodal_mask`, the ITG text sees queries and its own past as under
    `multimodal_causal_mask`, and the two texts do not see each other.
    """
    batch, length = text_valid.shape
    contrastive = unimodal_mask(num_queries, text_valid)
    generative = multimodal_causal_mask(num_queries, text_valid)
    start, end = num_queries + length, num_queries + 2 * length
    mask = jnp.zeros((batch, 1, end, end), bool)
    mask = mask.at[:, :, :start, :start].set(contrastive)
    mask = mask.at[:, :, start:, :num_queries].set(generative[:, :, num_queries:, :num_queries])
    return mask.at[:, :, start:, start:].set(generative[:, :, num_queries:, num_queries:])
