"""Scaled dot-product attention and the masks of the BLIP-2 family."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxblip.models import kernels
from jaxblip.models.dropout import drop

Mask = Bool[Array, "#batch #heads query key"]


@flax.struct.dataclass
class CausalMask:
    """Each position sees those of its own segment up to itself, said in two ways.

    Attributes:
      dense: `causal_mask`, for the kernels that take any mask.
      segment_ids: 0 at padding, for those that take no other.
    """

    dense: Mask
    segment_ids: Int[Array, "batch length"]


def dot_product_attention(
    query: Float[Array, "batch query heads width"],
    key: Float[Array, "batch key kv_heads width"],
    value: Float[Array, "batch key kv_heads width"],
    *,
    mask: Mask | CausalMask | None = None,
    bias: Float[Array, "#batch heads query key"] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: jax.Array | None = None,
    kernel: str = "auto",
) -> Float[Array, "batch query heads width"]:
    """Softmax attention; the softmax is in float32 whatever the input's dtype.

    Args:
      key: as many heads as the query, or, without dropout, fewer: each is then shared by a group
        of adjacent query heads, and not repeated in memory.
      mask: True where a query may look. A row with no True gives the mean of the values,
        so padded queries stay finite; under a `CausalMask` it may be any mean of values.
      bias: added to the scores; without dropout only.
      scale: of the scores; 1 / sqrt(width) by default.
      dropout_rate: dropout of the attention weights (BERT); needs `dropout_rng`.
      kernel: one of `kernels.KERNELS`; where it cannot do it, and with dropout, XLA does.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if dropout_rate == 0.0:
        return _without_dropout(query, key, value, mask, bias, scale, kernel)
    mask = dense_mask(mask)
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    logits *= scale
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1)
    weights = drop(weights, dropout_rate, dropout_rng).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def _without_dropout(query, key, value, mask, bias, scale: float, kernel: str):
    chosen = kernels.choose_kernel(
        kernel,
        kernels.platform(),
        query.dtype.name,
        query.shape,
        key.shape,
        has_mask=mask is not None,
        has_segments=isinstance(mask, CausalMask),
        has_bias=bias is not None,
        num_devices=jax.device_count(),
        mesh=kernels.mesh_sizes(),
    )
    if chosen == "pallas":
        segment_ids = None if mask is None else mask.segment_ids
        return kernels.pallas_attention(query, key, value, segment_ids, scale=scale)
    mask = dense_mask(mask)
    if chosen == "cudnn":
        attended = kernels.cudnn_attention(query, key, value, mask, scale=scale)
        if attended is not None:
            return attended
    return jax.nn.dot_product_attention(query, key, value, bias, mask, scale=scale)


def dense_mask(mask: Mask | CausalMask | None) -> Mask | None:
    """The mask as an array."""
    return mask.dense if isinstance(mask, CausalMask) else mask


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


def sequence_mask(
    valid: Bool[Array, "batch length"], segment_ids: Int[Array, "batch length"] | None = None
) -> CausalMask:
    """`causal_mask` of whole sequences, in the forms that all kernels accept."""
    segments = valid.astype(jnp.int32) if segment_ids is None else segment_ids * valid
    return CausalMask(causal_mask(valid, segment_ids), segments)


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
