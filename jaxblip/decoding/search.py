"""Greedy and beam search as compiled loops of static shape, for any model that is a `Decoder`."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxblip.errors import UserError


@dataclasses.dataclass(frozen=True)
class DecodingConfig:
    """How to search; hashable, so it can be a static argument of a compiled function.

    Attributes:
      max_new_tokens: tokens generated at most, the stop token included; the width of the result.
      stop_token_id: ends a row, and is part of the result.
      pad_token_id: fills a row behind its stop token.
      min_new_tokens: the stop token is impossible before so many tokens.
      num_beams: 1 is greedy search.
      length_penalty: a finished beam's score is its log-probability / length ** length_penalty:
        above 0 favours long results, below 0 short ones. Without effect on greedy search.
    """

    max_new_tokens: int
    stop_token_id: int
    pad_token_id: int
    min_new_tokens: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise UserError(f"decoding max_new_tokens={self.max_new_tokens} must be at least 1.")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise UserError(
                f"decoding min_new_tokens={self.min_new_tokens} must be between 0 and "
                f"max_new_tokens={self.max_new_tokens}."
            )
        if self.num_beams < 1:
            raise UserError(f"decoding num_beams={self.num_beams} must be at least 1.")


class Decoder(Protocol):
    """What a search needs of a model that has read its input.

    `state` is any tree of arrays of static shape; `rows` is batch * beams, the beams of a row of
    the batch adjacent.
    """

    def step(
        self, ids: Int[Array, " rows"], index: Int[Array, ""], state: Any
    ) -> tuple[Float[Array, "rows vocab"], Any]:
        """Reads new token number `index` (from 0) of each row; scores the one after it."""

    def reorder(self, state: Any, parents: Int[Array, "batch beams"]) -> Any:
        """The state in which beam j of each row continues that row's former beam `parents[j]`."""


def greedy_search(
    decoder: Decoder, logits: Float[Array, "batch vocab"], state: Any, config: DecodingConfig
) -> Int[Array, "batch new"]:
    """The most probable token at each step; ends when every row has stopped.

    Args:
      logits: scores of the first new token.
      state: the decoder's, of `batch` rows.

    Returns:
      int32 ids, padded behind the stop token.
    """
    batch = logits.shape[0]
    ids = jnp.full((batch, config.max_new_tokens), config.pad_token_id, jnp.int32)

    def choose(ids, stopped, index, logits):
        token = jnp.argmax(_forbid_early_stop(logits, index, config), axis=-1)
        token = jnp.where(stopped, config.pad_token_id, token).astype(jnp.int32)
        stopped |= token == config.stop_token_id
        return ids.at[:, index].set(token), stopped, index + 1

    def unfinished(carry):
        (_, stopped, index), _ = carry
        return (index < config.max_new_tokens) & ~jnp.all(stopped)

    def advance(carry):
        (ids, stopped, index), state = carry
        logits, state = decoder.step(ids[:, index - 1], index - 1, state)
        return choose(ids, stopped, index, logits), state

    first = choose(ids, jnp.zeros(batch, bool), jnp.int32(0), logits)
    (ids, _, _), _ = jax.lax.while_loop(unfinished, advance, (first, state))
    return ids


@flax.struct.dataclass
class Beams:
    """Token sequences of each row of the batch, best first; a score of -inf is an empty place."""

    ids: Int[Array, "batch beams new"]
    score: Float[Array, "batch beams"]

    @classmethod
    def best(cls, ids, score, count: int) -> tuple[Beams, Int[Array, "batch count"]]:
        """The `count` best of these sequences, and where they stood."""
        score, places = jax.lax.top_k(score, count)
        return cls(_take(ids, places), score), places


@flax.struct.dataclass
class BeamSearch:
    """The state of a beam search.

    Attributes:
      running: sequences without a stop token, by log-probability.
      finished: complete sequences, by log-probability / length ** length_penalty.
      parents: which former beam each running one continues.
      done: rows whose result cannot change any more.
      index: number of tokens chosen so far.
    """

    running: Beams
    finished: Beams
    parents: Int[Array, "batch beams"]
    done: Bool[Array, " batch"]
    index: Int[Array, ""]


