"""Generation with a decoder that looks at a source: the captions and the answers of BLIP."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxblip.decoding.beam_cache import BeamCache
from jaxblip.decoding.ranking import token_scores
from jaxblip.decoding.search import DecodingConfig, run_search
from jaxblip.errors import UserError
from jaxblip.models.attention import causal_mask
from jaxblip.models.blip import BlipCaptioner, BlipQuestionAnswering
from jaxblip.models.layers import KeyValues, empty_cache
from jaxblip.models.med import MedDecoder
from jaxblip.models.opt import token_positions


def generate_captions(
    model: BlipCaptioner,
    params: Any,
    images: Float[Array, "batch height width 3"],
    config: DecodingConfig,
    prompt_ids: Int[Array, "batch prompt"] | None = None,
    prompt_valid: Bool[Array, "batch prompt"] | None = None,
    rng: jax.Array | None = None,
) -> Int[Array, "batch new"]:
    """A caption of each image, by the search that `config` asks for.

    Pure, and compiled once for each shape of the input:
    `jax.jit(generate_captions, static_argnames=("model", "config"))`.

    Args:
      params: of the model, without the collection's name.
      images: normalised.
      prompt_ids: tokens that the caption begins with, such as "a picture of" behind a first token
        in whose place `[DEC]` stands; without a `[SEP]`. By default `[DEC]` alone.
      prompt_valid: False at padding, at either end; by default there is none.
      rng: the key of all draws, where `config.sample`.

    Returns:
      int32 ids `[batch, config.max_new_tokens]`: the new tokens of a row (without the prompt) with
      its stop token, if it came to one, then padding.

    Raises:
      UserError: when prompt and new tokens exceed the model's `max_positions`, and when sampling is
        asked for without a random key.
    """
    features = model.apply({"params": params}, images, method="image_features")
    if prompt_ids is None:
        prompt_ids = jnp.zeros((len(images), 1), jnp.int32)
    if prompt_valid is None:
        prompt_valid = jnp.ones(prompt_ids.shape, bool)
    read = image_source(model, features, prompt_ids, prompt_valid)
    return _generate(model, params, read, config, rng)


def generate_answers(
    model: BlipQuestionAnswering,
    params: Any,
    images: Float[Array, "batch height width 3"],
    question_ids: Int[Array, "batch text"],
    question_valid: Bool[Array, "batch text"],
    config: DecodingConfig,
    rng: jax.Array | None = None,
    *,
    attend_to_padding: bool = False,
) -> Int[Array, "batch new"]:
    """An answer to each question on its image, by the search that `config` asks for.

    Pure, and compiled once for each shape of the input:
    `jax.jit(generate_answers, static_argnames=("model", "config", "attend_to_padding"))`.

    Args:
      params: of the model, without the collection's name.
      images: normalised.
      question_ids: with their `[CLS]` and `[SEP]`, padded on the right.
      rng: the key of all draws, where `config.sample`.
      attend_to_padding: let the decoder look at the padding of the questions, too, as BLIP's code
        and transformers do when they generate (not when they train). An answer then depends on
        how far the batch is padded.

    Returns, Raises: as `generate_captions`.
    """
    features = model.apply({"params": params}, images, method="image_features")
    read = question_source(model, params, features, question_ids, question_valid)
    if attend_to_padding:
        read = read.replace(valid=None)
    return _generate(model, params, read, config, rng)


@flax.struct.dataclass
class ReadSource:
    """What the decoder generates a text from, or scores a given one behind.

    Attributes:
      features: what it looks at: an image's tokens, or a question's states.
      valid: which of them count; None where there is no padding.
      prompt_ids: what the text begins with, `[DEC]` first.
      prompt_valid: False at padding, at either end.
    """

    features: Float[Array, "batch tokens source_width"]
    valid: Bool[Array, "batch tokens"] | None
    prompt_ids: Int[Array, "batch prompt"]
    prompt_valid: Bool[Array, "batch prompt"]


def image_source(
    model: BlipCaptioner,
    features: Float[Array, "batch tokens vision_width"],
    prompt_ids: Int[Array, "batch prompt"],
    prompt_valid: Bool[Array, "batch prompt"],
) -> ReadSource:
    """What captions are generated from; arguments as of `generate_captions`.

    Args:
      features: of the images, from `BlipCaptioner.image_features`.
    """
    # The first token of a row is behind its padding.
    is_first = jnp.arange(prompt_ids.shape[1]) == jnp.argmax(prompt_valid, axis=1)[:, None]
    prompt_ids = jnp.where(is_first, model.dec_token_id, prompt_ids)
    return ReadSource(features, None, prompt_ids, prompt_valid)


def question_source(
    model: BlipQuestionAnswering,
    params: Any,
    features: Float[Array, "batch tokens vision_width"],
    question_ids: Int[Array, "batch text"],
    question_valid: Bool[Array, "batch text"],
) -> ReadSource:
    """What answers are generated from; arguments as of `generate_answers`.

    Args:
      features: of the images, from `BlipQuestionAnswering.image_features`.
    """
    question = model.apply(
        {"params": params}, features, question_ids, question_valid, method="read_question"
    )
    start_ids = jnp.full((len(question_ids), 1), model.dec_token_id, jnp.int32)
    return ReadSource(question, question_valid, start_ids, jnp.ones(start_ids.shape, bool))


def prefill_source(
    model: BlipCaptioner | BlipQuestionAnswering,
    params: Any,
    read: ReadSource,
    max_new_tokens: int,
    num_beams: int = 1,
) -> tuple[Float[Array, "batch vocab"], CrossAttendingState, Int[Array, "batch prompt"]]:
    """Reads source and prompt, once for all beams of a row.

    Args:
      params: of the model.

    Returns:
      Scores, state and said ids, from which `decode_source` goes on.
    """
    inputs = read.features, read.valid, read.prompt_ids, read.prompt_valid
    logits, state = _decoder(model, params).prefill(*inputs, max_new_tokens, num_beams)
    # In transformers, too, the prompt counts as said when repetitions are penalized.
    return logits, state, jnp.where(read.prompt_valid, read.prompt_ids, -1)


def decode_source(
    model: BlipCaptioner | BlipQuestionAnswering,
    params: Any,
    logits: Float[Array, "batch vocab"],
    state: CrossAttendingState,
    config: DecodingConfig,
    rng: jax.Array | None,
    said_ids: Int[Array, "batch prompt"],
) -> tuple[Int[Array, "batch new"], CrossAttendingState]:
    """A text of each row, as `generation.decode`."""
    decoder = _decoder(model, params)
    return run_search(decoder, logits, state, config, rng=rng, prompt_ids=said_ids)


def _generate(model, params, read, config, rng):
    room = config.max_new_tokens, config.num_beams
    logits, state, said = prefill_source(model, params, read, *room)
    return decode_source(model, params, logits, state, config, rng, said)[0]


def source_log_likelihoods(
    model: BlipCaptioner | BlipQuestionAnswering,
    params: Any,
    read: ReadSource,
    candidate_ids: Int[Array, "batch candidates length"],
    candidate_valid: Bool[Array, "batch candidates length"],
) -> Float[Array, "batch candidates"]:
    """Sum of the log-probabilities of each candidate's tokens behind each row's prompt.

    The candidates of a row share its source.

    Args:
      params: of the model.
      candidate_ids, candidate_valid: as in `ranking.candidate_log_likelihoods`.
    """
    decoder, (batch, count, length) = _decoder(model, params), candidate_ids.shape
    prompt_ids, prompt_valid = (
        jnp.repeat(array, count, axis=0) for array in (read.prompt_ids, read.prompt_valid)
    )
    ids, valid = (x.reshape(batch * count, length) for x in (candidate_ids, candidate_valid))
    # The last token of a candidate is scored, but never read.
    text_valid = jnp.concatenate([prompt_valid, valid[:, :-1]], axis=1)
    hidden, _ = decoder.model.apply(
        {"params": decoder.params},
        jnp.concatenate([prompt_ids, ids[:, :-1]], axis=1),
        causal_mask(text_valid),
        decoder.read_source(read.features),
        read.valid,
        positions=token_positions(text_valid),
    )
    of_candidates = hidden[:, prompt_ids.shape[1] :]
    first = last_valid(hidden, prompt_valid)[:, None]
    hidden = jnp.concatenate([first, of_candidates], axis=1)
    scores = token_scores(decoder.model, decoder.params, hidden, ids)
    return jnp.sum(jnp.where(valid, scores, 0.0), axis=1).reshape(batch, count)


def last_valid(
    hidden: Float[Array, "rows length width"], valid: Bool[Array, "rows length"]
) -> Float[Array, "rows width"]:
    """The state of each row's last valid position of those that `valid` is about."""
    index = valid.shape[1] - 1 - jnp.argmax(valid[:, ::-1], axis=1)
    return jnp.take_along_axis(hidden, index[:, None, None], axis=1)[:, 0]


