"""Log-likelihoods of given texts behind an input, which is read once for all of them."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxblip.decoding.causal import CausalDecoder
from jaxblip.models.attention import causal_mask
from jaxblip.models.layers import KeyValues
from jaxblip.models.t5 import shift_right


@flax.struct.dataclass
class ReadInput:
    """What a language model has read of each row: all that its candidates look at.

    Attributes:
      read: keys and values, `[layers, batch, input, heads, head_width]`: of a decoder-only model
        those of its self-attention, of an encoder-decoder model those of its cross-attention.
      valid: which input positions count.
      first_logits: scores of the first new token; None for an encoder-decoder model, where a start
        token gives them.
    """

    read: KeyValues
    valid: Bool[Array, "batch input"]
    first_logits: Float[Array, "batch vocab"] | None


def read_input(
    language_model: nn.Module,
    params: Any,
    embeddings: Float[Array, "batch input width"],
    valid: Bool[Array, "batch input"],
) -> ReadInput:
    """Reads each row once, for any number of calls of `candidate_log_likelihoods`.

    Args:
      language_model, params, embeddings, valid: as in `generate`.

    Raises:
      UserError: when the input exceeds the `max_positions` of a decoder-only model.
    """
    if language_model.config.is_encoder_decoder:
        hidden = language_model.apply({"params": params}, embeddings, valid, method="encode")
        read = language_model.apply({"params": params}, hidden, method="read_encoder")
        return ReadInput(read, valid, None)
    decoder = CausalDecoder(language_model, params)
    logits, state = decoder.prefill(embeddings, valid, max_new_tokens=0)
    return ReadInput(state.cache, valid, logits)


def candidate_log_likelihoods(
    language_model: nn.Module,
    params: Any,
    prefix: ReadInput,
    candidate_ids: Int[Array, "#batch candidates length"],
    candidate_valid: Bool[Array, "#batch candidates length"],
) -> Float[Array, "batch candidates"]:
    """Sum of the log-probabilities of each candidate's tokens behind each row of the input.

    All candidates of a row are read in one pass over the row's keys and values, which are not
    copied for them. The logits take `batch * candidates * length * vocab` float32: call it with as
    many candidates at a time as there is room for.

    Args:
      prefix: from `read_input`.
      candidate_ids: with the stop token, where its probability is to count. The same for all rows,
        or a set for each.
      candidate_valid: False at padding, which stands on the right.
    """
    batch = prefix.valid.shape[0]
    shape = (batch, *candidate_ids.shape[1:])
    ids = jnp.broadcast_to(candidate_ids, shape)
    valid = jnp.broadcast_to(candidate_valid, shape)
    if language_model.config.is_encoder_decoder:
        return _of_answers(language_model, params, prefix, ids, valid)
    return _of_continuations(language_model, params, prefix, ids, valid)


def _of_answers(language_model, params, prefix, ids, valid):
    """Each candidate is a row of the decoder; those of one input share its keys and values."""
    flat = ids.reshape(-1, ids.shape[-1])
    start = language_model.config.start_token_id
    embeddings = language_model.apply({"params": params}, shift_right(flat, start), method="embed")
    # Padding stands behind the text, where no token looks.
    mask = causal_mask(jnp.ones(flat.shape, bool))
    hidden, _ = language_model.apply(
        {"params": params}, embeddings, mask, prefix.read, prefix.valid, method="decode"
    )
    scores = token_scores(language_model, params, hidden.reshape(*ids.shape, -1), ids)
    return jnp.sum(jnp.where(valid, scores, 0.0), axis=-1)


def _of_continuations(language_model, params, prefix, ids, valid):
    """The candidates of a row stand one after the other, and each sees the input and itself."""
    batch, candidates, length = ids.shape
    # The last token of a candidate is scored, but never read.
    num_read, num_prefix = length - 1, prefix.valid.shape[1]
    read_valid = valid[:, :, :-1]
    # Padding repeats the last position, so that none is beyond the model's table.
    places = jnp.maximum(jnp.cumsum(read_valid, axis=-1) - 1, 0)
    positions = prefix.valid.sum(axis=1)[:, None, None] + places

    own = jnp.eye(candidates, dtype=bool)[:, None, :, None]
    earlier = jnp.tril(jnp.ones((num_read, num_read), bool))[None, :, None, :]
    packed = candidates * num_read
    to_candidates = jnp.broadcast_to(
        (own & earlier).reshape(packed, packed), (batch, packed, packed)
    )
    to_prefix = jnp.broadcast_to(prefix.valid[:, None], (batch, packed, num_prefix))
    mask = jnp.concatenate([to_prefix, to_candidates], axis=2)[:, None]

    def with_room(cache):
        return jnp.pad(cache, ((0, 0), (0, 0), (0, packed), (0, 0), (0, 0)))

    embeddings = language_model.apply(
        {"params": params}, ids[:, :, :-1].reshape(batch, packed), method="embed"
    )
    hidden, _ = language_model.apply(
        {"params": params},
        embeddings,
        positions.reshape(batch, packed),
        mask,
        jax.tree.map(with_room, prefix.read),
        num_prefix,
    )
    hidden = hidden.reshape(batch, candidates, num_read, -1)
    scores = token_scores(language_model, params, hidden, ids[:, :, 1:])
    first = jax.nn.log_softmax(prefix.first_logits.astype(jnp.float32))
    first = jnp.take_along_axis(first, ids[:, :, 0], axis=1)
    return first + jnp.sum(jnp.where(valid[:, :, 1:], scores, 0.0), axis=-1)


def token_scores(
    language_model: nn.Module,
    params: Any,
    hidden: Float[Array, "*batch width"],
    ids: Int[Array, "*batch"],
) -> Float[Array, "*batch"]:
    """Log-probability of each token of `ids` by the hidden state that predicts it."""
    logits = language_model.apply({"params": params}, hidden, method="logits")
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
