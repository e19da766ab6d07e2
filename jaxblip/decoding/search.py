"""Greedy and beam search and sampling: compiled loops of static shape, for any `Decoder`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
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
      num_beams: 1 is greedy search, or sampling.
      length_penalty: a finished beam's score is its log-probability / length ** length_penalty:
        above 0 favours long results, below 0 short ones. Without effect on greedy search.
      repetition_penalty: the score of a token that the row already has is divided by this where it
        is positive, and multiplied where it is negative (CTRL, arXiv 1909.05858, as in
        transformers); 1 is none.
      sample: draw each token, instead of searching for the most probable ones.
      temperature: of sampling; the scores are divided by it.
      top_k: sample among so many most probable tokens (and those that equal the last of them); 0
        is all.
      top_p: sample among the most probable tokens that together have at least this probability
        (and those that equal the last of them); 1 is all. Counted behind `top_k`.
    """

    max_new_tokens: int
    stop_token_id: int
    pad_token_id: int
    min_new_tokens: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

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
        if self.sample and self.num_beams > 1:
            raise UserError(
                f"decoding sample=True draws one sequence a row: set num_beams={self.num_beams} to "
                "1, or sample to False."
            )
        for name in ("repetition_penalty", "temperature"):
            if not getattr(self, name) > 0:
                raise UserError(f"decoding {name}={getattr(self, name)} must be above 0.")
        if self.top_k < 0:
            raise UserError(f"decoding top_k={self.top_k} must be at least 0, which means all.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"decoding top_p={self.top_p} must be above 0 and at most 1.")


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


def run_search(
    decoder: Decoder,
    logits: Float[Array, "batch vocab"],
    state: Any,
    config: DecodingConfig,
    *,
    rng: jax.Array | None = None,
    prompt_ids: Int[Array, "batch prompt"] | None = None,
) -> tuple[Int[Array, "batch new"], Any]:
    """New tokens by the search that `config` asks for; arguments and result as there.

    Raises:
      UserError: when sampling is asked for without a random key.
    """
    if config.num_beams > 1:
        return beam_search(decoder, logits, state, config, prompt_ids)
    if not config.sample:
        return greedy_search(decoder, logits, state, config, prompt_ids)
    if rng is None:
        raise UserError("decoding sample=True needs a random key: pass rng=jax.random.key(seed).")
    return sample_search(decoder, logits, state, config, rng, prompt_ids)


def greedy_search(
    decoder: Decoder,
    logits: Float[Array, "batch vocab"],
    state: Any,
    config: DecodingConfig,
    prompt_ids: Int[Array, "batch prompt"] | None = None,
) -> tuple[Int[Array, "batch new"], Any]:
    """The most probable token at each step; ends when every row has stopped.

    Args:
      logits: scores of the first new token.
      state: the decoder's, of `batch` rows.
      prompt_ids: tokens before the new ones that `config.repetition_penalty` counts as well;
        negative ones do not count.

    Returns:
      int32 ids, padded behind the stop token; and the decoder's last state, so that a caller can
      donate the first one.
    """

    def most_probable(logits, index):
        return jnp.argmax(logits, axis=-1)

    return _token_by_token(decoder, logits, state, config, prompt_ids, most_probable)


def sample_search(
    decoder: Decoder,
    logits: Float[Array, "batch vocab"],
    state: Any,
    config: DecodingConfig,
    rng: jax.Array,
    prompt_ids: Int[Array, "batch prompt"] | None = None,
) -> tuple[Int[Array, "batch new"], Any]:
    """A random sequence for each row, each token drawn by its probability (`sampling_logits`).

    Args:
      rng: decides all draws; the other arguments and the result are those of `greedy_search`.
    """

    def draw(logits, index):
        return jax.random.categorical(
            jax.random.fold_in(rng, index), sampling_logits(logits, config)
        )

    return _token_by_token(decoder, logits, state, config, prompt_ids, draw)


def sampling_logits(
    logits: Float[Array, "*batch vocab"], config: DecodingConfig
) -> Float[Array, "*batch vocab"]:
    """Temperature, then top-k, then top-p, in transformers' order; -inf for what is cut off."""
    logits = logits.astype(jnp.float32) / config.temperature
    if config.top_k:
        kept, _ = jax.lax.top_k(logits, min(config.top_k, logits.shape[-1]))
        logits = jnp.where(logits < kept[..., -1:], -jnp.inf, logits)
    if config.top_p < 1:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        num_kept = jnp.sum(before < config.top_p, axis=-1, keepdims=True)
        last = jnp.take_along_axis(descending, num_kept - 1, axis=-1)
        logits = jnp.where(logits < last, -jnp.inf, logits)
    return logits


def _token_by_token(
    decoder: Decoder,
    logits: Float[Array, "batch vocab"],
    state: Any,
    config: DecodingConfig,
    prompt_ids: Int[Array, "batch prompt"] | None,
    pick: Callable[[Array, Array], Array],
) -> tuple[Int[Array, "batch new"], Any]:
    """Extends each row by `pick(scores, index)` until every row has stopped."""
    batch = logits.shape[0]
    ids = jnp.full((batch, config.max_new_tokens), config.pad_token_id, jnp.int32)

    def choose(ids, stopped, index, logits):
        token = pick(process_scores(logits, ids, index, config, prompt_ids), index)
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
    (ids, _, _), state = jax.lax.while_loop(unfinished, advance, (first, state))
    return ids, state


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
    decoder: Decoder,
    logits: Float[Array, "batch vocab"],
    state: Any,
    config: DecodingConfig,
    prompt_ids: Int[Array, "batch prompt"] | None = None,
) -> tuple[Int[Array, "batch new"], Any]:
    """The best complete sequence that a search with `config.num_beams` beams finds.

    Follows transformers' `generate` with `early_stopping=False`: a row is done when it has
    `num_beams` complete sequences and the best running one, scored at its present length, is no
    better than the worst of them. With a positive length penalty that is a heuristic, since the
    running one might still gain by growing.

    Args:
      logits: scores of the first new token.
      state: the decoder's, of `batch * config.num_beams` rows.
      prompt_ids: as in `greedy_search`.

    Returns:
      As `greedy_search`.

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
    if prompt_ids is not None:
        prompt_ids = jnp.broadcast_to(prompt_ids[:, None], (batch, beams, prompt_ids.shape[1]))
    search = BeamSearch(
        # All beams are the same before the first token, so only one of them may be continued.
        running=empty.replace(score=empty.score.at[:, 0].set(0.0)),
        finished=empty,
        parents=jnp.zeros((batch, beams), jnp.int32),
        done=jnp.zeros(batch, bool),
        index=jnp.int32(0),
    )
    logits = jnp.broadcast_to(logits[:, None], (batch, beams, vocab))
    search = _extend(search, logits, config, prompt_ids)

    def unfinished(carry):
        search, _ = carry
        return (search.index < config.max_new_tokens) & ~jnp.all(search.done)

    def advance(carry):
        search, state = carry
        state = decoder.reorder(state, search.parents)
        last = search.running.ids[:, :, search.index - 1].reshape(-1)
        logits, state = decoder.step(last, search.index - 1, state)
        return _extend(search, logits.reshape(batch, beams, vocab), config, prompt_ids), state

    search, state = jax.lax.while_loop(unfinished, advance, (search, state))
    return search.finished.ids[:, 0], state


def _extend(
    search: BeamSearch,
    logits: Float[Array, "batch beams vocab"],
    config: DecodingConfig,
    prompt_ids: Int[Array, "batch beams prompt"] | None,
) -> BeamSearch:
    """One token more for the running beams."""
    batch, beams, vocab = logits.shape
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    log_probs = process_scores(log_probs, search.running.ids, search.index, config, prompt_ids)
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


def process_scores(
    scores: Float[Array, "*rows vocab"],
    ids: Int[Array, "*rows new"],
    index: Int[Array, ""],
    config: DecodingConfig,
    prompt_ids: Int[Array, "*rows prompt"] | None,
) -> Float[Array, "*rows vocab"]:
    """Scores of new token number `index`, with the repetition penalty and the minimal length."""
    scores, vocab = scores.astype(jnp.float32), jnp.arange(scores.shape[-1])
    if config.repetition_penalty != 1.0:
        earlier = jnp.where(jnp.arange(ids.shape[-1]) < index, ids, -1)
        if prompt_ids is not None:
            earlier = jnp.concatenate([prompt_ids, earlier], axis=-1)
        # A comparison with the whole vocabulary, and no scatter: it stays local however the scores
        # are sharded, and is never stored.
        repeated = jnp.any(earlier[..., None] == vocab, axis=-2)
        penalty = config.repetition_penalty
        penalized = jnp.where(scores < 0, scores * penalty, scores / penalty)
        scores = jnp.where(repeated, penalized, scores)
    too_early = (vocab == config.stop_token_id) & (index < config.min_new_tokens)
    return jnp.where(too_early, -jnp.inf, scores)