def _decoder(model: BlipCaptioner | BlipQuestionAnswering, params: Any) -> CrossAttendingDecoder:
    return CrossAttendingDecoder(MedDecoder(model.text_config, model.dtype), params["decoder"])


@flax.struct.dataclass
class CrossAttendingState:
    """What the decoder remembers of each row, and the sources that its rows look at.

    Attributes:
      text: prompt and new tokens.
      source: `[layers, batch, tokens, heads, head_width]`; the rows (beams) of a source share it.
      source_valid: None where a source has no padding.
    """

    text: BeamCache
    source: KeyValues
    source_valid: Bool[Array, "batch tokens"] | None


@dataclasses.dataclass(frozen=True)
class CrossAttendingDecoder:
    """A `MedDecoder` with its parameters, as the searches want it (`Decoder`)."""

    model: MedDecoder
    params: Any

    def prefill(
        self,
        features: Float[Array, "batch tokens source_width"],
        source_valid: Bool[Array, "batch tokens"] | None,
        prompt_ids: Int[Array, "batch prompt"],
        prompt_valid: Bool[Array, "batch prompt"],
        max_new_tokens: int,
        num_beams: int = 1,
    ) -> tuple[Float[Array, "batch vocab"], CrossAttendingState]:
        """Reads source and prompt once a row; its beams share what is remembered of them.

        Args:
          features: what the decoder looks at: an image's tokens, or a question's states.

        Returns:
          The scores of the first new token, and the state of `batch * num_beams` rows.

        Raises:
          UserError: when prompt and new tokens exceed the model's `max_positions`.
        """
        batch, prompt = prompt_ids.shape
        # The last new token is never read.
        length, limit = prompt + max_new_tokens - 1, self.model.config.max_positions
        if length > limit:
            raise UserError(
                f"decoding max_new_tokens={max_new_tokens} after a prompt of {prompt} tokens needs "
                f"{length} positions, but the decoder has {limit}: lower max_new_tokens."
            )
        room = num_beams * max_new_tokens
        cache = empty_cache(self.model.config, batch, prompt + room, self.model.dtype)
        text = BeamCache.with_room(cache, prompt_valid, num_beams, max_new_tokens)
        state = CrossAttendingState(text, self.read_source(features), source_valid)
        mask = jnp.pad(causal_mask(prompt_valid), ((0, 0), (0, 0), (0, 0), (0, room)))
        hidden, state = self._read(prompt_ids, token_positions(prompt_valid), mask, state, 0)
        return self._apply("logits", last_valid(hidden, prompt_valid)), state

    def read_source(self, features: Float[Array, "batch tokens source_width"]) -> KeyValues:
        """Keys and values that all rows of a source look at."""
        return self._apply("read_source", features)

    def step(
        self, ids: Int[Array, " rows"], index: Int[Array, ""], state: CrossAttendingState
    ) -> tuple[Float[Array, "rows vocab"], CrossAttendingState]:
        """Reads new token number `index` (from 0) of each row; scores the one after it."""
        text = state.text.with_token(index)
        positions, mask, place = text.positions(index), text.mask(index), text.place(index)
        ids, state = ids.reshape(positions.shape), state.replace(text=text)
        hidden, state = self._read(ids, positions, mask, state, place)
        return self._apply("logits", hidden.reshape(ids.size, -1)), state

    def reorder(
        self, state: CrossAttendingState, parents: Int[Array, "batch beams"]
    ) -> CrossAttendingState:
        """The state in which beam j of each row continues that row's former beam `parents[j]`."""
        return state.replace(text=state.text.reordered(parents))

    def _read(self, ids, positions, mask, state, place):
        """Hidden states of the tokens `ids`, which go to `place` of the cache, and the state."""
        hidden, cache = self._apply(
            "__call__",
            ids,
            mask,
            state.source,
            state.source_valid,
            positions=positions,
            cache=state.text.cache,
            cache_position=place,
        )
        return hidden, state.replace(text=state.text.replace(cache=cache))

    def _apply(self, method, *inputs, **kwargs):
        return self.model.apply({"params": self.params}, *inputs, method=method, **kwargs)
