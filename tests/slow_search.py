"""Greedy and beam search in plain Python, one row at a time and without a cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxblip.decoding import DecodingConfig
from jaxblip.models.attention import causal_mask
from jaxblip.models.opt import OptLanguageModel, token_positions


def slow_generate(language_model, params, prefix, valid, config: DecodingConfig) -> np.ndarray:
    """Same arguments and result as `generate`."""

    def scorer(row):
        packed = prefix[row][valid[row]]
        return lambda beams: _decoder_only_logits(language_model, params, packed, beams, config)

    return slow_search(scorer, len(prefix), config)


def slow_search(scorer, batch: int, config: DecodingConfig, prompt=()) -> np.ndarray:
    """Ids of each row, padded behind the stop token.

    Args:
      scorer: `scorer(row)(beams)` gives the logits of the token after each of some equally long
        sequences of new tokens: `[len(beams), vocab]`.
      prompt: ids that the repetition penalty counts besides the new ones.
    """
    search = slow_greedy if config.num_beams == 1 else slow_beam
    ids = np.full((batch, config.max_new_tokens), config.pad_token_id)
    for row in range(batch):
        result = search(scorer(row), config, tuple(prompt))
        ids[row, : len(result)] = result
    return ids


def slow_greedy(logits, config: DecodingConfig, prompt) -> tuple[int, ...]:
    ids: tuple[int, ...] = ()
    while len(ids) < config.max_new_tokens and config.stop_token_id not in ids:
        ids += (int(process(logits([ids])[0], ids, config, prompt).argmax()),)
    return ids


def slow_beam(logits, config: DecodingConfig, prompt) -> tuple[int, ...]:
    beams = config.num_beams
    running, finished = [(0.0, ())], []
    for length in range(1, config.max_new_tokens + 1):
        scores = [
            process(row, ids, config, prompt)
            for row, (_, ids) in zip(
                jax.nn.log_softmax(logits([ids for _, ids in running])), running, strict=True
            )
        ]
        candidates = [
            (total + score, (*ids, token))
            for (total, ids), row in zip(running, scores, strict=True)
            for token, score in enumerate(row)
        ]
        candidates = sorted(candidates, reverse=True)[: 2 * beams]
        for total, ids in candidates[:beams]:
            if ids[-1] == config.stop_token_id or length == config.max_new_tokens:
                finished.append((total / length**config.length_penalty, ids))
        finished = sorted(finished, reverse=True)[:beams]
        running = [(t, ids) for t, ids in candidates if ids[-1] != config.stop_token_id][:beams]
        if len(finished) == beams:
            if running[0][0] / length**config.length_penalty <= finished[-1][0]:
                break
    return finished[0][1]


def process(scores, ids, config: DecodingConfig, prompt) -> np.ndarray:
    """`scores` of the token after `ids`, with the repetition penalty and the minimal length."""
    scores = np.array(scores, np.float32)
    for token in {*ids, *prompt}:
        penalty = config.repetition_penalty
        scores[token] *= penalty if scores[token] < 0 else 1 / penalty
    if len(ids) < config.min_new_tokens:
        scores[config.stop_token_id] = -np.inf
    return scores


def _decoder_only_logits(language_model, params, prefix, beams, config) -> np.ndarray:
    """`[len(beams), vocab]`: every beam is read anew from its first position on."""
    new = len(beams[0])
    ids = np.zeros((config.num_beams, config.max_new_tokens), np.int32)
    ids[: len(beams), :new] = beams
    capacity = language_model.config.max_positions - config.max_new_tokens
    padded = np.zeros((capacity, prefix.shape[1]), prefix.dtype)
    padded[: len(prefix)] = prefix
    scores = _last_logits(language_model, params, padded, len(prefix), ids, new)
    return np.asarray(scores)[: len(beams)]


@jax.jit(static_argnums=0)
def _last_logits(language_model: OptLanguageModel, params, prefix, num_prefix, ids, num_new):
    """Logits behind `num_prefix` embeddings and `num_new` ids; the rest is ignored."""

    def model(*inputs, **kwargs):
        return language_model.apply({"params": params}, *inputs, **kwargs)

    words = model(ids, method="embed")
    x = jnp.zeros((len(ids), len(prefix) + ids.shape[1], prefix.shape[1]))
    x = x.at[:, : len(prefix)].set(prefix)
    x = jax.lax.dynamic_update_slice_in_dim(x, words, num_prefix, axis=1)
    length = num_prefix + num_new
    valid = jnp.broadcast_to(jnp.arange(x.shape[1]) < length, x.shape[:2])
    hidden, _ = model(x, token_positions(valid), causal_mask(valid))
    return model(hidden[:, length - 1], method="logits")