def beam_search(
    decoder: Decoder, logits: Float[Array, "batch vocab"], state: Any, config: DecodingConfig
) -> Int[Array, "batch new"]:
    """The best complete sequence that a search with `config.num_beams` beams finds.

    Follows transformers' `generate` with `early_stopping=False`: a row is done when it has
    `num_beams` complete sequences and the best running one, scored at its present length, is no
    better than the worst of them. With a positive length penalty that is a heuristic, since the
    running one might still gain by growing.

    Args:
      logits: scores of the first new token.
      state: the decoder's, of `batch * config.num_beams` rows.

    Returns:
      int32 ids, padded behind the stop token.

    Raises:
      UserError: when the vocabulary is too small for so many beams.
    """
    (batch, vocab), beams = logits.shape, config.num_beams
    if vocab <= 2 * beams:
        raise UserError(
            f"decoding num_beams={beams} needs a vocabulary of more than {2 * beams} tokens, but "
            f"the language model has {vocab}: lower num_beams."
        )
    empty = Beams(
        ids=jnp.full((batch, beams, config.max_new_tokens), config.pad_token_id, jnp.int32),
        score=jnp.full((batch, beams), -jnp.inf),
    )
    search = BeamSearch(
        # All beams are the same before the first token, so only one of them may be continued.
        running=empty.replace(score=empty.score.at[:, 0].set(0.0)),
        finished=empty,
        parents=jnp.zeros((batch, beams), jnp.int32),
        done=jnp.zeros(batch, bool),
        index=jnp.int32(0),
    )
    logits = jnp.broadcast_to(logits[:, None], (batch, beams, vocab))
    search = _extend(search, logits, config)

    def unfinished(carry):
        search, _ = carry
        return (search.index < config.max_new_tokens) & ~jnp.all(search.done)

    def advance(carry):
        search, state = carry
        state = decoder.reorder(state, search.parents)
        last = search.running.ids[:, :, search.index - 1].reshape(-1)
        logits, state = decoder.step(last, search.index - 1, state)
        return _extend(search, logits.reshape(batch, beams, vocab), config), state

    search, _ = jax.lax.while_loop(unfinished, advance, (search, state))
    return search.finished.ids[:, 0]


def _extend(
    search: BeamSearch, logits: Float[Array, "batch beams vocab"], config: DecodingConfig
) -> BeamSearch:
    """One token more for the running beams."""
    batch, beams, vocab = logits.shape
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    log_probs = _forbid_early_stop(log_probs, search.index, config)
    total = (search.running.score[:, :, None] + log_probs).reshape(batch, -1)
    # At most one continuation a beam stops, so of twice as many at least `beams` go on.
    score, flat = jax.lax.top_k(total, 2 * beams)
    parents, tokens = flat // vocab, (flat % vocab).astype(jnp.int32)
    ids = _take(search.running.ids, parents).at[:, :, search.index].set(tokens)
    length = search.index + 1
    ended = (tokens == config.stop_token_id) | (length == config.max_new_tokens)

    running, places = Beams.best(ids, jnp.where(ended, -jnp.inf, score), beams)

    normaliser = length.astype(jnp.float32) ** config.length_penalty
    # A sequence that ends counts only if it is among the `beams` best continuations.
    accepted = ended & (jnp.arange(2 * beams) < beams) & ~search.done[:, None]
    finished, _ = Beams.best(
        jnp.concatenate([search.finished.ids, ids], axis=1),
        jnp.concatenate(
            [search.finished.score, jnp.where(accepted, score / normaliser, -jnp.inf)], axis=1
        ),
        beams,
    )
    improvable = running.score[:, 0] / normaliser > finished.score[:, -1]
    return BeamSearch(
        running=running,
        finished=finished,
        parents=_take(parents, places),
        done=search.done | ~improvable,
        index=length,
    )


def _take(x: Array, places: Int[Array, "batch count"]) -> Array:
    """`x[row, places[row]]` for each row of the batch; `x` is `[batch, beams, ...]`."""
    return jnp.take_along_axis(x, places.reshape(places.shape + (1,) * (x.ndim - 2)), axis=1)


def _forbid_early_stop(scores: Array, index: Int[Array, ""], config: DecodingConfig) -> Array:
    """`scores` (`[..., vocab]`) with -inf for the stop token while `min_new_tokens` is not met."""
    is_stop = jnp.arange(scores.shape[-1]) == config.stop_token_id
    return jnp.where(is_stop & (index < config.min_new_tokens), -jnp.inf, scores)
